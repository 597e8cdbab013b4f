"""The collector: what has been garbage for a grace period is planned, and after another one it goes.

A first run writes what is garbage to `gc/<time>-<digest>.json`. A later run that asks for the same marks again
and deletes what both it and a plan older than the grace period call garbage, each object only if it is still
the one that was planned. So whatever a publisher relies on has a grace period to become named, and what was
written again, promoted or leased meanwhile stays. Cut off anywhere, the next run finishes the job, because a
plan goes last.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.digest import canonical_json, digest_bytes
from appliance.errors import NotFoundError, PreconditionFailedError, RegistryError, StoreError
from appliance.progress import Progress
from appliance.registry.history import read_history
from appliance.registry.layout import SEAL, locate, model_prefix, plan_key
from appliance.registry.marks import Age, Garbage, Target, find_garbage, find_live, find_named
from appliance.registry.tombstones import bury, revive
from appliance.registry.walk import GRACE_S, Walk, walk_registry
from appliance.store import Store, StoredObject, Upload

_WORKERS = 8
_SHOWN_FROM = 200


class Plan(BaseModel):
    """What was garbage for a run that asked to keep so many versions of a model; `None`: it asked for no versions."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    schema_version: Literal[1] = Field(1, alias="schema")
    keep_versions: int | None
    garbage: tuple[Garbage, ...]

    def encode(self) -> bytes:
        """The canonical bytes that are stored."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))


@dataclass(frozen=True, slots=True)
class Collection:
    """What a run does or did: `deleted` was planned long enough ago, `planned` is new, `waiting` is planned.

    `spared` was to be deleted and turned out to be wanted. `due` is when the next plan is old enough, in seconds
    since the epoch, `None` without one. `held_by` are models whose leases protect loose blobs, checkpoints and
    their versions; `notes` what could not be looked at.
    """

    deleted: tuple[Garbage, ...]
    planned: tuple[Garbage, ...]
    waiting: tuple[Garbage, ...]
    spared: tuple[Garbage, ...]
    due: float | None
    held_by: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Look:
    """A walk, what follows from it, and the plans that are old enough to be done with."""

    walk: Walk
    collection: Collection
    done: tuple[str, ...]


def look_for_garbage(
    store: Store, *, now: float, keep_versions: int | None = None, grace_s: float = GRACE_S
) -> Collection:
    """What `collect_garbage` would do at `now` (the store's clock); writes nothing.

    Raises `RegistryError` when the registry is damaged, `StoreError` when the store fails.
    """
    return _look(store, age=Age(now, grace_s), keep_versions=keep_versions).collection


def collect_garbage(
    store: Store, *, now: float, keep_versions: int | None = None, grace_s: float = GRACE_S
) -> Collection:
    """Delete what was planned longer ago than the grace period and still is garbage, and plan what is new.

    Raises `RegistryError` when the registry is damaged (nothing is deleted then), `StoreError` when the store
    fails; the same call goes on from there.
    """
    look = _look(store, age=Age(now, grace_s), keep_versions=keep_versions)
    _undo_cut_off(look)
    spared = _delete_all(store, look.collection.deleted, now=now)
    for key in look.done:
        store.delete(key)
    if look.collection.planned:
        _write_plan(store, Plan(keep_versions=keep_versions, garbage=look.collection.planned), now=now)
    deleted = tuple(g for g in look.collection.deleted if g not in spared)
    return replace(look.collection, deleted=deleted, spared=tuple(spared))


def _look(store: Store, *, age: Age, keep_versions: int | None) -> _Look:
    walk = walk_registry(store)
    uploads, notes = _list_uploads(store)
    garbage = find_garbage(walk, age=age, keep_versions=keep_versions, uploads=uploads)
    plans = [(o, plan) for o, _ in walk.select("plan") if (plan := _read_plan(store, o.key)) is not None]
    plans = [(o, plan) for o, plan in plans if plan.keep_versions == keep_versions]
    due = [o.key for o, _ in plans if _is_due(o, age=age)]
    ripe = {g for o, plan in plans if o.key in due for g in plan.garbage}
    young = {g for o, plan in plans if o.key not in due for g in plan.garbage} - ripe
    waits = [(o.modified or 0.0) + age.grace_s for o, _ in plans if o.key not in due]
    planned = tuple(g for g in garbage if g not in ripe and g not in young)
    collection = Collection(
        deleted=tuple(g for g in garbage if g in ripe),
        planned=planned,
        waiting=tuple(g for g in garbage if g in young),
        spared=(),
        due=min([*waits, *([age.now + age.grace_s] if planned else [])], default=None),
        held_by=tuple(sorted(find_live(walk, now=age.now))),
        notes=notes,
    )
    return _Look(walk, collection, tuple(due))


def _list_uploads(store: Store) -> tuple[list[Upload], tuple[str, ...]]:
    """Unfinished uploads; to list them is a right of its own, without which all else can be collected."""
    try:
        return list(store.list_uploads()), ()
    except StoreError as fault:
        return [], (f"unfinished uploads were not looked at: {fault}",)


def _is_due(plan: StoredObject, *, age: Age) -> bool:
    return plan.modified is not None and age.now - plan.modified >= age.grace_s


def _read_plan(store: Store, key: str) -> Plan | None:
    """A plan, `None` when another collector was done with it. Raises `RegistryError` on damage."""
    try:
        return Plan.model_validate_json(store.get(key)[0])
    except NotFoundError:
        return None
    except ValidationError as fault:
        raise RegistryError(
            f"{store.url}/{key}: damaged or from a newer release, nothing is collected; "
            "use a newer release or delete it: it is a plan only, and its garbage will be planned again"
        ) from fault


def _write_plan(store: Store, plan: Plan, *, now: float) -> None:
    content = plan.encode()
    key = plan_key(time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now)), sha256=digest_bytes(content))
    with contextlib.suppress(PreconditionFailedError):  # another collector planned the same in this second
        store.put(key, content, if_none_match=True)


def _undo_cut_off(look: _Look) -> None:
    """Versions that a collector marked and did not get to, and that are no longer to go."""
    doomed = {g.key for g in look.collection.deleted}
    manifests = {(at.name, at.item): o for o, at in look.walk.select("manifest")}
    for stone, at in look.walk.select("tombstone"):
        manifest = manifests.get((at.name, at.item))
        if manifest is not None and manifest.key not in doomed and (manifest.modified or 0) < (stone.modified or 0):
            revive(look.walk.store, name=at.name, version=at.item)


def _delete_all(store: Store, doomed: Sequence[Garbage], *, now: float) -> set[Garbage]:
    """Delete in an order in which no half is ever taken for a whole; what is spared."""
    spared = _collect_versions(store, [g for g in doomed if g.kind == "version"], now=now)
    seals = [g for g in doomed if g.kind == "checkpoint" and g.key.endswith(f"/{SEAL}")]
    others = [g for g in doomed if g.kind != "version" and g not in set(seals)]
    done = 0
    with Progress("deleting") as bar, ThreadPoolExecutor(_WORKERS) as pool:
        for group in (seals, others):
            for garbage, is_spared in zip(group, pool.map(lambda g: _spare_or_delete(store, g), group), strict=True):
                spared |= {garbage} if is_spared else set()
                done += 1
                if len(doomed) >= _SHOWN_FROM:
                    bar.advance(done, total=len(seals) + len(others))
    return spared


def _spare_or_delete(store: Store, garbage: Garbage) -> bool:
    """Whether it was written again since it was planned, and so is not what was planned."""
    try:
        if garbage.kind == "upload":
            store.abort_upload(garbage.upload)
        else:
            store.delete(garbage.key, only=garbage.stored)
    except PreconditionFailedError:
        return True
    return False


def _collect_versions(store: Store, doomed: Sequence[Garbage], *, now: float) -> set[Garbage]:
    """Tombstones, then the history once more, then manifests; the versions that are named by now."""
    targets = {g: (at.name, at.item) for g in doomed if (at := locate(g.key)) is not None}
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    spared: set[Garbage] = set()
    for model, members in groupby(targets, key=lambda g: targets[g][0]):
        group = list(members)
        for garbage in group:
            bury(store, name=model, version=targets[garbage][1], at=since)
        named = _read_named(store, model, among=(targets[g] for g in group), now=now)
        for garbage in group:
            if targets[garbage] in named or _spare_or_delete(store, garbage):
                revive(store, name=model, version=targets[garbage][1])
                spared.add(garbage)
    return spared


def _read_named(store: Store, model: str, *, among: Iterable[Target], now: float) -> set[Target]:
    """The versions of a model that an alias is at or is about to be moved to; all of `among` when that is in doubt."""
    listed = list(store.list(model_prefix(model)))
    history = read_history(store, [at for o in listed if (at := locate(o.key)) is not None])
    if history.findings:
        return set(among)
    return find_named(history, written={o.key: o.modified for o in listed}, now=now)
