"""How fetched bytes become a file: hidden temporary name, running SHA-256, fsync, rename.

A name that a reader can see always has the right bytes behind it. Also the words for local disk
faults, which every store can meet.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from appliance.digest import stage_file
from appliance.errors import StoreError, is_denied, is_disk_full


def write_verified(chunks: Iterable[bytes], path: Path, *, sha256: str | None, subject: str) -> None:
    """Write `chunks` to `path` (mode 0644) if their SHA-256 is `sha256` (`None`: unknown); else leave nothing.

    Raises `StoreError` naming `subject` on other bytes, and `path` on a disk fault.
    """
    digest = hashlib.sha256()
    try:
        with stage_file(path) as stream:
            for chunk in chunks:
                digest.update(chunk)
                stream.write(chunk)
            found = digest.hexdigest()
            if sha256 is not None and found != sha256:
                raise StoreError(
                    f"{subject}: damaged, SHA-256 is {found}, expected {sha256}; "
                    "remove it and run `appliance publish` again"
                )
            os.fchmod(stream.fileno(), 0o644)
    except OSError as fault:
        raise StoreError(describe_disk_fault(fault, str(path))) from fault


def describe_disk_fault(fault: OSError, subject: str) -> str:
    """One line for an operating system error: what happened to `subject` and what to do."""
    if is_disk_full(fault):
        return f"{subject}: no space left on the disk ({fault.strerror}); free some and run the same command again"
    if is_denied(fault):
        return f"{subject}: permission denied ({fault.strerror}); give this user write access or choose another folder"
    return f"{subject}: {fault.strerror or fault}; look at the disk and the path, then run the same command again"
