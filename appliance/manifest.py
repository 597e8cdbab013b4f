"""The manifest: the frozen record of one version, and the commit point of its publication.

A version exists when its manifest exists. Everything a consumer needs to verify the bytes and
everything a maintainer needs to retrain them is in here; nothing in it names a machine.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from appliance.digest import canonical_json, digest_bytes
from appliance.errors import RegistryError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Outcome = Literal["ship", "hold", "inconclusive", "reject"]


def check_relative_path(path: str) -> str:
    """Refuse a path that could leave the folder it is pulled into. Raises `ValueError`."""
    parts = path.split("/")
    if not path or path.startswith("/") or "\\" in path or "\0" in path or any(p in ("", ".", "..") for p in parts):
        message = f"unsafe path {path!r}: expected a plain relative path"
        raise ValueError(message)
    return str(PurePosixPath(path))


class FileEntry(BaseModel):
    """One file of the artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Annotated[str, AfterValidator(check_relative_path)]
    size: int = Field(ge=0)
    sha256: Sha256


class Manifest(BaseModel):
    """What was made, from what, by what, and what it proved. `schema` 1 loads for ever."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = Field(1, alias="schema")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    kind: Literal["adapter", "model"]
    run_key: Sha256
    created_at: str = Field(description="UTC time of the dataset commit, 2026-01-31T12:00:00Z")
    git_commit: str | None = None
    files: tuple[FileEntry, ...] = Field(min_length=1)
    recipe: dict[str, Any]
    recipe_digest: Sha256
    data_digest: Sha256
    split_digest: Sha256
    base: dict[str, str]
    verdict: Outcome
    metrics: dict[str, Any]
    training: dict[str, Any]
    versions: dict[str, str]
    parent: str | None = None

    def encode(self) -> bytes:
        """The canonical bytes that are stored; equal manifests have equal bytes."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))

    @property
    def sha256(self) -> str:
        """The digest of the canonical bytes."""
        return digest_bytes(self.encode())

    @property
    def version(self) -> str:
        """`<commit time>-<git12>-<manifest sha12>`: sortable, without a counter to race for."""
        return f"{begin_version(self.created_at, self.git_commit)}-{self.sha256[:12]}"


def begin_version(created_at: str, git_commit: str | None) -> str:
    """`<commit time>-<git12>`: the beginning of a version, known before its manifest is."""
    time, commit = (c for c in created_at if c.isdigit()), (c for c in git_commit or "0" * 12 if c.isalnum())
    return f"{''.join(time)}-{''.join(commit)[:12]}"


def decode_manifest(content: bytes, *, source: str) -> Manifest:
    """A `Manifest` from stored bytes. Raises `RegistryError` naming `source` when damaged."""
    try:
        return Manifest.model_validate(msgspec.json.decode(content))
    except (msgspec.DecodeError, ValidationError, RecursionError) as fault:
        message = f"{source}: the manifest is damaged or from a newer release ({fault}); pull another version"
        raise RegistryError(message) from fault
