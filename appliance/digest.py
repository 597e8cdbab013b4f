"""SHA-256 of bytes, files and folders: the one notion of identity in the product.

Everything that is stored, compared or cached is named by the digest of its content. Timestamps,
paths on this machine and file modes never take part.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK = 1 << 20
_SETTLED_NS = 2 * 10**9
State = tuple[tuple[str, int, int, int], ...]


def digest_bytes(content: bytes) -> str:
    """The SHA-256 of `content`, 64 lower-case hex digits."""
    return hashlib.sha256(content).hexdigest()


def digest_file(path: Path) -> str:
    """The SHA-256 of a file's content, read in 1 MiB pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """`value` as UTF-8 JSON with sorted keys and no spaces: equal values, equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest_json(value: Any) -> str:
    """The SHA-256 of the canonical JSON of `value`."""
    return digest_bytes(canonical_json(value))


def list_files(folder: Path) -> list[str]:
    """The files below `folder` as sorted POSIX paths; hidden files and `*.tmp` are left out."""
    found = (p for p in folder.rglob("*") if p.is_file())
    names = (p.relative_to(folder).as_posix() for p in found)
    return sorted(n for n in names if not n.endswith(".tmp") and not any(part.startswith(".") for part in n.split("/")))


def digest_folder(folder: Path) -> str:
    """The digest of a folder: of its sorted (relative path, SHA-256) pairs."""
    return digest_json([[name, digest_file(folder / name)] for name in list_files(folder)])


def stat_files(path: Path) -> State | None:
    """Name, size, inode and time of change of a file or of a folder's files: equal states, equal bytes.

    `None` when one changed in the last two seconds: it may change again within the clock's own step.
    """
    files = (
        [(n, path / n) for n in list_files(path)] if path.is_dir() else [(path.name, path)] if path.is_file() else []
    )
    found = [(name, file.stat()) for name, file in files]
    if any(s.st_ctime_ns > time.time_ns() - _SETTLED_NS for _, s in found):
        return None
    return tuple((name, s.st_size, s.st_ino, s.st_ctime_ns) for name, s in found)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old bytes or the new ones, never a part. Raises `OSError`."""
    with stage_file(path) as stream:
        stream.write(content)


@contextlib.contextmanager
def stage_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is at `path`, and durable, from the end of the block on; where that raises, nothing is.

    Temporary name in the same folder, fsync, rename, fsync of the folder. The name is by chance: in two containers
    that share the folder, two processes have one number. Raises `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_path(path.parent)


def rename_whole(staged: Path, folder: Path) -> None:
    """Give a folder that is complete the name that is trusted, which a power cut leaves to all of it or to none."""
    fsync_all(staged)
    staged.rename(folder)
    fsync_path(folder.parent)


def fsync_all(folder: Path) -> None:
    """Make every file and every name below `folder` durable."""
    for path in (folder, *folder.rglob("*")):
        fsync_path(path)


def fsync_path(path: Path) -> None:
    """Make a file durable, or the names in a folder (a rename survives a power cut only after this)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
