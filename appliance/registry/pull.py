"""Pulling: a reference becomes a folder in which every byte was verified, or no folder at all.

Paths in a manifest are untrusted. Files arrive in a hidden folder beside the target, which takes its
place when all are right; what other programs see is a whole version, the old one or the new one, or nothing.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from appliance.digest import fsync_path, write_atomic
from appliance.errors import NotFoundError, RegistryError, StoreError
from appliance.manifest import FileEntry, Manifest, decode_manifest
from appliance.registry.folder import verify_folder
from appliance.registry.layout import MANIFEST, blob_key
from appliance.registry.listing import read_manifest
from appliance.registry.refs import find_version
from appliance.registry.transfer import transfer_files
from appliance.store import Store

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE, see renameat2(2)


def pull(store: Store, reference: str, folder: Path, *, note: Callable[[str], None] = lambda _: None) -> Manifest:
    """Fetch `name@alias`, `name@version` or `name` into `folder`, with its `manifest.json`.

    A folder that holds exactly this version is verified and left as it is. One that holds another version of the
    name, or this one damaged, and nothing else, is replaced: `note` is told what was there. Raises
    `RegistryError` on an unknown reference, damage or a folder with other content, `StoreError` on store and disk.
    """
    name, version = find_version(store, reference)
    content, manifest = read_manifest(store, name, version)
    try:
        if not folder.exists() or _is_empty(folder):
            _fetch(store, manifest, content, folder=folder, held=None)
            return manifest
        held = _read_held(folder, manifest)
        fault = _find_fault(folder, content, manifest, held=held)
        if fault:
            _fetch(store, manifest, content, folder=folder, held=held)
            note(fault)
    except OSError as fault:
        raise StoreError(f"{folder}: {fault.strerror}; look at the disk and pull again") from fault
    return manifest


def _is_empty(folder: Path) -> bool:
    if not folder.is_dir():
        raise RegistryError(f"{folder}: is a file; choose a folder to pull into")
    return next(folder.iterdir(), None) is None


def _read_held(folder: Path, manifest: Manifest) -> Manifest:
    """The version of the same name that an earlier pull put there. Raises `RegistryError` where there is none."""
    file = folder / MANIFEST
    try:
        held = decode_manifest(file.read_bytes(), source=str(file)) if file.is_file() else None
    except RegistryError:
        held = None
    if held is None or held.name != manifest.name:
        message = f"{folder}: holds something other than {_label(manifest)}; choose an empty folder"
        raise RegistryError(message)
    return held


def _find_fault(folder: Path, content: bytes, manifest: Manifest, *, held: Manifest) -> str:
    """Why the folder is not this version, empty where it is."""
    if (folder / MANIFEST).read_bytes() != content:
        _check_own(folder, held)
        return f"{folder}: {_label(held)} was here, now it is {_label(manifest)}"
    try:
        verify_folder(folder, manifest)
    except RegistryError as fault:
        _check_own(folder, held)
        return f"{str(fault).rpartition(';')[0]}; fetched again"
    return ""


def _check_own(folder: Path, held: Manifest) -> None:
    """Refuse a folder with a file that its version did not bring: it would be lost."""
    own = {entry.path for entry in held.files} | {MANIFEST}
    found = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    others = sorted({p.relative_to(folder).as_posix() for p in found} - own)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        message = f"{folder}: holds {others[0]}{more}, which is not of {_label(held)}"
        raise RegistryError(f"{message}; move it away, or choose an empty folder")


def _label(manifest: Manifest) -> str:
    return f"{manifest.name}@{manifest.version}"


def _fetch(store: Store, manifest: Manifest, content: bytes, *, folder: Path, held: Manifest | None) -> None:
    """The verified version in the place of `folder`, in which there is nothing, or the version `held`."""
    place = folder.resolve()
    place.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}.", suffix=".partial"))
    try:
        transfer_files(manifest.files, lambda e: _get_file(store, e, staged), label=f"pulling {manifest.name}")
        write_atomic(staged / MANIFEST, content)
        staged.chmod(place.stat().st_mode & 0o777 if held else 0o755)
        if held is None:
            staged.replace(place)
        else:
            _check_own(place, held)
            _swap(staged, place)
        fsync_path(place.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _swap(new: Path, old: Path) -> None:
    """Give two folders each other's name, at once where the file system can."""
    if _exchange(new, old):
        return
    aside = new.with_suffix(".replaced")
    old.replace(aside)
    try:
        new.replace(old)
    finally:
        aside.replace(old if new.exists() else new)


def _exchange(one: Path, other: Path) -> bool:
    """renameat2(2); whether this system and file system have it."""
    if sys.platform != "linux":
        return False
    import ctypes

    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def read_file(store: Store, manifest: Manifest, path: str) -> bytes | None:
    """One verified file of a version, `None` where it has none of this name; damage raises as in a pull."""
    entry = next((e for e in manifest.files if e.path == path), None)
    if entry is None:
        return None
    with tempfile.TemporaryDirectory(prefix="appliance-") as scratch:
        _get_file(store, entry, Path(scratch))
        return (Path(scratch) / path).read_bytes()


def _get_file(store: Store, entry: FileEntry, folder: Path) -> None:
    """One verified file; a missing blob is damage of the version, not an unknown name."""
    key, path = blob_key(entry.sha256), folder / entry.path
    try:
        store.get_file(key, path, sha256=entry.sha256)
    except NotFoundError as fault:
        raise RegistryError(
            f"{store.url}/{key}: missing, it is {entry.path} of this version; publish it again"
        ) from fault
    if path.stat().st_size != entry.size:
        raise RegistryError(
            f"{store.url}/{key}: {path.stat().st_size} bytes, the manifest says {entry.size}; do not use it"
        )
