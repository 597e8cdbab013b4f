"""The check of aliases: every record of the history, every ref, the chain behind it and the version before it.

A ref that went back is told from a promotion that was cut off by the protocol itself: a record is
written before its ref, and a record of move n+2 only by somebody who saw the ref at move n+1. So one
record ahead of the ref is an unfinished move; two ahead, or one on another past, prove that a ref was lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pydantic import ValidationError

from appliance.digest import digest_bytes
from appliance.errors import RegistryError
from appliance.registry.findings import Finding, ask, describe_fault, shorten
from appliance.registry.layout import Location, is_version, locate, manifest_key, model_prefix, ref_key, reflog_key
from appliance.registry.moves import AliasMove, Ref, read_ref
from appliance.store import Store

_READERS = 8
_RESTORE = "restore it from the bucket's object versions or a backup"


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the history as it is stored."""

    key: str
    sha256: str
    move: AliasMove


@dataclass(frozen=True, slots=True)
class _History:
    """The records of all models by key; those that are younger than the listing are read when they are asked for."""

    store: Store
    records: dict[str, Record | Finding | None] = field(default_factory=dict)
    moves: dict[tuple[str, str], list[Record]] = field(default_factory=dict)

    def load(self, keys: Sequence[str]) -> None:
        """Read many records, eight at a time, and sort the sound ones by alias and number."""
        with ThreadPoolExecutor(_READERS) as pool:
            self.records.update(zip(keys, pool.map(self._read, keys), strict=True))
        for record in self.records.values():
            if isinstance(record, Record):
                self.moves.setdefault((record.move.name, record.move.alias), []).append(record)
        for records in self.moves.values():
            records.sort(key=lambda r: r.move.seq)

    def get(self, key: str) -> Record | Finding | None:
        """One record, a finding when it is damaged, `None` when it is not there."""
        if key not in self.records:
            self.records[key] = self._read(key)
        return self.records[key]

    def _read(self, key: str) -> Record | Finding | None:
        got = ask(self.store, key, lambda: self.store.get(key))
        return got if got is None or isinstance(got, Finding) else _verify_record(key, got[0])


def check_aliases(
    store: Store, locations: Sequence[Location], *, sealed: Mapping[tuple[str, str], str | None]
) -> list[Finding]:
    """Every fault of refs and history.

    `sealed` has the manifest's SHA-256 of every version that was listed, `None` where the manifest is damaged.
    """
    history = _History(store)
    history.load([at.key for at in locations if at.place == "reflog"])
    aliases = {(at.name, at.item) for at in locations if at.place == "ref"} | history.moves.keys()
    with ThreadPoolExecutor(_READERS) as pool:
        checked = pool.map(lambda a: list(_check_alias(history, a[0], a[1], sealed=sealed)), sorted(aliases))
        findings = [finding for each in checked for finding in each]
    return [*(r for r in history.records.values() if isinstance(r, Finding)), *findings]


def _verify_record(key: str, content: bytes) -> Record | Finding:
    """The record under `key`, if its name is its own digest and number."""
    at = locate(key)
    number, _, sealed = at.item.partition("-") if at else ("", "", "")
    sha256 = digest_bytes(content)
    if not sha256.startswith(sealed):
        found = f"altered, SHA-256 {sha256[:12]}..."
        return Finding("broken-history", key, found=found, expected=f"{sealed}... as in its name", action=_RESTORE)
    try:
        move = AliasMove.model_validate_json(content)
    except ValidationError:
        move = None
    if move is None or at is None or (move.name, move.seq) != (at.name, int(number)) or not _has_ref(move):
        found = "what is no move" if move is None else f"move {move.seq} of {shorten(f'{move.name}@{move.alias}')}"
        expected = f"move {int(number or 0)} of {at.name if at else 'a model'}, in this release's schema"
        return Finding("broken-history", key, found=found, expected=expected, action=_RESTORE)
    return Record(key, sha256, move)


def _has_ref(move: AliasMove) -> bool:
    """Whether the alias can be one: a record is text of whoever wrote it."""
    at = locate(f"{model_prefix(move.name)}refs/{move.alias}.json")
    return at is not None and at.place == "ref"


def _check_alias(
    history: _History, name: str, alias: str, *, sealed: Mapping[tuple[str, str], str | None]
) -> Iterator[Finding]:
    key = ref_key(name, alias)
    moves = history.moves.get((name, alias), [])
    remedy = f"put the newest record in its place: {moves[-1].key}" if moves else _RESTORE
    try:
        ref = ask(history.store, key, lambda: read_ref(history.store, name, alias))
    except RegistryError as fault:
        found = describe_fault(fault, source=f"{history.store.url}/{key}")
        yield Finding("ref", key, found=found, expected=f"a move of {name}@{alias}", action=remedy)
        return
    if isinstance(ref, Finding):
        yield ref
        return
    yield from _check_head(ref, moves, key=key, remedy=remedy)
    if ref is not None:
        yield from _check_own_record(history, ref, moves, key=key)
        chain, broken = _follow(history, ref.move)
        yield from broken
        yield from _check_targets(history.store, [Record(key, ref.sha256, ref.move), *chain], sealed=sealed)


def _check_head(ref: Ref | None, moves: Sequence[Record], *, key: str, remedy: str) -> Iterator[Finding]:
    """The ref against the records that claim to be later."""
    seq, sha256 = (ref.move.seq, ref.sha256) if ref else (0, None)
    later = [r for r in moves if r.move.seq > seq]
    if any(r.move.seq > seq + 1 or r.move.prev != sha256 for r in later):
        found, expected = f"move {seq}" if ref else "missing", f"the move that {later[-1].key} follows"
        yield Finding("ref", key, found=found, expected=expected, action=remedy)
        return
    for record in later:
        yield Finding(
            "unfinished-move",
            record.key,
            found=f"a move of {record.move.alias} to {shorten(record.move.version)} that did not take effect",
            expected="its ref to follow",
            action="promote again if it is still wanted",
        )


def _check_own_record(history: _History, ref: Ref, moves: Sequence[Record], *, key: str) -> Iterator[Finding]:
    """The ref holds a record of the history, byte for byte."""
    own = reflog_key(ref.move.name, seq=ref.move.seq, sha256=ref.sha256)
    if history.get(own) is None:
        is_altered = bool(moves) and moves[-1].move.seq >= ref.move.seq
        action = f"put the newest record in its place: {moves[-1].key}" if is_altered else f"copy the ref to {own}"
        found = f"a move {ref.move.seq} that is not in reflog/"
        yield Finding("ref", key, found=found, expected=f"a copy of the record {own}", action=action)


def _follow(history: _History, move: AliasMove) -> tuple[list[Record], list[Finding]]:
    """The records before a move, newest first, and what ends the walk; a damaged one is told where it was read."""
    chain: list[Record] = []
    while move.prev is not None:
        key = reflog_key(move.name, seq=move.seq - 1, sha256=move.prev)
        expected = f"move {move.seq - 1} of {move.name}@{move.alias}, SHA-256 {move.prev[:12]}..."
        record = history.get(key)
        if record is None:
            return chain, [Finding("broken-history", key, found="missing", expected=expected, action=_RESTORE)]
        if isinstance(record, Finding):
            return chain, []
        if record.sha256 != move.prev or record.move.alias != move.alias:
            found = f"a record of {shorten(record.move.alias)}, SHA-256 {record.sha256}"
            return chain, [Finding("broken-history", key, found=found, expected=expected, action=_RESTORE)]
        chain.append(record)
        move = record.move
    if move.seq == 1:
        return chain, []
    own, found = ref_key(move.name, move.alias), f"a history that begins with move {move.seq}"
    return chain, [Finding("broken-history", own, found=found, expected="one from move 1 on", action=_RESTORE)]


def _check_targets(
    store: Store, records: Sequence[Record], *, sealed: Mapping[tuple[str, str], str | None]
) -> Iterator[Finding]:
    """The versions that the alias points at, now (the first record) and before, are there and the ones promoted."""
    newest = {record.move.version: record for record in reversed(records)}
    for record in newest.values():
        move, version = record.move, shorten(record.move.version)
        target = (move.name, move.version)
        publish = "publish it again from its run folder"
        if target not in sealed and not _is_there(store, move):
            action = (
                f"promote another version, or {publish}" if record is records[0] else f"{publish}, to go back to it"
            )
            found, expected = f"{version}, which is not there", f"a version of {move.name}"
            yield Finding("dangling-ref", record.key, found=found, expected=expected, action=action)
        elif (sha256 := sealed.get(target)) is not None and sha256 != move.manifest_sha256:
            found, expected = f"{version} as {move.manifest_sha256[:12]}...", f"its manifest's {sha256[:12]}..."
            yield Finding("ref", record.key, found=found, expected=expected, action="promote a version again")


def _is_there(store: Store, move: AliasMove) -> bool:
    """Whether a version that was not listed was published since then."""
    if not is_version(move.version):
        return False
    key = manifest_key(move.name, move.version)
    return ask(store, key, lambda: store.head(key)) is not None
