"""Laws of `compose.yaml`: the store that it describes starts, has its buckets, and knows only the given keys.

With the marker `image` the file itself is run, by podman-compose (`make image-test` puts it into
.cache/podman-compose): SeaweedFS's image, which is on a hub, is replaced by one with the same program, and
the GPU, which is not here, is not asked for. Networks, ports, volumes and the rest are what the file says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml
from containers import ROOT, STORAGE, USER, Engine, build_storage, execute, give_away
from test_image import engine, write_recipe  # noqa: F401 - one is a fixture
from test_reconcile import AUTHOR, QUIET, base  # noqa: F401 - one is a fixture
from tiny import write_dataset

from appliance.errors import StoreError
from appliance.store import Store, open_store

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
KEYS = {"AWS_ACCESS_KEY_ID": "given", "AWS_SECRET_ACCESS_KEY": "given-secret"}
OTHERS = ("s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port",
          "filer.port.grpc", "admin.port", "admin.port.grpc")  # fmt: skip


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[dict[str, int]]:
    """The command of the service `storage`, run as it stands but for the folder and free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(len(OTHERS) + 1)]
    s3_port, *ports = [s.getsockname()[1] for s in sockets]
    for held in sockets:
        held.close()
    command = [re.sub(r"(?<=^-s3\.port=)\d+", str(s3_port), c).replace("/data", str(tmp_path)) for c in find_command()]
    options = [f"-{name}={port}" for name, port in zip(OTHERS, ports, strict=True)]
    signing = dict.fromkeys((n for n in COMPOSE["services"]["storage"]["environment"] if "JWT" in n), "given-secret")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | KEYS | signing
    log = (tmp_path / "log").open("w")
    program = [str(Path(sys.executable).parent / "weed"), *command, "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *options]
    with subprocess.Popen(program, env=environment, stdout=log, stderr=log) as server:
        yield {"s3.port": s3_port, **dict(zip(OTHERS, ports, strict=True))}
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


def test_the_store_has_its_buckets_and_refuses_other_keys(
    ports: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The appliance's own settings in the file fit the store beside it; what is behind S3 is closed too."""
    check_store(f"http://127.0.0.1:{ports['s3.port']}", monkeypatch)
    for method, body in (("GET", None), ("POST", b"x"), ("DELETE", None)):
        url = f"http://127.0.0.1:{ports['filer.port']}/buckets/adapters/registry/"
        with pytest.raises(HTTPError, match="401"):
            urlopen(Request(url, data=body, method=method), timeout=10)
    with urlopen(f"http://127.0.0.1:{ports['master.port']}/dir/assign", timeout=10) as answer:
        place = json.load(answer)["fid"]
    with pytest.raises(HTTPError, match="401"):
        urlopen(Request(f"http://127.0.0.1:{ports['volume.port']}/{place}", data=b"x", method="POST"), timeout=10)


def check_store(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both buckets are there for the given keys, and not for a guessed secret."""
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
    named = {name: value for name, value in storage["environment"].items() if name.startswith("AWS_")}
    assert len(named) == 2
    assert all(value.startswith(f"${{{name}:?") for name, value in named.items())
    assert all(port.startswith("127.0.0.1:") for port in storage["ports"])
    assert re.search(r"@sha256:[0-9a-f]{64}$", storage["image"])
    assert appliance["read_only"] is True
    assert appliance["stop_grace_period"] == "2m"
    assert storage["stop_grace_period"] == "1m", "SeaweedFS ends within 2 or 13 s, by chance; Docker kills after 10"


def test_the_store_is_healthy_when_its_last_bucket_is_made() -> None:
    """The appliance waits for it: on a fresh volume S3 answers before the buckets are there."""
    (buckets,) = (word.removeprefix("-bucket=") for word in find_command() if word.startswith("-bucket="))
    assert COMPOSE["services"]["storage"]["healthcheck"]["test"][-1].endswith(f":8333/{buckets.split(',')[-1]}")
    assert COMPOSE["services"]["appliance"]["depends_on"] == {"storage": {"condition": "service_healthy"}}


# What the names of its containers, volumes and networks begin with.
PROJECT = f"compose-{os.getpid()}"
PROGRAM = ROOT / ".cache" / "podman-compose" / "bin" / "podman-compose"
OVERRIDE = f"""services:
  storage: {{ image: {STORAGE} }}
  appliance: {{ deploy: !reset null }}
"""


@dataclass(frozen=True, slots=True)
class Host:
    """A machine with podman, and a repository with `compose.yaml` and `.env` in it."""

    root: Path
    engine: Engine

    @property
    def storage(self) -> str:
        """The name of the store's container."""
        return f"{PROJECT}_storage_1"

    def compose(self, *arguments: str) -> str:
        """`docker compose ...` in the repository. Raises with what it said when it fails."""
        clean = {k: v for k, v in self.engine.environment.items() if not k.startswith(("AWS_", "APPLIANCE_"))}
        files = ("--file", "compose.yaml", "--file", "override.yaml", "--project-name", PROJECT)
        return execute(str(PROGRAM), *files, *arguments, env=clean, cwd=self.root, timeout_s=600)

    def start(self) -> None:
        """The store, until it is healthy, which docker waits for by itself."""
        self.compose("up", "--detach", "storage")
        deadline = time.monotonic() + 60
        while True:
            try:
                self.engine.call("healthcheck", "run", self.storage)
            except RuntimeError:
                assert time.monotonic() < deadline, "not healthy within a minute"
                time.sleep(0.2)
            else:
                return

    def run(self, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """`docker compose run --rm appliance ...`."""
        return self.compose("run", "--rm", "-T", *options, "appliance", *arguments)

    def git(self, *words: str) -> str:
        """Git in the repository, which belongs to another user."""
        return execute("git", "-c", "safe.directory=*", *words, env={**os.environ, **QUIET, **AUTHOR}, cwd=self.root)


@pytest.fixture
def host(engine: Engine, base: Path, tmp_path: Path) -> Iterator[Host]:  # noqa: F811
    """Set up as docs/image.md says; everything is removed at the end."""
    build_storage(tmp_path / "storage")
    root = tmp_path / "repository"
    write_recipe(root, evaluation={"gates": {"min_test_rows": 20}})  # few rows: inconclusive, exit code 0
    write_dataset(root / "datasets" / "colours", rows=64)
    shutil.copytree(base, root / "base")
    shutil.copy(ROOT / "compose.yaml", root)
    (root / "override.yaml").write_text(OVERRIDE)
    settings = {**KEYS, "APPLIANCE_USER": f"{USER}:{USER}", "APPLIANCE_IMAGE": engine.find_digest()}
    (root / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    (root / ".gitignore").write_text("/base\n")
    give_away(root)
    host = Host(root, engine)
    yield host
    host.compose("down", "--volumes")


@pytest.mark.image
def test_a_repository_is_trained_beside_its_store(host: Host) -> None:
    """From an empty store to a version that is pulled; the store ends in peace, and its volume outlives it."""
    host.start()
    assert "s3://adapters/registry: readable" in host.run("doctor")
    host.run("init", "--remote", "s3://datasets/dvc")
    for arguments in (("add", "--quiet", "datasets"), ("push", "--quiet")):
        host.run(*arguments, options=("--entrypoint", "dvc"))
    host.git("add", "--all")
    assert ".env" not in host.git("ls-files").split(), "the keys stay here"
    host.git("commit", "--quiet", "--message", "data")
    give_away(host.root)
    shutil.rmtree(host.root / "datasets")
    host.run("reconcile")
    assert "colours: nothing to do" in host.run("reconcile")
    host.compose("stop", "storage")
    assert host.engine.call("inspect", "--format", "{{.State.ExitCode}}", host.storage) == "0\n", "not killed"
    host.compose("down")
    host.start()
    (version,) = json.loads(host.run("list", "--json"))
    reference = f"colours@{version['version']}"
    assert "verified" in host.run("pull", reference, "/out/pulled")
    assert host.engine.find_digest() in host.run("show", reference, "--json")


@pytest.mark.image
def test_the_store_is_reached_with_its_keys_on_the_loopback_alone(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the host; of SeaweedFS's many ports S3's is the only one that is published."""
    host.start()
    check_store("http://127.0.0.1:8333", monkeypatch)
    assert host.engine.call("port", host.storage) == "8333/tcp -> 127.0.0.1:8333\n"


@pytest.mark.image
def test_only_what_is_mounted_is_written(host: Host) -> None:
    """By root too; /dev/shm is large enough for training."""
    host.start()
    script = "for f in /tmp /cache /out /workspace /etc /opt/appliance /; do touch $f/a || echo sealed $f; done"
    said = host.run("-c", f"{script}; df --block-size=1G /dev/shm", options=("--user", "0", "--entrypoint", "sh"))
    assert re.findall(r"sealed (\S+)", said) == ["/etc", "/opt/appliance", "/"]
    assert re.search(r"^shm +8 ", said, re.MULTILINE), said


@pytest.mark.image
def test_a_missing_key_is_named(host: Host) -> None:
    """Nothing starts without `.env`; the message says what to put where."""
    kept = (host.root / ".env").rename(host.root / "kept")
    with pytest.raises(RuntimeError, match=r"put AWS_ACCESS_KEY_ID into \.env"):
        host.compose("up", "--detach", "storage")
    kept.rename(host.root / ".env")
