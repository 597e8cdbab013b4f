"""The one way from a store URL to a store.

Two kinds are opened, `s3://bucket/prefix` and `file:///folder`. Endpoint, region and credentials
never stand in the URL: they follow the AWS conventions (AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, profiles, instance roles), which boto3 reads itself.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from appliance.errors import StoreError
from appliance.store.base import Store, check_key

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_EXPECTED = "expected s3://bucket/prefix or file:///absolute/folder"


def open_store(url: str) -> Store:
    """The store behind `url`; nothing is asked of it yet. Raises `StoreError` on a URL it cannot use."""
    try:
        parts = urlsplit(url)
    except ValueError as fault:
        raise StoreError(f"store URL {url!r}: {fault}; {_EXPECTED}") from fault
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise StoreError(f"store URL {_redact(parts)!r}: no credentials, '?' or '#' in a store URL; {_EXPECTED}")
    if parts.scheme == "file":
        return _open_local(url, parts)
    if parts.scheme == "s3":
        return _open_s3(url, parts)
    if not parts.scheme:
        raise StoreError(f"store URL {url!r}: no scheme; {_EXPECTED}, here {Path(url or '.').absolute().as_uri()}")
    raise StoreError(f"store URL {url!r}: unknown scheme {parts.scheme!r}; {_EXPECTED}")


def find_folder(store: Store) -> Path | None:
    """The folder of a store in one, made or not; `None` for a bucket."""
    from appliance.store.local import LocalStore

    return store.root if isinstance(store, LocalStore) else None


def _open_local(url: str, parts: SplitResult) -> Store:
    from appliance.store.local import LocalStore

    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or not path.strip("/") or "\0" in path:
        raise StoreError(f"store URL {url!r}: not an absolute folder; {_EXPECTED} (three slashes)")
    folder = Path(path)
    there = next(p for p in (folder, *folder.parents) if os.path.exists(p))  # noqa: PTH110 - never raises
    if not os.path.isdir(there):  # noqa: PTH112 - never raises
        raise StoreError(f"store URL {url!r}: {there} is a file, expected a folder; mend the address")
    return LocalStore(folder)


def _open_s3(url: str, parts: SplitResult) -> Store:
    from appliance.store.s3 import connect_s3

    prefix = parts.path.strip("/")
    if not _BUCKET.fullmatch(parts.netloc):
        raise StoreError(f"store URL {url!r}: {parts.netloc!r} is not a bucket name; {_EXPECTED}")
    if prefix:
        check_key(prefix)
    return connect_s3(bucket=parts.netloc, prefix=prefix)


def _redact(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}{parts.path}"
