"""Leases: one reconcile at a time per model, on one runner and across runners.

A lease spares work, never correctness: versions are immutable and aliases move by compare-and-swap,
so two holders would train twice and lose nothing. It ends by itself when its holder is gone; a holder
that died on this machine is known to be dead by its file lock and is not waited for. Nothing is ever
deleted: a lease that is given back is one that has run out.
"""

from __future__ import annotations

import contextlib
import fcntl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.digest import canonical_json, write_atomic
from appliance.errors import NotFoundError, PreconditionFailedError, RegistryError, StoreError
from appliance.registry.layout import check_name
from appliance.store import Store

LEASE_S = 900.0
_POLL_S = 2.0


class Lease(BaseModel):
    """Who works on the model `name` until when (seconds since the epoch), and in which folder of runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    schema_version: Literal[1] = Field(1, alias="schema")
    name: str
    holder: str = Field(description="unique per claim")
    actor: str
    place: str = Field(description="random id of the holder's folder of runs")
    until: float

    def encode(self) -> bytes:
        """The canonical bytes that are stored."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a claim is made with; `until` of each write is `clock() + ttl_s`."""

    store: Store
    lease: Lease
    ttl_s: float
    clock: Callable[[], float]

    @property
    def key(self) -> str:
        """Where the lease lies."""
        return lease_key(self.lease.name)

    def write(self, *, etag: str | None, ttl_s: float) -> str | None:
        """The new ETag, or `None` when another writer was faster."""
        content = self.lease.model_copy(update={"until": self.clock() + ttl_s}).encode()
        try:
            return self.store.put(self.key, content, if_none_match=etag is None, if_match=etag).etag
        except PreconditionFailedError:
            return None

    def write_again(self, *, etag: str, ttl_s: float) -> str | None:
        """As `write` for the holder, also when an earlier write was applied and its answer, the new ETag, was lost."""
        written = self.write(etag=etag, ttl_s=ttl_s)
        found = None if written else read_lease(self.store, self.lease.name)
        if found is not None and found[0].holder == self.lease.holder:
            return self.write(etag=found[1], ttl_s=ttl_s)
        return written


def lease_key(name: str) -> str:
    """`leases/model-<name>.json`."""
    return f"leases/model-{check_name(name)}.json"


@contextlib.contextmanager
def hold_model(
    store: Store,
    name: str,
    *,
    folder: Path,
    actor: str,
    wait_s: float = 0.0,
    ttl_s: float = LEASE_S,
    clock: Callable[[], float] = time.time,
) -> Iterator[None]:
    """Be the only one that works on a model while the block runs; `folder` is this machine's folder of runs.

    Another holder is waited for up to `wait_s`. Raises `RegistryError` that names the holder after that.
    """
    deadline = time.monotonic() + wait_s
    with _lock_file(folder / f"{name}.lock", name=name, deadline=deadline):
        lease = Lease(name=name, holder=uuid.uuid4().hex, actor=actor, place=_read_place(folder), until=0.0)
        claim = _Claim(store, lease, ttl_s, clock)
        etag = _acquire(claim, deadline=deadline)
        with _renew(claim, etag):
            yield


def read_lease(store: Store, name: str) -> tuple[Lease, str] | None:
    """The lease on a model and its ETag, `None` when there never was one. Raises `RegistryError` on damage."""
    try:
        content, stored = store.get(lease_key(name))
    except NotFoundError:
        return None
    try:
        return Lease.model_validate_json(content), stored.etag
    except ValidationError as fault:
        raise RegistryError(
            f"{store.url}/{lease_key(name)}: damaged or from a newer release; nobody trains {name}: delete it"
        ) from fault


def _acquire(claim: _Claim, *, deadline: float) -> str:
    """The ETag of the lease that was won."""
    while True:
        found = read_lease(claim.store, claim.lease.name)
        if found is None or _is_over(found[0], claim):
            etag = claim.write(etag=found[1] if found else None, ttl_s=claim.ttl_s)
            if etag is not None:
                return etag
            continue
        if time.monotonic() >= deadline:
            raise RegistryError(_describe_holder(found[0], claim))
        time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))


def _is_over(lease: Lease, claim: _Claim) -> bool:
    """Run out, or left by a process of this very folder: whoever has the folder's lock knows that it is dead."""
    return lease.until <= claim.clock() or lease.place == claim.lease.place


def _describe_holder(lease: Lease, claim: _Claim) -> str:
    until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(lease.until))
    return (
        f"{claim.store.url}/{claim.key}: {lease.actor} is training {lease.name} elsewhere, the lease ends at {until} "
        "if it is not renewed; run it again later, or let it wait with --wait MINUTES"
    )


@contextlib.contextmanager
def _renew(claim: _Claim, etag: str) -> Iterator[None]:
    """Renew every third of its time; in the end let it run out. A lease that was lost is not fought for."""
    ended = threading.Event()
    held: list[str | None] = [etag]

    def renew() -> None:
        while not ended.wait(claim.ttl_s / 3) and held[0] is not None:
            with contextlib.suppress(StoreError, RegistryError):  # the store may be back the next time
                held[0] = claim.write_again(etag=held[0], ttl_s=claim.ttl_s)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if held[0] is not None:
            with contextlib.suppress(StoreError, RegistryError):  # it runs out by itself
                claim.write_again(etag=held[0], ttl_s=0.0)


@contextlib.contextmanager
def _lock_file(file: Path, *, name: str, deadline: float) -> Iterator[None]:
    """Hold a file's lock, which the kernel takes back when this process ends in whatever way."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as fault:
                if time.monotonic() >= deadline:
                    raise RegistryError(
                        f"{file}: another process on this machine is training {name}; "
                        "wait for it, or let this one wait with --wait MINUTES"
                    ) from fault
                time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))
        yield


def _read_place(folder: Path) -> str:
    """The random id of a folder of runs, made at its first use."""
    file = folder / "place"
    if not file.is_file():
        write_atomic(file, uuid.uuid4().hex.encode())
    return file.read_text("ascii")
