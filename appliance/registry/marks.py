"""What is garbage: everything that nothing names and nobody can be about to name.

Named are the versions that an alias is at, those that the retained history knows, and all that are not asked
to go; with them their blobs. Whoever holds a lease may be about to name a loose blob or to finish a run. All
ages are by the store's clock. On a registry that is damaged nothing is garbage: what a lost manifest or ref
named cannot be known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from pydantic import BaseModel, ConfigDict

from appliance.errors import RegistryError
from appliance.registry.history import History
from appliance.registry.layout import SEAL, Location, age_of, locate
from appliance.registry.moves import Ref
from appliance.registry.walk import Walk, find_loose
from appliance.store import StoredObject, Upload

Kind = Literal["version", "blob", "checkpoint", "lease", "upload"]
Target = tuple[str, str]

RETAINED_S = 90 * 86_400.0
_TICK_S = 2.0  # S3 tells whole seconds: what is younger may be of the same one


class Garbage(BaseModel):
    """One object that could go, exactly as it was listed; `tag` is its ETag, or an upload's name in the store."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Kind
    key: str
    size: int
    modified: float
    tag: str

    @property
    def stored(self) -> StoredObject:
        """The object as it was listed."""
        return StoredObject(self.key, self.size, self.tag, self.modified)

    @property
    def upload(self) -> Upload:
        """The unfinished write as it was listed."""
        return Upload(self.key, self.tag, self.size, self.modified)


@dataclass(frozen=True, slots=True)
class Age:
    """What `now` is by the store's clock, and how long ago (seconds) a thing must have been written to be old."""

    now: float
    grace_s: float

    def is_old(self, modified: float | None) -> bool:
        """Whether a thing of this time is older than the grace period."""
        return modified is not None and self.now - modified >= max(self.grace_s, _TICK_S)


def find_garbage(walk: Walk, *, age: Age, keep_versions: int | None, uploads: Iterable[Upload]) -> list[Garbage]:
    """All that could go, by kind and key; versions only beyond the newest `keep_versions` of a model.

    Raises `RegistryError` when the registry is damaged.
    """
    check_markable(walk)
    live = find_live(walk, now=age.now)
    found = [_describe("blob", o) for o in ([] if live else find_loose(walk)) if age.is_old(o.modified)]
    found += [_describe("lease", o) for o, at in walk.select("lease") if at.name not in live and age.is_old(o.modified)]
    found += [_describe("checkpoint", o) for o in _find_checkpoints(walk, live=live, age=age)]
    found += [
        Garbage(kind="upload", key=u.key, size=u.size, modified=u.begun, tag=u.token)
        for u in uploads
        if age.is_old(u.begun) and _is_ours(u)
    ]
    if keep_versions is not None:
        found += [_describe("version", o) for o in _find_versions(walk, live=live, age=age, keep=keep_versions)]
    return found


def check_markable(walk: Walk) -> None:
    """Raise `RegistryError` when something is damaged that could name what looks like garbage; strays name nothing."""
    damage = [f for f in walk.findings if f.severity == "damage" and f.kind != "unknown-key"]
    if damage:
        more = f" (and {len(damage) - 1} more)" if len(damage) > 1 else ""
        raise RegistryError(
            f"{walk.store.url}: nothing is collected, because what this names cannot be known: {damage[0]}{more}; "
            "`appliance check` tells all of it; repair, then collect again"
        )


def find_live(walk: Walk, *, now: float) -> set[str]:
    """The models that somebody works on."""
    return {lease.name for lease in walk.leases if lease.until > now}


def find_named(history: History, *, written: Mapping[str, float | None], now: float) -> set[Target]:
    """The versions that an alias is at, was at within 90 days, or is about to be moved to.

    `written` has the times of records by key; one that is not listed is of now.
    """
    named = {(ref.move.name, ref.move.version) for ref in history.refs.values() if isinstance(ref, Ref)}
    for records in history.moves.values():
        times: dict[int, float] = {}
        for record in records:
            times[record.move.seq] = max(times.get(record.move.seq, 0.0), written.get(record.key) or now)
        for move in (record.move for record in records):
            until = times.get(move.seq + 1)  # the alias was there until its next move
            if until is None or max(until, times[move.seq]) > now - RETAINED_S:
                named.add((move.name, move.version))
    return named


def _is_ours(upload: Upload) -> bool:
    """A registry's own; what a folder has not finished is hidden and has no key yet."""
    return upload.key.startswith(".") or locate(upload.key) is not None


def _describe(kind: Kind, stored: StoredObject) -> Garbage:
    return Garbage(kind=kind, key=stored.key, size=stored.size, modified=stored.modified or 0.0, tag=stored.etag)


def _find_checkpoints(walk: Walk, *, live: set[str], age: Age) -> Iterator[StoredObject]:
    """Checkpoints of runs to which nobody has added for the grace period; each one's seal first.

    A published run is of known models; one that is not may be of any model that somebody works on.
    """
    owners: dict[str, set[str]] = {}
    for (name, _), version in walk.versions.items():
        owners.setdefault(version.manifest.run_key, set()).add(name)
    for run_key, members in groupby(walk.select("checkpoint"), key=lambda pair: pair[1].item):
        objects = [o for o, _ in members]
        if all(age.is_old(o.modified) for o in objects) and not live & owners.get(run_key, live):
            yield from sorted(objects, key=lambda o: (not o.key.endswith(f"/{SEAL}"), o.key))


def _find_versions(walk: Walk, *, live: set[str], age: Age, keep: int) -> Iterator[StoredObject]:
    """Manifests beyond the newest of each model."""
    written = {o.key: o.modified for o, _ in walk.select("reflog")}
    named = find_named(walk.history, written=written, now=age.now)
    manifests_by_age = sorted(walk.select("manifest"), key=lambda pair: age_of(pair[0]))
    for name, members in groupby(manifests_by_age, key=lambda pair: pair[1].name):
        manifests: Sequence[tuple[StoredObject, Location]] = list(members)
        if name not in live:
            for stored, at in manifests[: max(0, len(manifests) - keep)]:
                if age.is_old(stored.modified) and (name, at.item) not in named:
                    yield stored
