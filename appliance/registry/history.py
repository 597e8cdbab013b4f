"""The history of aliases as it is stored: every record and every ref, read once, for check and collector alike.

What cannot be read is kept as the finding that it is; whoever judges decides what it means.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pydantic import ValidationError

from appliance.digest import digest_bytes
from appliance.errors import RegistryError
from appliance.registry.findings import RESTORE, Finding, ask, describe_fault, shorten
from appliance.registry.layout import Location, locate, model_prefix, ref_key
from appliance.registry.moves import AliasMove, Ref, read_ref
from appliance.store import Store

_READERS = 8


@dataclass(frozen=True, slots=True)
class Record:
    """One record of the history as it is stored."""

    key: str
    sha256: str
    move: AliasMove


@dataclass(frozen=True, slots=True)
class History:
    """Records by key and, sound ones, by alias in the order of their numbers; refs by alias.

    Records that are younger than the listing are read when they are asked for.
    """

    store: Store
    records: dict[str, Record | Finding | None] = field(default_factory=dict)
    moves: dict[tuple[str, str], list[Record]] = field(default_factory=dict)
    refs: dict[tuple[str, str], Ref | Finding | None] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        """Every record and ref that cannot be read."""
        return [f for f in (*self.records.values(), *self.refs.values()) if isinstance(f, Finding)]

    def get(self, key: str) -> Record | Finding | None:
        """One record, a finding when it is damaged, `None` when it is not there."""
        if key not in self.records:
            self.records[key] = _read_record(self.store, key)
        return self.records[key]


def read_history(store: Store, locations: Sequence[Location]) -> History:
    """The records of the listed locations, then the refs of all aliases that they or the listing tell of."""
    history = History(store)
    keys = [at.key for at in locations if at.place == "reflog"]
    with ThreadPoolExecutor(_READERS) as pool:
        history.records.update(zip(keys, pool.map(lambda key: _read_record(store, key), keys), strict=True))
        for record in history.records.values():
            if isinstance(record, Record):
                history.moves.setdefault((record.move.name, record.move.alias), []).append(record)
        for records in history.moves.values():
            records.sort(key=lambda r: r.move.seq)
        aliases = sorted({(at.name, at.item) for at in locations if at.place == "ref"} | history.moves.keys())
        history.refs.update(zip(aliases, pool.map(lambda a: _read_head(history, *a), aliases), strict=True))
    return history


def name_remedy(moves: Sequence[Record]) -> str:
    """What mends a ref, whose alias has these records."""
    return f"put the newest record in its place: {moves[-1].key}" if moves else RESTORE


def _read_record(store: Store, key: str) -> Record | Finding | None:
    got = ask(store, key, lambda: store.get(key))
    return got if got is None or isinstance(got, Finding) else _verify_record(key, got[0])


def _read_head(history: History, name: str, alias: str) -> Ref | Finding | None:
    key, store = ref_key(name, alias), history.store
    try:
        return ask(store, key, lambda: read_ref(store, name, alias))
    except RegistryError as fault:
        found = describe_fault(fault, source=f"{store.url}/{key}")
        remedy = name_remedy(history.moves.get((name, alias), []))
        return Finding("ref", key, found=found, expected=f"a move of {name}@{alias}", action=remedy)


def _verify_record(key: str, content: bytes) -> Record | Finding:
    """The record under `key`, if its name is its own digest and number."""
    at = locate(key)
    number, _, sealed = at.item.partition("-") if at else ("", "", "")
    sha256 = digest_bytes(content)
    if not sha256.startswith(sealed):
        found = f"altered, SHA-256 {sha256[:12]}..."
        return Finding("broken-history", key, found=found, expected=f"{sealed}... as in its name", action=RESTORE)
    try:
        move = AliasMove.model_validate_json(content)
    except ValidationError:
        move = None
    if move is None or at is None or (move.name, move.seq) != (at.name, int(number)) or not _has_ref(move):
        found = "what is no move" if move is None else f"move {move.seq} of {shorten(f'{move.name}@{move.alias}')}"
        expected = f"move {int(number or 0)} of {at.name if at else 'a model'}, in this release's schema"
        return Finding("broken-history", key, found=found, expected=expected, action=RESTORE)
    return Record(key, sha256, move)


def _has_ref(move: AliasMove) -> bool:
    """Whether the alias can be one: a record is text of whoever wrote it."""
    at = locate(f"{model_prefix(move.name)}refs/{move.alias}.json")
    return at is not None and at.place == "ref"
