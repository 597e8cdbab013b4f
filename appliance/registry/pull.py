"""Pulling: a reference becomes a folder in which every byte was verified, or no folder at all.

Paths in a manifest are untrusted. Files arrive in a hidden folder beside the target, which is
renamed when all are right; what other programs see is the whole version or nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from appliance.digest import fsync_folder, write_atomic
from appliance.errors import NotFoundError, RegistryError, StoreError
from appliance.manifest import FileEntry, Manifest
from appliance.registry.folder import verify_folder
from appliance.registry.layout import MANIFEST, blob_key
from appliance.registry.listing import read_manifest
from appliance.registry.refs import find_version
from appliance.registry.transfer import transfer_files
from appliance.store import Store


def pull(store: Store, reference: str, folder: Path) -> Manifest:
    """Fetch `name@alias`, `name@version` or `name` into `folder`, with its `manifest.json`.

    A folder that holds exactly this version is verified and left as it is. Raises `RegistryError`
    on an unknown reference, damage or a folder with other content, `StoreError` on store and disk.
    """
    name, version = find_version(store, reference)
    content, manifest = read_manifest(store, name, version)
    try:
        if folder.exists() and not _is_empty(folder):
            _check_same(folder, content, manifest, label=f"{name}@{version}")
        else:
            _fetch(store, manifest, content, folder=folder)
    except OSError as fault:
        raise StoreError(f"{folder}: {fault.strerror}; look at the disk and pull again") from fault
    return manifest


def _is_empty(folder: Path) -> bool:
    if not folder.is_dir():
        raise RegistryError(f"{folder}: is a file; choose a folder to pull into")
    return next(folder.iterdir(), None) is None


def _check_same(folder: Path, content: bytes, manifest: Manifest, *, label: str) -> None:
    held = folder / MANIFEST
    if not held.is_file() or held.read_bytes() != content:
        raise RegistryError(f"{folder}: holds something other than {label}; choose an empty folder")
    verify_folder(folder, manifest)


def _fetch(store: Store, manifest: Manifest, content: bytes, *, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
    try:
        transfer_files(manifest.files, lambda e: _get_file(store, e, staged), label=f"pulling {manifest.name}")
        write_atomic(staged / MANIFEST, content)
        staged.chmod(0o755)
        staged.replace(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


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
