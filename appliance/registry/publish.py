"""Publication: content first, the manifest last, so that a version is visible only when it is complete.

Interrupted anywhere, it leaves at most blobs that nothing points at; the same call finishes the job
and changes nothing that is visible already. A collector may be at work: what is relied on is made young
first, and looked at again when it is visible.
"""

from __future__ import annotations

from pathlib import Path

from appliance.errors import PreconditionFailedError, RegistryError
from appliance.manifest import FileEntry, Manifest
from appliance.registry.folder import verify_folder
from appliance.registry.layout import blob_key, check_format, manifest_key
from appliance.registry.listing import check_files
from appliance.registry.transfer import transfer_files
from appliance.store import Store, StoredObject

FRESH_S = 86_400.0


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
    _settle_blobs(store, manifest, folder)
    _commit(store, key, manifest.encode())
    _settle_blobs(store, manifest, folder)
    return manifest.version


def check_blobs(store: Store, manifest: Manifest) -> None:
    """Raise `RegistryError` when a blob of the manifest is missing or has another size."""
    for entry in manifest.files:
        if _find_blob(store, entry) is None:
            raise RegistryError(f"{store.url}/{blob_key(entry.sha256)} ({entry.path}) is missing; publish it again")


def _find_blob(store: Store, entry: FileEntry) -> StoredObject | None:
    """A blob, `None` when it is not there. Raises `RegistryError` when it has another size."""
    found = store.head(blob_key(entry.sha256))
    if found is not None and found.size != entry.size:
        state = f"has {found.size} bytes, expected {entry.size}"
        raise RegistryError(f"{store.url}/{blob_key(entry.sha256)} ({entry.path}) {state}; publish it again")
    return found


def _put_blob(store: Store, folder: Path, entry: FileEntry) -> None:
    """An old blob may be planned for collection: written again, it is another object, and no collector's business."""
    store.put_file(blob_key(entry.sha256), folder / entry.path, sha256=entry.sha256, max_age_s=FRESH_S)


def _settle_blobs(store: Store, manifest: Manifest, folder: Path) -> None:
    """Put back what was collected, and write again what became old, while this publisher slept.

    After the manifest this is final: who marks from now on sees it, and who marked before meant other objects.
    """
    now = store.clock()

    def settle(entry: FileEntry) -> None:
        found = _find_blob(store, entry)
        if found is None or now - (found.modified or 0.0) >= FRESH_S:
            _put_blob(store, folder, entry)

    transfer_files(manifest.files, settle, label=f"checking {manifest.name}")


def _commit(store: Store, key: str, content: bytes) -> None:
    try:
        store.put(key, content, if_none_match=True)
    except PreconditionFailedError as fault:
        if store.get(key)[0] != content:
            raise RegistryError(f"{store.url}/{key}: another manifest has this version; nothing was changed") from fault
