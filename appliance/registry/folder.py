"""A folder on disk against a manifest: the check before publishing, after pulling and at any time between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from appliance.digest import digest_file, list_files
from appliance.errors import RegistryError
from appliance.manifest import FileEntry, Manifest
from appliance.registry.layout import MANIFEST

_SHOWN_FAULTS = 5


def verify_folder(folder: Path, manifest: Manifest, *, allow_others: bool = False) -> None:
    """Check every file against the manifest: size, SHA-256, no links, and no files beside it unless allowed.

    Hidden files do not count. Raises `RegistryError` that names what is wrong.
    """
    faults = [fault for entry in manifest.files for fault in _find_faults(folder, entry)]
    if not allow_others:
        expected = {entry.path for entry in manifest.files} | {MANIFEST}
        faults += [f"{name}: does not belong to this version" for name in list_files(folder) if name not in expected]
    if faults:
        more = f" and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
        listed = "; ".join(faults[:_SHOWN_FAULTS])
        raise RegistryError(
            f"{folder}: not the files of {manifest.name} as recorded: {listed}{more}; make or pull them again"
        )


def _find_faults(folder: Path, entry: FileEntry) -> Iterator[str]:
    path = folder / entry.path
    if path.is_symlink() or any(p.is_symlink() for p in path.parents if p.is_relative_to(folder) and p != folder):
        yield f"{entry.path}: is a link"
    elif not path.is_file():
        yield f"{entry.path}: missing"
    elif path.stat().st_size != entry.size:
        yield f"{entry.path}: {path.stat().st_size} bytes, expected {entry.size}"
    elif (found := digest_file(path)) != entry.sha256:
        yield f"{entry.path}: SHA-256 {found[:12]}..., expected {entry.sha256[:12]}..."
