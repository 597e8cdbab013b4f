"""Desired state: the recipes and the data commit that Git's HEAD asks for, and what changed since an earlier one.

Only Git and the files are asked. What one recipe's author wrote wrong is that recipe's own answer, and
stops no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from appliance.command import run_command
from appliance.data import find_place, find_uncommitted, find_unheld_rows, load_pointer, read_listing
from appliance.errors import (
    ApplianceError,
    CommandError,
    DatasetError,
    RecipeError,
    StoreError,
    UnexpectedError,
    describe_place,
)
from appliance.preparation import Origin, list_row_paths
from appliance.recipe import Recipe, load_recipe

POINTER = "datasets.dvc"
_NOWHERE = "0" * 40  # what a push event calls the commit before the first
_T = TypeVar("_T")


def read_origin(root: Path, *, actor: str) -> Origin:
    """The last commit that touched a recipe or the data pointer.

    It is not named as the origin when one of them has changed since. Raises `CommandError` outside
    a repository, and where a shallow clone hides which commit it was.
    """
    origin = read_commit(root, actor=actor)
    return replace(origin, commit=None, head=None) if find_changes(root) else origin


def read_commit(root: Path, *, actor: str, places: Sequence[str] = ()) -> Origin:
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
        raise CommandError(f"{root}: {_describe_no_commit(root)}") from fault
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
    head = run_command(["git", "rev-parse", "HEAD"], cwd=root).strip()
    return Origin(commit=commit, time=time, actor=actor, head=head)


def find_origin(path: Path, recipe: Recipe, *, root: Path, now: Origin) -> Origin:
    """The last commit that touched the recipe at `path`, its rows or the data pointer, all of which HEAD holds.

    `now`, which has no commit, outside of a repository with one; where HEAD holds something else, `now` and what.
    """
    try:
        faults = find_uncommitted(root, [POINTER])
    except CommandError:
        return now
    names = [find_place(root, str(path.resolve())), *(find_place(root, rows) for rows in list_row_paths(recipe))]
    try:
        pointer = load_pointer(root / POINTER) if (root / POINTER).exists() else None
        out = pointer.out if pointer is not None else POINTER  # nothing is below a file
        is_below = any(Path(name).is_relative_to(out) for name in names)
        held = read_listing(pointer, root) if pointer is not None and is_below else None
        for name in names:
            faults |= find_unheld_rows(root, name, out=out, held=held or ())
        if faults:
            return replace(now, unheld=": ".join(next(iter(faults.items()))))
        in_git = [name for name in names if not Path(name).is_relative_to(out)]
        return read_commit(root, actor=now.actor, places=in_git) if pointer is not None else now
    except (CommandError, DatasetError) as fault:
        return replace(now, unheld=str(fault))


def find_changes(root: Path) -> dict[str, str]:
    """Recipes and the data pointer, where they are not what HEAD holds, and what to do about each."""
    recipes = [f"recipes/{p.name}" for p in sorted((root / "recipes").glob("*.yaml"))]
    return find_uncommitted(root, [*recipes, POINTER])


def find_recipes(root: Path, *, only: Sequence[str] = ()) -> list[Path]:
    """`recipes/*.yaml`, or those whose file name, path or stem is in `only`."""
    paths = sorted((root / "recipes").glob("*.yaml"))
    if not paths:
        found = f", only {', '.join(find_ignored(root))}" if find_ignored(root) else ""
        raise RecipeError(
            f"{root / 'recipes'}: no *.yaml here{found}; add a recipe; `appliance init` writes a first one"
        )
    asked = {Path(name).name.removesuffix(".yaml") for name in only}
    unknown = sorted(asked - {p.stem for p in paths})
    if unknown:
        raise RecipeError(f"--only {unknown[0]}: no such recipe; there are {', '.join(p.stem for p in paths)}")
    return [p for p in paths if not only or p.stem in asked]


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
    read = {path: attempt(path, partial(load_recipe, path)) for path in sorted((root / "recipes").glob("*.yaml"))}
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


def _describe_no_commit(root: Path) -> str:
    """Why Git names no commit here, and what to do."""
    try:
        run_command(["git", "rev-parse", "--git-dir"], cwd=root, env={"LC_ALL": "C"})
    except CommandError as fault:
        last = fault.last_line
        where = "start in the team's repository, or name it with --root; `appliance init` makes one"
        return f"not a Git repository; {where}" if "not a git repository" in last else f"Git cannot read it: {last}"
    try:
        run_command(["git", "rev-parse", "--verify", "--quiet", "HEAD"], cwd=root)
    except CommandError:
        return "the Git repository has no commit yet; `git add --all && git commit`"
    return "Git does not read its history; look at `git log`"


def _read_cut_commits(root: Path) -> set[str]:
    """The commits at which a shallow clone's history ends."""
    file = root / run_command(["git", "rev-parse", "--git-path", "shallow"], cwd=root).strip()
    return set(file.read_text("ascii").split()) if file.is_file() else set()


def attempt(path: Path, work: Callable[[], _T]) -> _T | ApplianceError:
    """What `work` makes of one recipe, or the error that ended it; only a signal, no failure, ends all work."""
    try:
        return work()
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
