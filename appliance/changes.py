"""What lies between two commits of the data: every dataset of the one against the same of the other."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from appliance.command import run_command
from appliance.data import DatasetDiff, diff_folders, fetch_revision, load_pointer
from appliance.desired import POINTER
from appliance.errors import CommandError, DatasetError, RecipeError
from appliance.recipe import Recipe, SplitSection, load_recipe, parse_recipe


def diff_revisions(root: Path, before: str, after: str | None) -> tuple[DatasetDiff, ...]:
    """The changes of every dataset between two commits; `None` is what is on this disk.

    A commit that had no data pointer yet counts as empty.
    """
    with tempfile.TemporaryDirectory() as home:
        old = Path(home, "before", "none")
        with contextlib.suppress(_NoPointerError):
            old = _fetch(root, before, Path(home, "before"))
        new = _fetch(root, after, Path(home, "after")) if after else root / load_pointer(root / POINTER).out
        names = sorted({p.parent.name for folder in (old, new) for p in folder.glob("*/*.jsonl")})
        splits, earlier = _read_splits(root, after), _read_splits(root, before)
        return tuple(_diff(old / n, new / n, split=splits.get(n), earlier=earlier.get(n)) for n in names)


def find_fork(root: Path, one: str, other: str) -> str:
    """The commit at which two histories part. Raises `CommandError` where they have none in common."""
    try:
        return run_command(["git", "merge-base", "--end-of-options", one, other], cwd=root).strip()
    except CommandError as fault:
        raise CommandError(
            f"{one}...{other}: no common commit of these two in {root}; give two commits of its history (`git log`), "
            "and fetch all of it"
        ) from fault


def _diff(old: Path, new: Path, *, split: SplitSection | None, earlier: SplitSection | None) -> DatasetDiff:
    """By the earlier split where no recipe tells the one that is asked for now."""
    found = diff_folders(old, new, split=split or earlier or SplitSection(), earlier_split=earlier)
    note = "no recipe that can be read tells its split now: counted by the earlier one"
    return replace(found, notes=(*found.notes, note)) if split is None and earlier is not None else found


class _NoPointerError(DatasetError):
    """The commit is older than the data pointer."""


def _fetch(root: Path, revision: str, folder: Path) -> Path:
    try:
        return fetch_revision(root, revision, pointer=POINTER, folder=folder)
    except DatasetError as fault:
        if "not in the commit" in str(fault):
            raise _NoPointerError(str(fault)) from fault
        raise


def _read_splits(root: Path, revision: str | None) -> dict[str, SplitSection]:
    """The split of each dataset by the first recipe that reads it, at a commit or (`None`) on this disk."""
    splits: dict[str, SplitSection] = {}
    for load in _list_recipes(root, revision):
        with contextlib.suppress(RecipeError):  # the review tells it
            section = load().dataset
            splits.setdefault(section.name, section.split)
    return splits


def _list_recipes(root: Path, revision: str | None) -> list[Callable[[], Recipe]]:
    if revision is None:
        return [partial(load_recipe, path) for path in sorted((root / "recipes").glob("*.yaml"))]
    names = run_command(["git", "ls-tree", "--name-only", "-z", revision, "recipes/"], cwd=root).split("\0")
    texts = {n: run_command(["git", "show", f"{revision}:./{n}"], cwd=root) for n in names if n.endswith(".yaml")}
    return [partial(parse_recipe, text, source=name) for name, text in texts.items()]
