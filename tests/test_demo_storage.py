"""The embedded S3 server: it really answers, keeps its data, refuses strangers and never outlives its owner."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import ClientError

from appliance.demo import storage as storage_module
from appliance.demo.storage import Storage, start_storage
from appliance.errors import StoreError

OWNER = """
import sys, time
from pathlib import Path
from appliance.demo.storage import start_storage
with start_storage(Path(sys.argv[1]), buckets=("data",)) as storage:
    print(storage.endpoint, flush=True)
    time.sleep(120)
"""


def connect(storage: Storage, **options: Any) -> Any:
    """A client with the storage's own credentials unless others are given."""
    keys = {"aws_access_key_id": storage.access_key, "aws_secret_access_key": storage.secret_key}
    return boto3.client("s3", endpoint_url=storage.endpoint, region_name="us-east-1", **(keys | options))


def is_open(endpoint: str) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(endpoint.rpartition(":")[2]))) == 0


def test_data_url_and_credentials_outlast_a_restart_and_the_server_does_not(tmp_path: Path) -> None:
    """The second start has the first one's object, endpoint and secret; after the block nobody listens."""
    with start_storage(tmp_path / "s", buckets=("data",)) as first:
        connect(first).put_object(Bucket="data", Key="k", Body=b"kept")
    assert not is_open(first.endpoint)
    with start_storage(tmp_path / "s", buckets=("data", "more")) as second:
        assert connect(second).get_object(Bucket="data", Key="k")["Body"].read() == b"kept"
        connect(second).head_bucket(Bucket="more")
    assert (second.endpoint, second.secret_key) == (first.endpoint, first.secret_key)
    assert not is_open(second.endpoint)
    assert (tmp_path / "s" / "identity.json").stat().st_mode & 0o777 == 0o600
    assert first.secret_key not in repr(first)


def test_strangers_are_refused(storage: Storage) -> None:
    """Anonymous, unknown and wrongly signed requests get 403; unknown buckets are not made on the way."""
    for options in (
        {"config": Config(signature_version=UNSIGNED)},
        {"aws_access_key_id": "nobody"},
        {"aws_secret_access_key": "wrong"},
    ):
        with pytest.raises(ClientError, match=r"AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch"):
            connect(storage, **options).list_objects_v2(Bucket="registry")
    with pytest.raises(ClientError, match="NoSuchBucket"):
        connect(storage).put_object(Bucket="unknown", Key="k", Body=b"")


def test_taken_ports_are_left_to_their_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remembered port that is in use is not chosen; one that is lost after the choice is chosen anew."""
    choose = storage_module._choose_ports
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as lost:
        port = taken.getsockname()[1]
        (tmp_path / "ports.json").write_text(json.dumps(dict.fromkeys(storage_module._PORTS, port)))
        assert port not in choose(tmp_path).values()
        lost.bind(("127.0.0.1", 0))
        bad = [lost.getsockname()[1]]

        def choose_badly(folder: Path) -> dict[str, int]:
            return choose(folder) | ({"s3.port": bad.pop()} if bad else {})

        monkeypatch.setattr(storage_module, "_choose_ports", choose_badly)
        with start_storage(tmp_path, buckets=("data",)) as storage:
            assert not storage.endpoint.endswith((f":{port}", f":{lost.getsockname()[1]}"))
            assert connect(storage).list_buckets()["Buckets"][0]["Name"] == "data"


def test_the_server_dies_with_a_killed_owner_and_two_owners_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the owner leaves no orphan; while it lives, its folder is its own; then the data is there."""
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            endpoint = owner.stdout.readline().strip()
            assert is_open(endpoint)
            monkeypatch.setattr(storage_module, "_LOCK_S", 0.2)
            with (
                pytest.raises(StoreError, match="another process runs a store here"),
                start_storage(tmp_path, buckets=("data",)),
            ):
                pass
        finally:
            os.kill(owner.pid, signal.SIGKILL)
    monkeypatch.setattr(storage_module, "_LOCK_S", 10)
    deadline = time.monotonic() + 10
    while is_open(endpoint) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_open(endpoint)
    with start_storage(tmp_path, buckets=("data",)) as storage:  # waits for the dying server's lock
        assert storage.endpoint == endpoint


@pytest.mark.parametrize(
    ("script", "words"),
    [("echo no room; exit 3", r"exit code 3.*\nno room"), ("echo thinking; exec sleep 60", r"in time.*\nthinking")],
    ids=["ends", "hangs"],
)
def test_a_server_that_does_not_come_up_is_an_error_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    """Whether it ends or hangs, the wait is bounded and nothing is left running."""
    weed = tmp_path / "weed"
    weed.write_text(f"#!/bin/sh\n{script}\n")
    weed.chmod(0o755)
    monkeypatch.setattr(storage_module, "_find_weed", lambda: weed)
    monkeypatch.setattr(storage_module, "_START_S", 0.5)
    with pytest.raises(StoreError, match=words), start_storage(tmp_path / "s", buckets=("data",)):
        pass


def test_a_missing_program_names_the_extra_that_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback about a file that is not there."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StoreError, match="demo extra"), start_storage(tmp_path / "s", buckets=("data",)):
        pass
