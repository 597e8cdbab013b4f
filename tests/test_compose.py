"""Laws of `compose.yaml`: the store that it describes starts, has its buckets, and knows only the given keys."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from appliance.errors import StoreError
from appliance.store import Store, open_store

COMPOSE = yaml.safe_load((Path(__file__).parent.parent / "compose.yaml").read_text("utf-8"))
KEYS = {"AWS_ACCESS_KEY_ID": "given", "AWS_SECRET_ACCESS_KEY": "given-secret"}
OTHERS = ("s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port",
          "filer.port.grpc", "admin.port", "admin.port.grpc")  # fmt: skip


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """The command of the service `storage`, run as it stands but for the folder and free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(len(OTHERS) + 1)]
    s3_port, *ports = [s.getsockname()[1] for s in sockets]
    for held in sockets:
        held.close()
    command = [re.sub(r"(?<=^-s3\.port=)\d+", str(s3_port), c).replace("/data", str(tmp_path)) for c in find_command()]
    options = [f"-{name}={port}" for name, port in zip(OTHERS, ports, strict=True)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | KEYS
    log = (tmp_path / "log").open("w")
    program = [str(Path(sys.executable).parent / "weed"), *command, "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *options]
    with subprocess.Popen(program, env=environment, stdout=log, stderr=log) as server:
        yield f"http://127.0.0.1:{s3_port}"
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
    for left in (p for port in (s3_port, *ports) for p in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")):  # noqa: S108
        left.unlink(missing_ok=True)


def find_command() -> list[str]:
    """What the service runs."""
    return [str(word) for word in COMPOSE["services"]["storage"]["command"]]


def test_the_store_has_its_buckets_and_refuses_other_keys(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The appliance's own settings in the file fit the store beside it."""
    settings: dict[str, Any] = COMPOSE["services"]["appliance"]["environment"]
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_REGION": settings["AWS_REGION"]}.items():
        monkeypatch.setenv(name, value)
    store = open_store(settings["APPLIANCE_STORE"])
    wait_for(store)
    store.put("a", b"1", if_none_match=True)
    assert store.get("a")[0] == b"1"
    list(open_store("s3://datasets/dvc").list(""))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    with pytest.raises(StoreError):
        open_store(settings["APPLIANCE_STORE"]).get("a")


def wait_for(store: Store) -> None:
    """Until the server answers with its bucket."""
    deadline = time.monotonic() + 60
    while True:
        try:
            list(store.list(""))
        except StoreError:
            assert time.monotonic() < deadline, "no answer within a minute"
            time.sleep(0.2)
        else:
            return


def test_keys_are_demanded_and_nothing_is_open_to_the_network() -> None:
    """No default secret; the port is bound to the loopback; images are pinned by digest."""
    storage, appliance = (COMPOSE["services"][n] for n in ("storage", "appliance"))
    assert all(value.startswith(f"${{{name}:?") for name, value in storage["environment"].items())
    assert all(port.startswith("127.0.0.1:") for port in storage["ports"])
    assert re.search(r"@sha256:[0-9a-f]{64}$", storage["image"])
    assert appliance["read_only"] is True
    assert appliance["stop_grace_period"] == "2m"
    assert storage["stop_grace_period"] == "1m", "SeaweedFS ends within 2 or 13 s, by chance; Docker kills after 10"


def test_the_store_is_healthy_when_its_last_bucket_is_made() -> None:
    """The appliance waits for it: on a fresh volume S3 answers before the buckets are there."""
    (buckets,) = (word.removeprefix("-bucket=") for word in find_command() if word.startswith("-bucket="))
    assert COMPOSE["services"]["storage"]["healthcheck"]["test"][-1].endswith(f"/buckets/{buckets.split(',')[-1]}/")
    assert COMPOSE["services"]["appliance"]["depends_on"] == {"storage": {"condition": "service_healthy"}}
