"""Tombstones: a version that is collected is marked first, so that no alias can move to it meanwhile.

A promoter writes its record of the history, then looks for a tombstone, then moves the alias. A collector
writes the tombstone, then reads the history, then removes the manifest. So at least one of them sees the
other. Whoever finds that the version is wanted after all writes its manifest anew before the tombstone goes:
a collector that slept meanwhile removes nothing, because the manifest is no longer the one that it listed.
A tombstone stays for ever: it tells a version that was collected from one that was lost.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from appliance.digest import canonical_json, digest_bytes
from appliance.errors import NotFoundError
from appliance.registry.layout import manifest_key, tombstone_key
from appliance.store import Store


class Tombstone(BaseModel):
    """Which version is collected, and since when (UTC)."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    schema_version: Literal[1] = Field(1, alias="schema")
    name: str
    version: str = Field(alias="vid")
    at: str

    def encode(self) -> bytes:
        """The canonical bytes that are stored."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))


def bury(store: Store, *, name: str, version: str, at: str) -> None:
    """Say that a version is about to be collected; from now on no promotion begins to move an alias to it."""
    store.put(tombstone_key(name, version), Tombstone(name=name, version=version, at=at).encode())


def is_collected(store: Store, name: str, version: str) -> bool:
    """Whether a version was collected or is about to be; one that was published again since then is not."""
    tombstone = store.head(tombstone_key(name, version))
    if tombstone is None:
        return False
    manifest = store.head(manifest_key(name, version))
    return manifest is None or (manifest.modified or 0.0) < (tombstone.modified or 0.0)


def revive(store: Store, *, name: str, version: str) -> None:
    """Take a version back from its grave: the manifest as an object of now, then no tombstone."""
    key = manifest_key(name, version)
    try:
        content, _ = store.get(key)
    except NotFoundError:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "manifest.json"
        file.write_bytes(content)
        store.put_file(key, file, sha256=digest_bytes(content), max_age_s=0.0)
    store.delete(tombstone_key(name, version))
