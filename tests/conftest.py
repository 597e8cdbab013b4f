"""Fixtures for real object stores: one SeaweedFS per session, and a fresh store of each kind per test.

Test workers that run side by side share the machine's cores out among themselves: two trainings
with two threads each on two cores wait for each other at every barrier.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
from warm import Warm, start_warm

from appliance.demo.storage import Storage, start_storage
from appliance.digest import digest_bytes
from appliance.store import Store, open_store
from appliance.store.s3 import S3Store


def pytest_configure() -> None:
    """Hear signals as in front of a terminal, and pin this worker to its share of the cores (where it has one).

    A script's background jobs start with Ctrl-C ignored, and `nohup`'s with SIGHUP ignored: what the tests
    start would inherit that, and the signals that they send would be lost.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    name, count = os.environ.get("PYTEST_XDIST_WORKER", ""), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if name:
        share = sorted(os.sched_getaffinity(0))[int(name.removeprefix("gw")) :: count]
        os.sched_setaffinity(0, share or os.sched_getaffinity(0))


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """The process that training workers are forked from."""
    with start_warm() as process:
        yield process


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    """A running S3 server with the buckets `datasets` and `registry`."""
    with start_storage(tmp_path_factory.mktemp("storage"), buckets=("datasets", "registry")) as running:
        yield running


@pytest.fixture
def s3(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The server, with this process's AWS variables (and no others) pointing at it."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in storage.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return storage


@pytest.fixture(scope="session")
def bucket(storage: Storage) -> S3Store:
    """The whole bucket `registry` as a store, connected once: building clients is the slow part."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in storage.environment.items():
            patch.setenv(name, value)
        store = open_store("s3://registry")
    assert isinstance(store, S3Store)
    return store


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An empty store: a folder, then a prefix of a bucket on SeaweedFS."""
    if request.param == "file":
        return open_store(tmp_path_factory.mktemp("store").as_uri())
    prefix = digest_bytes(request.node.nodeid.encode())[:16]
    return replace(request.getfixturevalue("bucket"), prefix=prefix)
