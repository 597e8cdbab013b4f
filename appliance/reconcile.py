"""Desired state (recipes x dataset commit) against actual state (the registry), and the difference made.

Level-triggered and idempotent: a push, a schedule and a person all call this, and it trains only
what has no version yet. A recipe that fails does not stop the others, and each says why it trains or
does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from appliance import registry
from appliance.command import run_command
from appliance.data import (
    Pointer,
    check_pushed,
    describe_unheld,
    find_place,
    find_uncommitted,
    find_unheld_rows,
    load_pointer,
    pull_data,
    read_listing,
)
from appliance.errors import (
    ApplianceError,
    CommandError,
    DatasetError,
    InterruptedRunError,
    RecipeError,
    UnreachableDataError,
)
from appliance.pipeline import Finished, finish_published, run_prepared
from appliance.preparation import Origin, Prepared, Workspace, find_made, list_row_paths, prepare
from appliance.recipe import Recipe, load_recipe
from appliance.run import STAGES, open_run
from appliance.store import Store

POINTER = "datasets.dvc"
_NOWHERE = "0" * 40  # what a push event calls the commit before the first


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
    only: Sequence[str] = (),
    since: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    allow_dirty: bool = False,
    wait_s: float = 0.0,
) -> tuple[Outcome, ...]:
    """Bring the registry to what the repository's HEAD asks for; one outcome per recipe.

    Raises `ApplianceError` when the repository itself cannot be read, and `InterruptedRunError` at
    once when a signal stops a run.
    """
    choice = Choice(only=tuple(only), since=since, force=force, allow_dirty=allow_dirty, wait_s=wait_s)
    origin = _read_commit(workspace.root, actor=actor)
    changes = find_changes(workspace.root)
    if POINTER in changes and not allow_dirty:
        raise CommandError(describe_unheld(workspace.root, {POINTER: changes[POINTER]}))
    recipes = find_recipes(workspace.root, only=only)
    reasons = find_touched(workspace.root, recipes, since=since)
    if not any(reasons.values()):
        return tuple(_skip(path, since) for path in recipes)
    _note_detached(workspace)
    desire = _Desire(workspace, store, origin, choice, load_pointer(workspace.root / POINTER), None, changes)
    known = {
        path: _keep_unseen(path, desire=desire, dry_run=dry_run) if reasons[path] else _skip(path, since)
        for path in recipes
    }
    if not all(known.values()):
        desire = replace(desire, held=_bring_data(desire))
    outcomes = tuple(outcome or _reconcile_one(path, desire=desire, dry_run=dry_run) for path, outcome in known.items())
    return _doubt(outcomes, desire=desire) if dry_run and not allow_dirty else outcomes


def plan_from_git(root: Path, *, only: Sequence[str] = (), since: str | None = None) -> tuple[Outcome, ...]:
    """What a reconcile would look at, from Git alone: neither data nor registry is asked."""
    recipes = find_recipes(root, only=only)
    load_pointer(root / POINTER)
    return tuple(
        _plan_from_git(path, touched, since=since) for path, touched in find_touched(root, recipes, since=since).items()
    )


def find_unclaimed(root: Path, store: Store) -> tuple[str, ...]:
    """Models of the registry that no readable recipe names: a recipe was renamed or deleted, or is elsewhere."""
    claimed = set()
    for path in (root / "recipes").glob("*.yaml"):
        try:
            claimed.add(load_recipe(path).name)
        except RecipeError:
            return ()  # it may be the one that claims; its own outcome says what is wrong
    return tuple(name for name in registry.list_names(store) if name not in claimed)


def read_origin(root: Path, *, actor: str) -> Origin:
    """The last commit that touched a recipe or the data pointer.

    It is not named as the origin when one of them has changed since. Raises `CommandError` outside
    a repository, and where a shallow clone hides which commit it was.
    """
    origin = _read_commit(root, actor=actor)
    return replace(origin, commit=None) if find_changes(root) else origin


def _read_commit(root: Path, *, actor: str, places: Sequence[str] = ()) -> Origin:
    """The last commit that touched a recipe, the data pointer or one of the `places`."""
    command = [
        "git",
        "-c",
        "log.showSignature=false",
        "log",
        "-1",
        "--format=%H %cd",
        "--date=format-local:%Y-%m-%dT%H:%M:%SZ",
    ]
    try:
        line = run_command([*command, "--", "recipes", POINTER, *places], cwd=root, env={"TZ": "UTC"}).strip()
    except CommandError as fault:
        raise CommandError(
            f"{root}: not a Git repository with a commit; run it in the team's repository ({fault})"
        ) from fault
    if not line:
        raise CommandError(
            f"{root}: no commit touches recipes/ or {POINTER} here; commit a recipe and a dataset first, "
            "or start in the repository's root (--root)"
        )
    commit, _, time = line.partition(" ")
    if commit in _read_cut_commits(root):
        raise CommandError(
            f"{root}: a shallow clone whose history ends at {commit[:12]}, so the commit that made recipes and data "
            "what they are is not known; `git fetch --unshallow` (in a workflow: fetch-depth: 0)"
        )
    return Origin(commit=commit, time=time, actor=actor)


def find_changes(root: Path) -> dict[str, str]:
    """Recipes and the data pointer, where they are not what HEAD holds, and what to do about each."""
    recipes = [f"recipes/{p.name}" for p in sorted((root / "recipes").glob("*.yaml"))]
    return find_uncommitted(root, [*recipes, POINTER])


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
        return replace(desire.origin, commit=None)
    in_git = [place for place in places if not Path(place).is_relative_to(out)]
    return _read_commit(root, actor=desire.origin.actor, places=in_git) if in_git else desire.origin


def find_recipes(root: Path, *, only: Sequence[str] = ()) -> list[Path]:
    """`recipes/*.yaml`, or those whose file name is in `only`; two with one model name are refused."""
    paths = sorted((root / "recipes").glob("*.yaml"))
    if not paths:
        raise RecipeError(f"{root / 'recipes'}: no *.yaml here; add a recipe (see recipes/examples)")
    unknown = sorted(set(only) - {p.stem for p in paths})
    if unknown:
        raise RecipeError(f"--only {unknown[0]}: no such recipe; there are {', '.join(p.stem for p in paths)}")
    return [p for p in paths if not only or p.stem in only]


def find_touched(root: Path, recipes: Sequence[Path], *, since: str | None) -> dict[Path, str]:
    """What changed for each recipe after the commit `since`, in words; empty when nothing did.

    Without a commit to compare with (`None`, or the zeros of a first push) every recipe counts. Raises
    `CommandError` for one that this clone does not have.
    """
    if since is None or since == _NOWHERE:
        return dict.fromkeys(recipes, "every recipe is looked at")
    try:
        run_command(["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{since}^{{commit}}"], cwd=root)
    except CommandError as fault:
        raise CommandError(
            f"--since {since}: no such commit in {root}; give one of its history (`git log`), "
            "and fetch all of it (in a workflow: fetch-depth: 0)"
        ) from fault
    command = ["git", "diff", "--name-only", "--no-renames", "-z", since, "HEAD", "--", "recipes", POINTER]
    changed = set(run_command(command, cwd=root).split("\0"))
    data = f"{POINTER} changed since {since[:12]}" if POINTER in changed else ""
    return {p: f"the recipe changed since {since[:12]}" if f"recipes/{p.name}" in changed else data for p in recipes}


def _read_cut_commits(root: Path) -> set[str]:
    """The commits at which a shallow clone's history ends."""
    file = root / run_command(["git", "rev-parse", "--git-path", "shallow"], cwd=root).strip()
    return set(file.read_text("ascii").split()) if file.is_file() else set()


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


def _plan_from_git(path: Path, touched: str, *, since: str | None) -> Outcome:
    try:
        _check_unique(load_recipe(path), path)
    except RecipeError as fault:
        return Outcome(recipe=path.stem, action="failed", reason=str(fault), error=fault)
    if not touched:
        return _skip(path, since)
    return Outcome(recipe=path.stem, action="train", reason=f"{touched}; the registry was not asked for a version")


def _reconcile_one(path: Path, *, desire: _Desire, dry_run: bool) -> Outcome:
    try:
        recipe = load_recipe(path)
        _check_unique(recipe, path)
        desire = replace(desire, origin=_find_origin(path, recipe, desire=desire))
        prepared = prepare(recipe, workspace=desire.workspace)
        version = registry.find_run(desire.store, recipe.name, prepared.key)
        if version is not None and not desire.choice.force:
            return _keep(path, recipe, version, key=prepared.key, desire=desire, dry_run=dry_run)
        reason = explain(prepared, desire.store, workspace=desire.workspace, is_forced=version is not None)
        if dry_run:
            return Outcome(recipe=path.stem, action="train", reason=reason)
        desire.workspace.note(f"{path.stem}: {reason}")
        return _make(path, prepared, reason, desire=desire)
    except InterruptedRunError:
        raise
    except ApplianceError as fault:
        return Outcome(recipe=path.stem, action="failed", reason=str(fault), error=fault)


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


def _keep_unseen(path: Path, *, desire: _Desire, dry_run: bool) -> Outcome | None:
    """The outcome of a recipe that has its version, without the data; `None` where the data is needed to tell."""
    workspace, choice, out = desire.workspace, desire.choice, desire.pointer.out
    if (
        choice.force
        or choice.allow_dirty
        or (workspace.root / out).exists()
        or f"recipes/{path.name}" in desire.changes
    ):
        return None
    try:
        recipe = load_recipe(path)
        _check_unique(recipe, path)
        if not Path(find_place(workspace.root, recipe.dataset.path)).is_relative_to(out):
            return None
        made = find_made(recipe, pointer=POINTER, workspace=workspace, store=desire.store)
        return _keep(path, recipe, made[0], key=made[1], desire=desire, dry_run=dry_run) if made else None
    except ApplianceError:  # told in its place, among what else is wrong
        return None


def _keep(path: Path, recipe: Recipe, version: str, *, key: str, desire: _Desire, dry_run: bool) -> Outcome:
    """Nothing to train; a promotion that was lost between two steps is made up for."""
    finished = None
    if not dry_run:
        finished = finish_published(
            recipe, version, key=key, workspace=desire.workspace, store=desire.store, origin=desire.origin
        )
    reason = f"{version} was made from this recipe, data and base"
    return Outcome(recipe=path.stem, action="none", reason=reason, finished=finished)


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
    return Outcome(recipe=path.stem, action="none" if finished.was_done else "train", reason=reason, finished=finished)


def explain(prepared: Prepared, store: Store, *, workspace: Workspace, is_forced: bool) -> str:
    """Why a recipe trains: what differs from its newest version, and how far an interrupted run came."""
    run = open_run(workspace.runs, name=prepared.recipe.name, key=prepared.key)
    done = [] if is_forced else [s for s in STAGES if run.is_done(s)]
    going_on = f"; goes on after the stage {done[-1]} of an interrupted run" if done else ""
    if is_forced:
        return "has a version, is made again because of --force"
    versions = registry.list_versions(store, prepared.recipe.name)
    if not versions:
        return f"has no version yet{going_on}"
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


def _check_unique(recipe: Recipe, path: Path) -> None:
    for other in sorted(path.parent.glob("*.yaml")):
        if other == path:
            continue
        try:
            twin = load_recipe(other).name == recipe.name
        except RecipeError:
            continue  # it is reported as its own outcome
        if twin:
            raise RecipeError(f"{path}: name {recipe.name} is also the name in {other}; one model, one recipe")
