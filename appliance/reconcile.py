"""Desired state (recipes x dataset commit) against actual state (the registry), and the difference made.

Level-triggered and idempotent: a push, a schedule and a person all call this, and it trains only
what has no version yet. A recipe that fails does not stop the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance import registry
from appliance.command import run_command
from appliance.data import load_pointer, pull_data
from appliance.errors import ApplianceError, CommandError, InterruptedRunError, RecipeError
from appliance.pipeline import Finished, run_recipe
from appliance.preparation import Origin, Workspace, prepare
from appliance.recipe import Recipe, load_recipe
from appliance.store import Store

POINTER = "datasets.dvc"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What reconcile did, or would do, for one recipe, and why."""

    recipe: str
    action: str  # "none" | "train" | "failed"
    reason: str
    finished: Finished | None = None
    error: ApplianceError | None = None


def reconcile(
    workspace: Workspace,
    *,
    store: Store,
    actor: str,
    only: Sequence[str] = (),
    dry_run: bool = False,
    force: bool = False,
    allow_dirty: bool = False,
) -> tuple[Outcome, ...]:
    """Bring the registry to what the repository's HEAD asks for; one outcome per recipe.

    Raises `ApplianceError` when the repository itself cannot be read, and `InterruptedRunError` at
    once when a signal stops a run.
    """
    origin = read_origin(workspace.root, actor=actor)
    if not allow_dirty and origin.commit is None:
        names = ", ".join(find_changes(workspace.root)[:5])
        raise CommandError(
            f"{workspace.root}: not committed: {names}; commit it, or give --allow-dirty to train on it as it is"
        )
    recipes = find_recipes(workspace.root, only=only)
    pull_data(load_pointer(workspace.root / POINTER), root=workspace.root)
    return tuple(
        _reconcile_one(path, workspace=workspace, store=store, origin=origin, dry_run=dry_run, force=force)
        for path in recipes
    )


def read_origin(root: Path, *, actor: str) -> Origin:
    """The last commit that touched a recipe or the data pointer.

    It is not named as the origin when one of them has changed since. Raises `CommandError` outside
    a repository.
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
        raise CommandError(f"{root}: no commit touches recipes/ or {POINTER}; commit a recipe and a dataset first")
    commit, _, time = line.partition(" ")
    return Origin(commit=None if find_changes(root) else commit, time=time, actor=actor)


def find_changes(root: Path) -> list[str]:
    """Recipes and the data pointer, where they are not as they were committed."""
    command = ["git", "status", "--porcelain", "--", "recipes", POINTER]
    return [line[3:] for line in run_command(command, cwd=root).splitlines()]


def find_recipes(root: Path, *, only: Sequence[str] = ()) -> list[Path]:
    """`recipes/*.yaml`, or those whose file or model name is in `only`; two with one model name are refused."""
    paths = sorted((root / "recipes").glob("*.yaml"))
    if not paths:
        raise RecipeError(f"{root / 'recipes'}: no *.yaml here; add a recipe (see recipes/examples)")
    unknown = sorted(set(only) - {p.stem for p in paths})
    if unknown:
        raise RecipeError(f"--only {unknown[0]}: no such recipe; there are {', '.join(p.stem for p in paths)}")
    return [p for p in paths if not only or p.stem in only]


def _reconcile_one(
    path: Path, *, workspace: Workspace, store: Store, origin: Origin, dry_run: bool, force: bool
) -> Outcome:
    try:
        recipe = load_recipe(path)
        _check_unique(recipe, path)
        if dry_run:
            return _plan_one(path, recipe, workspace=workspace, store=store, force=force)
        finished = run_recipe(recipe, workspace=workspace, store=store, origin=origin, force=force)
    except InterruptedRunError:
        raise
    except ApplianceError as fault:
        return Outcome(recipe=path.stem, action="failed", reason=str(fault), error=fault)
    if finished.was_done:
        reason = f"{finished.version} was made from this recipe, data and base"
        return Outcome(recipe=path.stem, action="none", reason=reason, finished=finished)
    return Outcome(recipe=path.stem, action="train", reason="had no version for this commit", finished=finished)


def _plan_one(path: Path, recipe: Recipe, *, workspace: Workspace, store: Store, force: bool) -> Outcome:
    prepared = prepare(recipe, workspace=workspace)
    version = registry.find_run(store, recipe.name, prepared.key)
    if version is not None and not force:
        return Outcome(recipe=path.stem, action="none", reason=f"{version} was made from this recipe, data and base")
    return Outcome(recipe=path.stem, action="train", reason=f"no version for run {prepared.key[:12]}")


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
