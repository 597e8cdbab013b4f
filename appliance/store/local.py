"""A store in a folder: the same laws as S3, kept by the file system.

Creation is a hard link from a finished temporary file, which has exactly one winner among any
number of processes. Replacement holds a lock file. ETags are the SHA-256 of the content, so that
`head` reads the object and is a verification. A file system without hard links is refused.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from appliance.digest import digest_bytes, digest_file, fsync_path
from appliance.errors import NotFoundError, PreconditionFailedError, StoreError
from appliance.store.base import StoredObject, Upload, check_key
from appliance.store.fetching import describe_disk_fault, write_verified

_CHUNK = 1 << 20
_TEMPORARY, _LOCK = ".tmp", ".lock"


@dataclass(frozen=True, slots=True)
class LocalStore:
    """Objects as files below `root`, which the first write creates."""

    root: Path

    @property
    def url(self) -> str:
        """`file:///root`."""
        return self.root.as_uri()

    def put(
        self, key: str, content: bytes, *, if_none_match: bool = False, if_match: str | None = None
    ) -> StoredObject:
        """See `Store.put`."""
        target = self._target(key)
        made = StoredObject(key, len(content), digest_bytes(content))
        with self._faults(key), self._temporary((content,)) as temporary:
            if if_none_match:
                self._create(temporary, target, key)
            else:
                self._replace(temporary, target, key=key, if_match=if_match)
        return made

    def put_file(self, key: str, path: Path, *, sha256: str, max_age_s: float = math.inf) -> StoredObject:
        """See `Store.put_file`."""
        target = self._target(key)
        found = self._find_equal(key, path, sha256=sha256)
        if found is None or self._is_aged(found, max_age_s):
            with self._faults(key), path.open("rb") as source, self._temporary(_read(source.fileno())) as temporary:
                read = digest_file(temporary)
                if read != sha256:
                    raise StoreError(f"{path}: SHA-256 is {read}, expected {sha256}; the file changed, make it again")
                with contextlib.suppress(PreconditionFailedError):
                    if found is None:
                        self._create(temporary, target, key)
                    else:
                        self._replace(temporary, target, key=key, if_match=None)
            found = self._find_equal(key, path, sha256=sha256)
        if found is None:
            raise StoreError(f"{self.url}/{key}: vanished after it was written; look for a clean-up job on the folder")
        return found

    def get(self, key: str) -> tuple[bytes, StoredObject]:
        """See `Store.get`."""
        with self._faults(key):
            content = self._target(key).read_bytes()
        return content, StoredObject(key, len(content), digest_bytes(content))

    def get_file(self, key: str, path: Path, *, sha256: str | None) -> None:
        """See `Store.get_file`."""
        with self._faults(key), self._target(key).open("rb") as stream:
            write_verified(_read(stream.fileno()), path, sha256=sha256, subject=f"{self.url}/{key}")

    def digest(self, key: str) -> tuple[str, StoredObject]:
        """See `Store.digest`."""
        with self._faults(key), self._target(key).open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            return sha256, StoredObject(key, stream.tell(), sha256)

    def head(self, key: str) -> StoredObject | None:
        """See `Store.head`; reads the object, because the ETag is its digest."""
        try:
            with self._faults(key), self._target(key).open("rb"):
                status = self._target(key).stat()
                return StoredObject(key, status.st_size, digest_file(self._target(key)), status.st_mtime)
        except NotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """See `Store.list`; ETags are left empty, since nothing is read."""
        folder = self.root / prefix.rpartition("/")[0]
        with self._faults(prefix):
            found = (p.relative_to(self.root).as_posix() for p in folder.rglob("*") if p.is_file())
            keys = sorted(k for k in found if k.startswith(prefix) and k[0] != ".") if folder.is_dir() else []
        for key in keys:
            with contextlib.suppress(FileNotFoundError):
                status = (self.root / key).stat()
                yield StoredObject(key, status.st_size, "", status.st_mtime)

    def delete(self, key: str, *, only: StoredObject | None = None) -> None:
        """See `Store.delete`; writers of the same key wait meanwhile, so that the condition is exact."""
        target = self._target(key)
        with self._faults(key):
            if not target.exists():
                return
            with self._locked():
                if only is not None and target.exists() and not _is_same(target, only):
                    raise PreconditionFailedError(f"{self.url}/{key}: was written again meanwhile")
                target.unlink(missing_ok=True)
                fsync_path(target.parent)

    def list_uploads(self) -> Iterator[Upload]:
        """See `Store.list_uploads`; here they are temporary files."""
        folder = self.root / _TEMPORARY
        with self._faults(_TEMPORARY):
            names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                status = (folder / name).stat()
                yield Upload(f"{_TEMPORARY}/{name}", name, status.st_size, status.st_mtime)

    def abort_upload(self, upload: Upload) -> None:
        """See `Store.abort_upload`."""
        check_key(upload.token)
        with self._faults(upload.key):
            (self.root / _TEMPORARY / upload.token).unlink(missing_ok=True)

    def clock(self) -> float:
        """See `Store.clock`; asked of the file system where it may be written to, since it may be another machine's."""
        if not os.access(self.root, os.W_OK):
            return time.time()
        with self._faults(_TEMPORARY), self._temporary(()) as temporary:
            return temporary.stat().st_mtime

    def _target(self, key: str) -> Path:
        return self.root / check_key(key)

    def _create(self, temporary: Path, target: Path, key: str) -> None:
        _make_folder(target.parent)
        try:
            os.link(temporary, target)
        except FileExistsError as fault:
            raise PreconditionFailedError(f"{self.url}/{key}: exists already") from fault
        except OSError as fault:
            if fault.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
            raise StoreError(f"{self.url}: this file system has no hard links; put the store on another one") from fault
        fsync_path(target.parent)

    def _replace(self, temporary: Path, target: Path, *, key: str, if_match: str | None) -> None:
        _make_folder(target.parent)
        with self._locked():
            if if_match is not None and (not target.is_file() or digest_file(target) != if_match):
                raise PreconditionFailedError(f"{self.url}/{key}: was changed by another writer")
            temporary.replace(target)
            fsync_path(target.parent)

    def _find_equal(self, key: str, path: Path, *, sha256: str) -> StoredObject | None:
        """The object under `key` if it is this file, `None` if absent. Raises `StoreError` if it is another."""
        found = self.head(key)
        size = path.stat().st_size if found else 0
        if found is not None and (found.size, found.etag) != (size, sha256):
            raise StoreError(
                f"{self.url}/{key}: damaged, it holds {found.size} bytes, SHA-256 {found.etag}, "
                f"expected {size} bytes, {sha256}; remove it and publish again"
            )
        return found

    def _is_aged(self, found: StoredObject, max_age_s: float) -> bool:
        return max_age_s < math.inf and self.clock() - (found.modified or 0.0) >= max_age_s

    @contextlib.contextmanager
    def _temporary(self, chunks: Iterable[bytes]) -> Iterator[Path]:
        folder = self.root / _TEMPORARY
        _make_folder(folder)
        descriptor, name = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                for chunk in chunks:
                    stream.write(chunk)
                stream.flush()
                os.fchmod(descriptor, 0o644)
                os.fsync(descriptor)
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.root / _LOCK).open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _faults(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as fault:
            raise NotFoundError(f"{fault.filename or f'{self.url}/{key}'}: no such file or object") from fault
        except OSError as fault:
            raise StoreError(describe_disk_fault(fault, f"{self.url}/{key}")) from fault


def _read(descriptor: int) -> Iterator[bytes]:
    while chunk := os.read(descriptor, _CHUNK):
        yield chunk


def _is_same(target: Path, listed: StoredObject) -> bool:
    """Whether a file is the one that was listed: every write makes a new one, with a time of its own."""
    status = target.stat()
    return (status.st_size, status.st_mtime) == (listed.size, listed.modified)


def _make_folder(folder: Path) -> None:
    """Create `folder` and its parents so that their names survive a power cut."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    for each in reversed(missing):
        try:
            each.mkdir(exist_ok=True)
        except FileNotFoundError as fault:  # its parent is there: the file system makes no folders, as /proc
            raise StoreError(f"{each}: no folder can be made here; choose another one for the store") from fault
        fsync_path(each.parent)
