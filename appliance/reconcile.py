"""Desired state (recipes x dataset commit) against actual state (the registry), and the difference made.

Level-triggered and idempotent: a push, a schedule and a person all call this, and it trains only
what has no version yet. A recipe that fails does not stop the others, and each says why it trains or
does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from appliance import registry
from appliance.command import run_command
from appliance.data import (
    Pointer,
    check_pushed,
    describe_unheld,
    find_astray,
    find_place,
    find_unheld_rows,
    load_pointer,
    pull_data,
    read_listing,
)
from appliance.desired import (
    POINTER,
    attempt,
    find_changes,
    find_recipes,
    find_touched,
    load_recipes,
    read_commit,
)
from appliance.errors import ApplianceError, CommandError, DatasetError, UnreachableDataError
from appliance.pipeline import Finished, finish_published, run_prepared
from appliance.preparation import Origin, Prepared, Workspace, find_made, list_row_paths, prepare
from appliance.recipe import Recipe
from appliance.release import judge_alias
from appliance.run import STAGES, open_run
from appliance.store import Store

UNASKED = "the registry was not asked for a version"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What reconcile did, or would do, for one recipe, and why."""

    recipe: str
    action: Literal["none", "train", "failed"]
    reason: str
    finished: Finished | None = None
    error: ApplianceError | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which recipes are looked at, and how. `since`: only those that changed after that commit."""

    only: tuple[str, ...] = ()
    since: str | None = None
    force: bool = False
    allow_dirty: bool = False
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Desire:
    """The repository's side: what every recipe of one reconcile shares.

    `held`: the files of the pointer's data, `None` where other data is on this disk. `changes`: as `find_changes`.
    """

    workspace: Workspace
    store: Store
    origin: Origin
    choice: Choice
    pointer: Pointer
    held: dict[str, str] | None
    changes: dict[str, str]


def reconcile(
    workspace: Workspace,
    *,
    store: Store,
    actor: str,
    choice: Choice,
    dry_run: bool = False,
) -> tuple[Outcome, ...]:
    """Bring the registry to what the repository's HEAD asks for; one outcome per recipe.

    Raises `ApplianceError` when the repository itself cannot be read, and `InterruptedRunError` at
    once when a signal stops a run.
    """
    origin = read_commit(workspace.root, actor=actor)
    changes = find_changes(workspace.root)
    if POINTER in changes and not choice.allow_dirty:
        raise CommandError(describe_unheld(workspace.root, {POINTER: changes[POINTER]}))
    paths = find_recipes(workspace.root, only=choice.only)
    reasons = find_touched(workspace.root, paths, since=choice.since)
    if not any(reasons.values()):
        return tuple(_skip(path, choice.since) for path in paths)
    _note_detached(workspace)
    desire = _Desire(workspace, store, origin, choice, load_pointer(workspace.root / POINTER), None, changes)
    recipes = load_recipes(workspace.root)
    known = {
        path: _keep_unseen(path, recipes[path], desire=desire, dry_run=dry_run)
        if reasons[path]
        else _skip(path, choice.since)
        for path in paths
    }
    if not all(known.values()):
        desire = replace(desire, held=_bring_data(desire))
    outcomes = tuple(
        outcome or _reconcile_one(path, recipes[path], desire=desire, dry_run=dry_run)
        for path, outcome in known.items()
    )
    return _doubt(outcomes, desire=desire) if dry_run and not choice.allow_dirty else outcomes


def plan_from_git(
    root: Path, *, only: Sequence[str] = (), since: str | None = None, unasked: str = UNASKED
) -> tuple[Outcome, ...]:
    """What a reconcile would look at, from Git alone: neither data nor registry is asked, which `unasked` says."""
    paths = find_recipes(root, only=only)
    load_pointer(root / POINTER)
    recipes = load_recipes(root)
    return tuple(
        _plan_from_git(path, recipes[path], touched, root=root, unasked=unasked)
        if touched or isinstance(recipes[path], ApplianceError)
        else _skip(path, since)
        for path, touched in find_touched(root, paths, since=since).items()
    )


def find_unclaimed(root: Path, store: Store) -> tuple[str, ...]:
    """Models of the registry that no readable recipe names: a recipe was renamed or deleted, or is elsewhere."""
    recipes = load_recipes(root).values()
    claimed = {r.name for r in recipes if isinstance(r, Recipe)}
    if len(claimed) < len(recipes):
        return ()  # one that cannot be read may be the one that claims; its own outcome says what is wrong
    return tuple(name for name in registry.list_names(store) if name not in claimed)


def _find_origin(path: Path, recipe: Recipe, *, desire: _Desire) -> Origin:
    """The last commit that touched what the recipe is made from, all of which HEAD holds.

    Raises `CommandError` where HEAD does not; with `--allow-dirty` there is no commit then.
    """
    root, out, name = desire.workspace.root, desire.pointer.out, f"recipes/{path.name}"
    faults = {n: fault for n, fault in desire.changes.items() if n in (name, POINTER)}
    places = [find_place(root, rows) for rows in list_row_paths(recipe)]
    for place in places:
        faults |= find_unheld_rows(root, place, out=out, held=desire.held or ())
    if faults and not desire.choice.allow_dirty:
        raise CommandError(describe_unheld(root, faults))
    if faults:
        return replace(desire.origin, commit=None, head=None, unheld=": ".join(next(iter(faults.items()))))
    in_git = [place for place in places if not Path(place).is_relative_to(out)]
    return read_commit(root, actor=desire.origin.actor, places=in_git) if in_git else desire.origin


def _note_detached(workspace: Workspace) -> None:
    head = run_command(["git", "rev-parse", "--abbrev-ref", "HEAD"], cwd=workspace.root).strip()
    if head == "HEAD":
        workspace.note("HEAD is detached: this commit is what is asked for; it never replaces a newer one's version")


def _bring_data(desire: _Desire) -> dict[str, str] | None:
    """The pointer's files, proven; with `allow_dirty` what is there as it is, and `None` where it is other data."""
    root, pointer = desire.workspace.root, desire.pointer
    if desire.choice.allow_dirty and (root / pointer.out).is_dir():
        return read_listing(pointer, root)
    return pull_data(pointer, root=root)


def _skip(path: Path, since: str | None) -> Outcome:
    reason = f"neither it nor {POINTER} changed since {str(since)[:12]}"
    return Outcome(recipe=path.stem, action="none", reason=reason)


def _settle(path: Path, made: Outcome | ApplianceError) -> Outcome:
    if isinstance(made, Outcome):
        return made
    return Outcome(recipe=path.stem, action="failed", reason=str(made), error=made)


def _plan_from_git(path: Path, recipe: Recipe | ApplianceError, touched: str, *, root: Path, unasked: str) -> Outcome:
    if isinstance(recipe, ApplianceError):
        return _settle(path, recipe)
    for rows in list_row_paths(recipe):
        astray = find_astray(root, find_place(root, rows))
        if astray:
            return _settle(path, CommandError("".join(f"{root / name}: {fault}" for name, fault in astray.items())))
    return Outcome(recipe=path.stem, action="train", reason=f"{touched}; {unasked}")


def _reconcile_one(path: Path, recipe: Recipe | ApplianceError, *, desire: _Desire, dry_run: bool) -> Outcome:
    if isinstance(recipe, ApplianceError):
        return _settle(path, recipe)
    return _settle(path, attempt(path, partial(_bring, path, recipe, desire=desire, dry_run=dry_run)))


def _bring(path: Path, recipe: Recipe, *, desire: _Desire, dry_run: bool) -> Outcome:
    """Bring the registry to what one recipe asks for."""
    desire = replace(desire, origin=_find_origin(path, recipe, desire=desire))
    prepared = prepare(recipe, workspace=desire.workspace)
    versions = registry.list_versions(desire.store, recipe.name)
    is_committed = desire.origin.commit is not None
    version = registry.select_run(versions, prepared.key, is_committed=is_committed)
    if version is not None and not desire.choice.force:
        return _keep(path, recipe, version, key=prepared.key, desire=desire, dry_run=dry_run)
    reason = explain(prepared, versions, workspace=desire.workspace, is_forced=version is not None)
    if dry_run:
        return Outcome(recipe=path.stem, action="train", reason=reason)
    desire.workspace.note(f"{path.stem}: {reason}")
    return _make(path, prepared, reason, desire=desire)


def _doubt(outcomes: tuple[Outcome, ...], *, desire: _Desire) -> tuple[Outcome, ...]:
    """What a dry run says, with what a training would ask first: whether others can pull the data."""
    if all(o.action != "train" for o in outcomes):
        return outcomes
    try:
        check_pushed(desire.pointer, root=desire.workspace.root)
    except UnreachableDataError as fault:
        desire.workspace.note(f"not known from here whether others can pull the data: {fault}")
    except DatasetError as fault:
        failed = Outcome(recipe="", action="failed", reason=str(fault), error=fault)
        return tuple(replace(failed, recipe=o.recipe) if o.action == "train" else o for o in outcomes)
    return outcomes


def _keep_unseen(path: Path, recipe: Recipe | ApplianceError, *, desire: _Desire, dry_run: bool) -> Outcome | None:
    """The outcome of a recipe that has its version, without the data; `None` where the data is needed to tell."""
    choice, out = desire.choice, desire.pointer.out
    is_seen = (desire.workspace.root / out).exists() or f"recipes/{path.name}" in desire.changes
    if isinstance(recipe, ApplianceError) or is_seen or choice.force or choice.allow_dirty:
        return None
    found = attempt(path, partial(_find_unseen, path, recipe, desire=desire, dry_run=dry_run))
    return None if isinstance(found, ApplianceError) else found  # told in its place, among what else is wrong


def _find_unseen(path: Path, recipe: Recipe, *, desire: _Desire, dry_run: bool) -> Outcome | None:
    if not Path(find_place(desire.workspace.root, recipe.dataset.path)).is_relative_to(desire.pointer.out):
        return None
    made = find_made(recipe, pointer=POINTER, workspace=desire.workspace, store=desire.store)
    return _keep(path, recipe, made[0], key=made[1], desire=desire, dry_run=dry_run) if made else None


def _keep(path: Path, recipe: Recipe, version: str, *, key: str, desire: _Desire, dry_run: bool) -> Outcome:
    """Nothing to train; the alias is where HEAD asks it to be: a promotion that was lost is made up for."""
    workspace, store, origin = desire.workspace, desire.store, desire.origin
    finished = None
    if dry_run:
        manifest = registry.load_manifest(store, recipe.name, version)
        note = judge_alias(recipe, version, manifest, store=store, origin=origin, root=workspace.root).note
    else:
        finished = finish_published(recipe, version, key=key, workspace=workspace, store=store, origin=origin)
        note = finished.note
    reason = f"{version} was made from this recipe, data and base"
    return Outcome(recipe=path.stem, action="none", reason=f"{reason}; {note}" if note else reason, finished=finished)


def _make(path: Path, prepared: Prepared, reason: str, *, desire: _Desire) -> Outcome:
    """Train as the only one; whoever had to wait looks again whether it is still needed."""
    workspace, choice = desire.workspace, desire.choice
    if not choice.allow_dirty:
        check_pushed(desire.pointer, root=workspace.root)
    name, actor = prepared.recipe.name, desire.origin.actor
    with registry.hold_model(desire.store, name, folder=workspace.runs, actor=actor, wait_s=choice.wait_s):
        finished = run_prepared(
            prepared, workspace=workspace, store=desire.store, origin=desire.origin, force=choice.force
        )
    if finished.was_done:
        reason = f"{finished.version} was made meanwhile by another reconcile"
    if finished.note:
        reason = f"{reason}; {finished.note}"
    return Outcome(recipe=path.stem, action="none" if finished.was_done else "train", reason=reason, finished=finished)


def explain(
    prepared: Prepared, versions: Sequence[registry.VersionInfo], *, workspace: Workspace, is_forced: bool
) -> str:
    """Why a recipe trains: what differs from the newest of its versions, and how far an interrupted run came."""
    run = open_run(workspace.runs, name=prepared.recipe.name, key=prepared.key)
    done = [] if is_forced else [s for s in STAGES if run.is_done(s)]
    going_on = f"; goes on after the stage {done[-1]} of an interrupted run" if done else ""
    if is_forced:
        return "has a version, is made again because of --force"
    if not versions:
        return f"has no version yet{going_on}"
    uncommitted = registry.select_run(versions, prepared.key)
    if uncommitted is not None:
        how = "is published again" if "train" in done else "is made again"
        return f"{how} with its commit: {uncommitted} was made from files that were not committed"
    last = versions[-1]
    changes = []
    if last.manifest.data_digest != prepared.dataset.digest:
        changes.append("the data")
    if last.manifest.recipe_digest != prepared.recipe.digest:
        changes.append(f"the recipe ({', '.join(_differ(last.manifest.recipe, prepared.recipe)) or 'its format'})")
    if last.manifest.base.get("revision") != prepared.base.revision:
        changes.append("the base model")
    what = " and ".join(changes) or "the base model's files"
    return f"{what} changed since {last.version}{going_on}"


def _differ(before: dict[str, Any], recipe: Recipe) -> list[str]:
    """The dotted keys in which two recipes differ."""
    old, new = _flatten(before), _flatten(recipe.model_dump(mode="json", exclude={"needs"}))
    return sorted(k for k in {*old, *new} if old.get(k) != new.get(k) and not k.startswith("needs."))


def _flatten(values: dict[str, Any], lead: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{lead}{key}.") if isinstance(value, dict) else {f"{lead}{key}": value}
    return flat
