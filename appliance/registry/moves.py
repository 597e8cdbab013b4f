"""One move of an alias: the record that a ref holds and that the history keeps, byte for byte the same.

`prev` is the SHA-256 of the alias's move before, so that the ref seals the whole history. Records
that lost a race stay in `reflog/` but are reached from no ref: they never happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.digest import canonical_json, digest_bytes
from appliance.errors import NotFoundError, RegistryError
from appliance.manifest import Sha256
from appliance.registry.layout import model_prefix, ref_key, reflog_key, select_keys
from appliance.store import Store


class AliasMove(BaseModel):
    """`alias` of `name` moved to `version` as its `seq`-th move (from 1), by `actor`, because of `reason`.

    `asked_by` is the commit that a verdict moved it for, `None` where a person did.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    schema_version: Literal[1] = Field(1, alias="schema")
    name: str
    alias: str
    version: str = Field(alias="vid")
    manifest_sha256: Sha256
    seq: int = Field(ge=1)
    prev: Sha256 | None
    op_id: str = Field(min_length=1)
    actor: str
    reason: str
    at: str
    forced: bool = False
    asked_by: str | None = Field(None, pattern=r"^[0-9a-f]{40,64}$")

    def encode(self) -> bytes:
        """The canonical bytes: content of the ref and of its reflog entry."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))


@dataclass(frozen=True, slots=True)
class Ref:
    """A ref as it was read: the move in it, the digest of its stored bytes, and the ETag to swap against."""

    move: AliasMove
    sha256: str
    etag: str


def read_ref(store: Store, name: str, alias: str) -> Ref | None:
    """The alias's ref, `None` without one. Raises `RegistryError` on damage."""
    key = ref_key(name, alias)
    try:
        content, stored = store.get(key)
    except NotFoundError:
        return None
    move = _decode(content, name=name, alias=alias, source=f"{store.url}/{key}")
    return Ref(move, digest_bytes(content), stored.etag)


def read_alias(store: Store, name: str, alias: str) -> AliasMove | None:
    """The move that put the alias where it is, `None` when there is no such alias."""
    ref = read_ref(store, name, alias)
    return ref.move if ref else None


def list_aliases(store: Store, name: str) -> list[str]:
    """The aliases of a model, by name; none for an unknown one."""
    return sorted(alias for _, alias in select_keys((o.key for o in store.list(f"{model_prefix(name)}refs/")), "ref"))


def follow_alias(store: Store, name: str, alias: str) -> Iterator[AliasMove]:
    """The moves of an alias from the newest back, read as they are asked for; none for an unknown one.

    Each record is checked against the hash in the next one. Raises `RegistryError` on a broken chain.
    """
    move = read_alias(store, name, alias)
    while move is not None:
        yield move
        move = _read_previous(store, move)


def _read_previous(store: Store, move: AliasMove) -> AliasMove | None:
    if move.prev is None:
        return None
    key = reflog_key(move.name, seq=move.seq - 1, sha256=move.prev)
    try:
        content, _ = store.get(key)
    except NotFoundError as fault:
        raise RegistryError(f"{store.url}/{key}: missing, the history of {move.alias} is broken here") from fault
    if digest_bytes(content) != move.prev:
        raise RegistryError(f"{store.url}/{key}: altered, the history of {move.alias} is broken here")
    return _decode(content, name=move.name, alias=move.alias, source=f"{store.url}/{key}")


def _decode(content: bytes, *, name: str, alias: str, source: str) -> AliasMove:
    try:
        move = AliasMove.model_validate_json(content)
    except ValidationError as fault:
        raise RegistryError(
            f"{source}: damaged or from a newer release; restore it from the newest entry of reflog/"
        ) from fault
    if (move.name, move.alias) != (name, alias):
        raise RegistryError(
            f"{source}: belongs to {move.name}@{move.alias}; restore it from the newest entry of reflog/"
        )
    return move
