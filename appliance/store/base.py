"""The contract that every store keeps; one conformance suite tests them all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from appliance.errors import StoreError


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What a store knows of one key. `etag` is opaque; `list` may leave it empty, nothing else may.

    `modified` is when it was written, in seconds since the epoch by the store's clock; `list` and `head` tell it.
    """

    key: str
    size: int
    etag: str
    modified: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Upload:
    """A write that was begun and not finished; `token` is its name in the store, `size` what it holds by now.

    `begun` is in seconds since the epoch by the store's clock.
    """

    key: str
    token: str
    size: int
    begun: float


class Store(Protocol):
    """Keys are POSIX paths below the store's prefix.

    Every method raises `StoreError` (unreachable, denied, no space) with the endpoint or folder in
    its message; a missing key is `NotFoundError`; a lost condition is `PreconditionFailedError`.
    """

    @property
    def url(self) -> str:
        """Where the store is, without credentials."""
        ...

    def put(
        self, key: str, content: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> StoredObject:
        """Write the whole object at once; with a condition, write it only if the condition holds."""
        ...

    def put_file(self, key: str, path: Path, *, sha256: str, max_age_s: float = math.inf) -> StoredObject:
        """Create `key` from a file, verified against `sha256` by the store; an equal object that exists is success.

        One that was written `max_age_s` ago or before is written again, as an object of now that no `delete` of
        the old one can take. A different object under `key` is damage: never overwritten, `StoreError` names it.
        """
        ...

    def get(self, key: str) -> tuple[bytes, StoredObject]:
        """The whole object and its ETag."""
        ...

    def get_file(self, key: str, path: Path, *, sha256: str | None) -> None:
        """Fetch to `path` by a temporary name; the file appears only when its SHA-256 is right.

        `None` is for a caller that knows no digest; then the transfer's own checks must do.
        """
        ...

    def digest(self, key: str) -> tuple[str, StoredObject]:
        """The SHA-256 of the whole object and its ETag; its bytes are read in pieces and kept nowhere."""
        ...

    def head(self, key: str) -> StoredObject | None:
        """Size, ETag and time, or `None` when there is no such key."""
        ...

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Every object whose key starts with `prefix`, in key order."""
        ...

    def delete(self, key: str, *, only: StoredObject | None = None) -> None:
        """Remove `key`; removing what is not there is success.

        With `only`, as `list` told it, an object that was written since then stays: `PreconditionFailedError`.
        """
        ...

    def list_uploads(self) -> Iterator[Upload]:
        """Every write that was begun and not finished, by whomever, also those that are going on."""
        ...

    def abort_upload(self, upload: Upload) -> None:
        """Give back what an unfinished write holds; one that is finished or gone is success."""
        ...

    def clock(self) -> float:
        """Now, in seconds since the epoch by the clock that dates the objects."""
        ...


def check_key(key: str) -> str:
    """`key` itself, when it is a plain relative path outside the stores' own dot-names. Raises `StoreError`."""
    parts = key.split("/")
    if key.startswith(".") or "\\" in key or not key.isprintable() or any(p in ("", ".", "..") for p in parts):
        raise StoreError(f"store key {key!r}: expected a plain relative path such as blobs/sha256/ab/0123")
    return key
