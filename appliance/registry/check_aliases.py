"""The check of aliases: every record of the history, every ref, the chain behind it and the version before it.

A ref that went back is told from a promotion that was cut off by the protocol itself: a record is
written before its ref, and a record of move n+2 only by somebody who saw the ref at move n+1. So one
record ahead of the ref is an unfinished move; two ahead, or one on another past, prove that a ref was lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from appliance.registry.findings import RESTORE, Finding, ask, shorten
from appliance.registry.history import History, Record, name_remedy
from appliance.registry.layout import is_version, manifest_key, ref_key, reflog_key, tombstone_key
from appliance.registry.moves import AliasMove, Ref
from appliance.store import Store

_READERS = 8


def check_aliases(history: History, *, sealed: Mapping[tuple[str, str], str | None]) -> list[Finding]:
    """Every fault of refs and history.

    `sealed` has the manifest's SHA-256 of every version that was listed, `None` where the manifest is damaged.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        checked = pool.map(lambda a: list(_check_alias(history, a[0], a[1], sealed=sealed)), sorted(history.refs))
        findings = [finding for each in checked for finding in each]
    return [*history.findings, *findings]


def _check_alias(
    history: History, name: str, alias: str, *, sealed: Mapping[tuple[str, str], str | None]
) -> Iterator[Finding]:
    key, moves, ref = ref_key(name, alias), history.moves.get((name, alias), []), history.refs[name, alias]
    if isinstance(ref, Finding):
        return
    remedy = name_remedy(moves)
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


def _check_own_record(history: History, ref: Ref, moves: Sequence[Record], *, key: str) -> Iterator[Finding]:
    """The ref holds a record of the history, byte for byte."""
    own = reflog_key(ref.move.name, seq=ref.move.seq, sha256=ref.sha256)
    if history.get(own) is None:
        is_altered = bool(moves) and moves[-1].move.seq >= ref.move.seq
        action = f"put the newest record in its place: {moves[-1].key}" if is_altered else f"copy the ref to {own}"
        found = f"a move {ref.move.seq} that is not in reflog/"
        yield Finding("ref", key, found=found, expected=f"a copy of the record {own}", action=action)


def _follow(history: History, move: AliasMove) -> tuple[list[Record], list[Finding]]:
    """The records before a move, newest first, and what ends the walk; a damaged one is told where it was read."""
    chain: list[Record] = []
    while move.prev is not None:
        key = reflog_key(move.name, seq=move.seq - 1, sha256=move.prev)
        expected = f"move {move.seq - 1} of {move.name}@{move.alias}, SHA-256 {move.prev[:12]}..."
        record = history.get(key)
        if record is None:
            return chain, [Finding("broken-history", key, found="missing", expected=expected, action=RESTORE)]
        if isinstance(record, Finding):
            return chain, []
        if record.sha256 != move.prev or record.move.alias != move.alias:
            found = f"a record of {shorten(record.move.alias)}, SHA-256 {record.sha256}"
            return chain, [Finding("broken-history", key, found=found, expected=expected, action=RESTORE)]
        chain.append(record)
        move = record.move
    if move.seq == 1:
        return chain, []
    own, found = ref_key(move.name, move.alias), f"a history that begins with move {move.seq}"
    return chain, [Finding("broken-history", own, found=found, expected="one from move 1 on", action=RESTORE)]


def _check_targets(
    store: Store, records: Sequence[Record], *, sealed: Mapping[tuple[str, str], str | None]
) -> Iterator[Finding]:
    """The versions that the alias points at, now (the first record) and before, are there and the ones promoted."""
    newest = {record.move.version: record for record in reversed(records)}
    for record in newest.values():
        move, version = record.move, shorten(record.move.version)
        target = (move.name, move.version)
        publish = "publish it again from its run folder"
        is_now = record is records[0]
        if target not in sealed and not _is_there(store, move, or_collected=not is_now):
            action = f"promote another version, or {publish}" if is_now else f"{publish}, to go back to it"
            found, expected = f"{version}, which is not there", f"a version of {move.name}"
            yield Finding("dangling-ref", record.key, found=found, expected=expected, action=action)
        elif (sha256 := sealed.get(target)) is not None and sha256 != move.manifest_sha256:
            found, expected = f"{version} as {move.manifest_sha256[:12]}...", f"its manifest's {sha256[:12]}..."
            yield Finding("ref", record.key, found=found, expected=expected, action="promote a version again")


def _is_there(store: Store, move: AliasMove, *, or_collected: bool) -> bool:
    """Whether a version that was not listed was published since then, or is of the past and was collected."""
    if not is_version(move.version):
        return False
    keys = [manifest_key(move.name, move.version)]
    keys += [tombstone_key(move.name, move.version)] if or_collected else []
    return any(ask(store, key, lambda key=key: store.head(key)) is not None for key in keys)  # type: ignore[misc]
