"""Publication: content first, the manifest last, so that a version is visible only when it is complete.

Interrupted anywhere, it leaves at most blobs that nothing points at; the same call finishes the job
and changes nothing that is visible already.
"""

from __future__ import annotations

from pathlib import Path

from appliance.errors import PreconditionFailedError, RegistryError
from appliance.manifest import FileEntry, Manifest
from appliance.registry.folder import verify_folder
from appliance.registry.layout import blob_key, check_format, manifest_key
from appliance.registry.listing import check_files
from appliance.registry.transfer import transfer_files
from appliance.store import Store


def publish(store: Store, *, manifest: Manifest, folder: Path) -> str:
    """Make the files of `folder` that `manifest` names a version, and return it; twice is once.

    Raises `RegistryError` when the files are not those of the manifest, or another manifest has the
    version already, and `StoreError` when the store refuses.
    """
    key = manifest_key(manifest.name, manifest.version)
    check_files(manifest, source=f"manifest of {manifest.name}")
    verify_folder(folder, manifest, allow_others=True)
    check_format(store, create=True)
    transfer_files(
        manifest.files,
        lambda entry: _put_blob(store, folder, entry),
        label=f"publishing {manifest.name}",
    )
    check_blobs(store, manifest)
    _commit(store, key, manifest.encode())
    return manifest.version


def check_blobs(store: Store, manifest: Manifest) -> None:
    """Raise `RegistryError` when a blob of the manifest is missing or has another size."""
    for entry in manifest.files:
        found = store.head(blob_key(entry.sha256))
        if found is None or found.size != entry.size:
            state = "is missing" if found is None else f"has {found.size} bytes, expected {entry.size}"
            raise RegistryError(f"{store.url}/{blob_key(entry.sha256)} ({entry.path}) {state}; publish it again")


def _put_blob(store: Store, folder: Path, entry: FileEntry) -> None:
    store.put_file(blob_key(entry.sha256), folder / entry.path, sha256=entry.sha256)


def _commit(store: Store, key: str, content: bytes) -> None:
    try:
        store.put(key, content, if_none_match=True)
    except PreconditionFailedError as fault:
        if store.get(key)[0] != content:
            raise RegistryError(f"{store.url}/{key}: another manifest has this version; nothing was changed") from fault
