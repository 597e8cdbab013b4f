"""Desired state (recipes x dataset commit) against actual state (the registry), and the difference made.

Level-triggered and idempotent: a push, a schedule and a person all call this, and it trains only
what has no version yet. A recipe that fails does not stop the others, and each says why it trains or
does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from appliance import registry
from appliance.command import run_command
from appliance.data import Pointer, check_pushed, is_current, load_pointer, pull_data
from appliance.errors import (
    ApplianceError,
    CommandError,
    InterruptedRunError,
    RecipeError,
    StoreError,
    UnexpectedError,
    describe_place,
)
from appliance.pipeline import Finished, finish_published, run_prepared
from appliance.preparation import Origin, Prepared, Workspace, prepare
from appliance.recipe import Recipe, load_recipe
from appliance.release import judge_alias
from appliance.run import STAGES, open_run
from appliance.store import Store

POINTER = "datasets.dvc"
_NOWHERE = "0" * 40  # what a push event calls the commit before the first
_T = TypeVar("_T")


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
    """The repository's side: what every recipe of one reconcile shares."""

    workspace: Workspace
    store: Store
    origin: Origin
    choice: Choice
    pointer: Pointer
    unproven: bool  # the data was on this disk already, so nothing shows that others can pull it


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
    origin = read_origin(workspace.root, actor=actor)
    if not allow_dirty and origin.commit is None:
        names = ", ".join(find_changes(workspace.root)[:5])
        raise CommandError(
            f"{workspace.root}: not committed: {names}; commit it, or give --allow-dirty to train on it as it is"
        )
    paths = find_recipes(workspace.root, only=only)
    reasons = find_touched(workspace.root, paths, since=since)
    if not any(reasons.values()):
        return tuple(_skip(path, since) for path in paths)
    _note_detached(workspace)
    desire = _bring_data(workspace, store=store, origin=origin, choice=choice)
    recipes = load_recipes(workspace.root)
    return tuple(
        _reconcile_one(path, recipes[path], desire=desire, dry_run=dry_run) if reasons[path] else _skip(path, since)
        for path in paths
    )


def plan_from_git(root: Path, *, only: Sequence[str] = (), since: str | None = None) -> tuple[Outcome, ...]:
    """What a reconcile would look at, from Git alone: neither data nor registry is asked."""
    paths = find_recipes(root, only=only)
    load_pointer(root / POINTER)
    recipes = load_recipes(root)
    return tuple(
        _plan_from_git(path, recipes[path], touched, since=since)
        for path, touched in find_touched(root, paths, since=since).items()
    )


def find_unclaimed(root: Path, store: Store) -> tuple[str, ...]:
    """Models of the registry that no readable recipe names: a recipe was renamed or deleted, or is elsewhere."""
    recipes = load_recipes(root).values()
    claimed = {r.name for r in recipes if isinstance(r, Recipe)}
    if len(claimed) < len(recipes):
        return ()  # one that cannot be read may be the one that claims; its own outcome says what is wrong
    return tuple(name for name in registry.list_names(store) if name not in claimed)


def read_origin(root: Path, *, actor: str) -> Origin:
    """The last commit that touched a recipe or the data pointer.

    It is not named as the origin when one of them has changed since. Raises `CommandError` outside
    a repository, and where a shallow clone hides which commit it was.
    """
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
        line = run_command([*command, "--", "recipes", POINTER], cwd=root, env={"TZ": "UTC"}).strip()
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
    if find_changes(root):
        return Origin(commit=None, time=time, actor=actor)
    head = run_command(["git", "rev-parse", "HEAD"], cwd=root).strip()
    return Origin(commit=commit, time=time, actor=actor, head=head)


def find_changes(root: Path) -> list[str]:
    """Recipes and the data pointer, where they are not as they were committed."""
    command = ["git", "status", "--porcelain", "--", "recipes", POINTER]
    return [line[3:] for line in run_command(command, cwd=root).splitlines()]


def find_recipes(root: Path, *, only: Sequence[str] = ()) -> list[Path]:
    """`recipes/*.yaml`, or those whose file name is in `only`."""
    paths = sorted((root / "recipes").glob("*.yaml"))
    if not paths:
        found = f", only {', '.join(find_ignored(root))}" if find_ignored(root) else ""
        raise RecipeError(f"{root / 'recipes'}: no *.yaml here{found}; add a recipe (see recipes/examples)")
    unknown = sorted(set(only) - {p.stem for p in paths})
    if unknown:
        raise RecipeError(f"--only {unknown[0]}: no such recipe; there are {', '.join(p.stem for p in paths)}")
    return [p for p in paths if not only or p.stem in only]


def find_ignored(root: Path) -> tuple[str, ...]:
    """Files that look like recipes and are not read: another ending, or another folder than `recipes/examples`."""
    folder = root / "recipes"
    found = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.suffix in (".yml", ".yaml") and p.is_file())
    return tuple(
        f"recipes/{p.as_posix()}"
        for p in found
        if (p.suffix == ".yml" or len(p.parts) > 1) and p.parts[0] != "examples"
    )


def load_recipes(root: Path) -> dict[Path, Recipe | ApplianceError]:
    """`recipes/*.yaml`, each read once: the recipe, or why it is none. Two with one model name are both refused."""
    read = {path: _attempt(path, partial(load_recipe, path)) for path in sorted((root / "recipes").glob("*.yaml"))}
    owners: dict[str, list[Path]] = {}
    for path, found in read.items():
        if isinstance(found, Recipe):
            owners.setdefault(found.name, []).append(path)
    for name, paths in owners.items():
        for path in paths if len(paths) > 1 else ():
            other = next(p for p in paths if p != path)
            read[path] = RecipeError(f"{path}: name {name} is also the name in {other}; one model, one recipe")
    return read


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
    command = [
        "git",
        "diff",
        "--relative",
        "--name-only",
        "--no-renames",
        "-z",
        since,
        "HEAD",
        "--",
        "recipes",
        POINTER,
    ]
    changed = set(run_command(command, cwd=root).split("\0"))  # from `root`, which may be below the work tree's top
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


def _bring_data(workspace: Workspace, *, store: Store, origin: Origin, choice: Choice) -> _Desire:
    """The data of the pointer, proven; with `allow_dirty`, what is there as it is, and then without an origin."""
    pointer = load_pointer(workspace.root / POINTER)
    if choice.allow_dirty and (workspace.root / pointer.out).is_dir():
        if not is_current(pointer, workspace.root):
            origin = replace(origin, commit=None, head=None)
        return _Desire(workspace, store, origin, choice, pointer, unproven=False)
    unproven = pull_data(pointer, root=workspace.root) == "here"
    return _Desire(workspace, store, origin, choice, pointer, unproven=unproven and not choice.allow_dirty)


def _skip(path: Path, since: str | None) -> Outcome:
    reason = f"neither it nor {POINTER} changed since {str(since)[:12]}"
    return Outcome(recipe=path.stem, action="none", reason=reason)


def _attempt(path: Path, work: Callable[[], _T]) -> _T | ApplianceError:
    """What `work` makes of one recipe, or the error that ended it; only a signal ends the work on all of them."""
    try:
        return work()
    except InterruptedRunError:
        raise
    except ApplianceError as fault:
        return fault
    except Exception as fault:  # noqa: BLE001 - a bug that one recipe meets must not stop those of other people
        words = describe_place(fault)
        error: ApplianceError = StoreError(words) if words else UnexpectedError(_describe_bug(path, fault))
        error.__cause__ = fault
        return error


def _describe_bug(path: Path, fault: Exception) -> str:
    first = next(iter(str(fault).splitlines()), "")
    return f"{path}: a bug in the appliance met it: {type(fault).__name__}: {first[:200]}; report it with the traceback"


def _settle(path: Path, made: Outcome | ApplianceError) -> Outcome:
    if isinstance(made, Outcome):
        return made
    return Outcome(recipe=path.stem, action="failed", reason=str(made), error=made)


def _plan_from_git(path: Path, recipe: Recipe | ApplianceError, touched: str, *, since: str | None) -> Outcome:
    if isinstance(recipe, ApplianceError):
        return _settle(path, recipe)
    if not touched:
        return _skip(path, since)
    return Outcome(recipe=path.stem, action="train", reason=f"{touched}; the registry was not asked for a version")


def _reconcile_one(path: Path, recipe: Recipe | ApplianceError, *, desire: _Desire, dry_run: bool) -> Outcome:
    if isinstance(recipe, ApplianceError):
        return _settle(path, recipe)
    return _settle(path, _attempt(path, partial(_bring, path, recipe, desire=desire, dry_run=dry_run)))


def _bring(path: Path, recipe: Recipe, *, desire: _Desire, dry_run: bool) -> Outcome:
    """Bring the registry to what one recipe asks for."""
    prepared = prepare(recipe, workspace=desire.workspace)
    versions = registry.list_versions(desire.store, recipe.name)
    version = registry.select_run(versions, prepared.key)
    if version is not None and not desire.choice.force:
        return _keep(path, prepared, version, desire=desire, dry_run=dry_run)
    reason = explain(prepared, versions, workspace=desire.workspace, is_forced=version is not None)
    if dry_run:
        return Outcome(recipe=path.stem, action="train", reason=reason)
    desire.workspace.note(f"{path.stem}: {reason}")
    return _make(path, prepared, reason, desire=desire)


def _keep(path: Path, prepared: Prepared, version: str, *, desire: _Desire, dry_run: bool) -> Outcome:
    """Nothing to train; the alias is where HEAD asks it to be: a promotion that was lost is made up for."""
    workspace, store, origin = desire.workspace, desire.store, desire.origin
    finished = None
    if dry_run:
        manifest = registry.load_manifest(store, prepared.recipe.name, version)
        note = judge_alias(prepared.recipe, version, manifest, store=store, origin=origin, root=workspace.root).note
    else:
        finished = finish_published(prepared, version, workspace=workspace, store=store, origin=origin)
        note = finished.note
    reason = f"{version} was made from this recipe, data and base"
    return Outcome(recipe=path.stem, action="none", reason=f"{reason}; {note}" if note else reason, finished=finished)


def _make(path: Path, prepared: Prepared, reason: str, *, desire: _Desire) -> Outcome:
    """Train as the only one; whoever had to wait looks again whether it is still needed."""
    workspace, choice = desire.workspace, desire.choice
    if desire.unproven:
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
