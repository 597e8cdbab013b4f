"""Aliases: the only mutable keys, moved by compare-and-swap, with a history that the ref itself seals.

Every move is written to the history first and takes effect only when the ref is won. A move whose
answer was lost is recognised by its `op_id`. A rollback is a new forward move.
"""

from __future__ import annotations

import difflib
import itertools
import uuid

from appliance.digest import digest_bytes
from appliance.errors import PreconditionFailedError, RegistryError
from appliance.manifest import Manifest
from appliance.registry.layout import (
    check_alias,
    check_format,
    check_name,
    is_beginning,
    is_version,
    ref_key,
    reflog_key,
)
from appliance.registry.listing import (
    complete_version,
    describe_missing_alias,
    load_manifest,
    read_manifest,
)
from appliance.registry.moves import AliasMove, Ref, follow_alias, list_aliases, read_alias, read_ref
from appliance.registry.publish import check_blobs
from appliance.registry.tombstones import is_collected
from appliance.store import Store

DEFAULT_ALIAS = "production"
_ATTEMPTS = 64


def promote(
    store: Store,
    *,
    name: str,
    version: str,
    alias: str,
    actor: str,
    reason: str,
    at: str,
    force: bool = False,
    expected: str | None = None,
    asked_by: str | None = None,
    op_id: str | None = None,
) -> AliasMove:
    """Point `alias` at `version` and return the move; an alias that is there already is left alone.

    Only a version whose verdict is `ship` is accepted, others with `force`. With `expected` the alias
    must point at that version now; without it a new alias that reads like one of the model's is refused.
    `asked_by` is the commit that a verdict moves it for; a person's move has none. `at` is a UTC time; `op_id`
    identifies the call over retries and is made when not given. Raises `RegistryError` when refused (nothing is
    written then), `StoreError`.
    """
    check_format(store)
    ref_key(name, alias)
    wanted = AliasMove(
        schema_version=1,
        name=name,
        alias=alias,
        version=version,
        manifest_sha256=_check_promotable(store, name, version, force=force),
        seq=1,
        prev=None,
        op_id=op_id or uuid.uuid4().hex,
        actor=actor,
        reason=reason,
        at=at,
        forced=force,
        asked_by=asked_by,
    )
    _check_alive(store, wanted)
    if expected is None:
        _check_spelling(store, wanted)
    return _move_alias(store, wanted, expected=expected)


def _move_alias(store: Store, wanted: AliasMove, *, expected: str | None) -> AliasMove:
    """Compare and swap until this move is in the history; every attempt looks at the alias anew."""
    subject, first_seq = f"{store.url}: {wanted.name}@{wanted.alias}", 0
    for _ in range(_ATTEMPTS):
        current = read_ref(store, wanted.name, wanted.alias)
        mine = _find_operation(store, wanted, since=first_seq) if first_seq else None
        if mine is not None:
            return mine
        _check_expected(current, expected, subject=subject)
        if current is not None and current.move.version == wanted.version:
            return current.move
        link = {"seq": current.move.seq + 1, "prev": current.sha256} if current else {}
        move = wanted.model_copy(update=link)
        first_seq = first_seq or move.seq
        if _write_move(store, move, etag=current.etag if current else None):
            return move
    raise RegistryError(f"{subject} was moved by others {_ATTEMPTS} times meanwhile; promote again")


def _check_promotable(store: Store, name: str, version: str, *, force: bool) -> str:
    """The digest of the manifest, if the version may be promoted and its blobs are there."""
    content, manifest = read_manifest(store, name, version)
    if manifest.verdict != "ship" and not force:
        raise RegistryError(
            f"{store.url}: {name}@{version} has the verdict {manifest.verdict}, expected ship; "
            "read its card, then use --force if you know better"
        )
    check_blobs(store, manifest)
    return digest_bytes(content)


def _check_expected(current: Ref | None, expected: str | None, *, subject: str) -> None:
    found = current.move.version if current else "nothing"
    if expected is not None and found != expected:
        raise RegistryError(f"{subject} points at {found}, expected {expected}; look at it again before you move it")


def _check_spelling(store: Store, wanted: AliasMove) -> None:
    """Refuse a new alias that reads like one that is there: that one would stay, the new one for ever."""
    aliases = list_aliases(store, wanted.name)
    close = difflib.get_close_matches(wanted.alias, aliases, n=1)
    if wanted.alias not in aliases and close:
        raise RegistryError(
            f"{store.url}: no alias {wanted.alias!r} of {wanted.name}; did you mean {close[0]}? "
            "A new alias of this name takes --expected nothing"
        )


def _find_operation(store: Store, wanted: AliasMove, *, since: int) -> AliasMove | None:
    """The move of this very call, if an earlier attempt took effect although its answer was lost."""
    recent = itertools.takewhile(lambda m: m.seq >= since, follow_alias(store, wanted.name, wanted.alias))
    return next((move for move in recent if move.op_id == wanted.op_id), None)


def _write_move(store: Store, move: AliasMove, *, etag: str | None) -> bool:
    """History first, then the ref; `False` when another writer moved the alias meanwhile.

    Between the two a collector is looked for: one that marks its version later finds the history's word.
    """
    content = move.encode()
    try:
        store.put(reflog_key(move.name, seq=move.seq, sha256=digest_bytes(content)), content)
        _check_alive(store, move)
        store.put(ref_key(move.name, move.alias), content, if_none_match=etag is None, if_match=etag)
    except PreconditionFailedError:
        return False
    return True


def _check_alive(store: Store, move: AliasMove) -> None:
    if is_collected(store, move.name, move.version):
        raise RegistryError(
            f"{store.url}: {move.name}@{move.version} was collected or is about to be, {move.alias} was not moved; "
            "promote another version, or look whether it is still there after the next `appliance gc`"
        )


def resolve(store: Store, reference: str) -> tuple[str, Manifest]:
    """The version and verified manifest behind `name@alias`, `name@version`, or `name` (its production alias)."""
    name, version = find_version(store, reference)
    return version, load_manifest(store, name, version)


def find_version(store: Store, reference: str) -> tuple[str, str]:
    """Name and version of a reference; of a version, a beginning that no other has is enough.

    Raises `RegistryError` with what there is when it is unknown.
    """
    check_format(store)
    name, separator, rest = reference.partition("@")
    check_name(name)
    if is_version(rest):
        return name, rest
    if is_beginning(rest):
        return name, complete_version(store, name, rest)
    alias = check_alias(rest) if separator else DEFAULT_ALIAS
    move = read_alias(store, name, alias)
    if move is None:
        meant = "" if separator else f"; {name} alone means {name}@{alias}"
        raise RegistryError(describe_missing_alias(store, name, alias) + meant)
    if digest_bytes(read_manifest(store, name, move.version)[0]) != move.manifest_sha256:
        raise RegistryError(f"{store.url}: {reference}: its manifest is not the one promoted; pull another version")
    return name, move.version
