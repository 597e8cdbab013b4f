"""Which files a commit holds, by comparing their content: what `git status` says can be told to look away.

It leaves out ignored files, untracked ones by a setting, and edits of files that the index calls
unchanged (assume-unchanged, skip-worktree); none of those can be made again from the commit.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from appliance.command import run_command
from appliance.digest import list_files

_BATCH = 500  # names on one command line
_SHOWN = 5
_BEHIND_LINK = "behind a symbolic link, which no commit follows; put the thing itself there"


def find_place(root: Path, path: str) -> str:
    """A recipe's path as the one name below `root` that it has; it begins with `..` where it leads out of it."""
    return Path(os.path.relpath(root / path, root)).as_posix()


def find_astray(root: Path, place: str) -> dict[str, str]:
    """The place of rows that no commit can ever hold, and what to do; empty where it lies in the repository."""
    if place.startswith(".."):
        return {place: "outside of the repository; bring it here, with `dvc add` or Git"}
    return {} if _is_itself(root, place) else {place: _BEHIND_LINK}


def find_unheld_rows(root: Path, place: str, *, out: str, held: Collection[str]) -> dict[str, str]:
    """What of the rows at a place no commit holds: each file, and what to do.

    Below `out`, the pointer's folder, DVC has to have taken them (`held`, names below `out`); elsewhere Git.
    """
    astray = find_astray(root, place)
    if astray:
        return astray
    if not PurePosixPath(place).is_relative_to(out):
        return find_uncommitted(root, [place])
    names = [f"{place}/{name}" for name in list_files(root / place)]
    return {
        name: "not what `dvc add` took and the commit means (see .dvcignore); add it, or move it away"
        for name in names
        if PurePosixPath(name).relative_to(out).as_posix() not in held
    }


def find_uncommitted(root: Path, places: Sequence[str]) -> dict[str, str]:
    """What at or below `places` is not what HEAD holds: each file, and what to do.

    The content counts, as Git would store it: line endings and filters of the repository's attributes are no
    difference. Raises `CommandError` outside of a repository with a commit.
    """
    held = _read_head(root, places)
    here = [name for place in places for name in _list_here(root, place)]
    faults = {n: "deleted, and the commit HEAD has it; restore it" for n in held if not os.path.lexists(root / n)}
    faults |= {n: "not in the commit HEAD; commit it" for n in here if n not in held}
    faults |= {n: _BEHIND_LINK for n in here if not _is_itself(root, n)}
    odd = [n for n in here if n not in faults]
    for options in (["--no-filters"], []):  # what was committed with CRLF is not what autocrlf would make of it now
        odd = [n for n, oid in _hash_files(root, odd, options) if oid != held[n]]
    return faults | dict.fromkeys(odd, "not what the commit HEAD holds; commit it")


def describe_unheld(root: Path, faults: Mapping[str, str]) -> str:
    """A line for each fault of `find_uncommitted` or `find_unheld_rows`, the first five of them."""
    lines = [f"{root / name}: {fault}, or give --allow-dirty to train on it as it is" for name, fault in faults.items()]
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([*lines[:_SHOWN], *more])


def _read_head(root: Path, places: Sequence[str]) -> dict[str, str]:
    """The object of every plain file at or below `places` in HEAD."""
    entries = run_command(["git", "ls-tree", "-r", "-z", "HEAD", "--", *places], cwd=root).split("\0")
    pairs = (entry.partition("\t") for entry in entries if entry.startswith("100"))
    return {name: facts.split()[2] for facts, _, name in pairs}


def _list_here(root: Path, place: str) -> list[str]:
    if (root / place).is_dir():
        return [f"{place}/{name}" for name in list_files(root / place)]
    return [place] if os.path.lexists(root / place) else []


def _is_itself(root: Path, name: str) -> bool:
    return (root / name).resolve() == root.resolve() / name


def _hash_files(root: Path, names: Sequence[str], options: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each file's object, as Git would name it."""
    for start in range(0, len(names), _BATCH):
        batch = names[start : start + _BATCH]
        yield from zip(
            batch, run_command(["git", "hash-object", *options, "--", *batch], cwd=root).split(), strict=True
        )
