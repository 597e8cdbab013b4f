"""Laws of the data pointer, with the real DVC: what a commit means is proven by hashing, never believed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_dataset

from appliance.data import digest_dvc_folder, is_current, load_pointer, pull_data
from appliance.errors import DatasetError

ENV = {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


def run(folder: Path, *argv: str) -> str:
    """Run a program in `folder`."""
    done = subprocess.run(argv, cwd=folder, env={**os.environ, **ENV}, capture_output=True, text=True, check=True)
    return done.stdout


def dvc(folder: Path, *arguments: str) -> str:
    """Run the real DVC."""
    return run(folder, sys.executable, "-m", "dvc", *arguments)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a pushed dataset and a folder as its DVC remote."""
    root = tmp_path_factory.mktemp("repository")
    write_dataset(root / "datasets" / "colours")
    run(root, "git", "init", "--quiet")
    dvc(root, "init", "--quiet")
    dvc(root, "remote", "add", "--default", "store", str(tmp_path_factory.mktemp("remote")))
    dvc(root, "add", "--quiet", "datasets")
    dvc(root, "push", "--quiet")
    return root


@pytest.fixture
def repository(template: Path, tmp_path: Path) -> Path:
    """A clone of it without cache and without data, as on a fresh runner."""
    import shutil

    root = tmp_path / "clone"
    shutil.copytree(template, root, ignore=shutil.ignore_patterns("datasets", "cache", "tmp"))
    return root


def test_our_hash_of_a_folder_is_the_one_that_dvc_writes(template: Path) -> None:
    """A reconcile that has nothing to do needs no DVC, because the hash is the same."""
    pointer = load_pointer(template / "datasets.dvc")
    assert digest_dvc_folder(template / "datasets") == pointer.md5
    assert pointer.nfiles == 2
    assert is_current(pointer, template)


def test_data_is_pulled_once_and_proven(repository: Path, template: Path) -> None:
    """A fresh clone gets exactly the committed bytes; a second call changes nothing."""
    pointer = load_pointer(repository / "datasets.dvc")
    pull_data(pointer, root=repository)
    file = repository / "datasets" / "colours" / "rows.jsonl"
    assert file.read_bytes() == (template / "datasets" / "colours" / "rows.jsonl").read_bytes()
    pull_data(pointer, root=repository)
    assert is_current(pointer, repository)


def test_uncommitted_rows_are_never_overwritten(repository: Path) -> None:
    """A developer's edits are worth more than a tidy folder: refuse, and say what to do."""
    pointer = load_pointer(repository / "datasets.dvc")
    pull_data(pointer, root=repository)
    file = repository / "datasets" / "colours" / "rows.jsonl"
    edited = file.read_text() + '{"id": "new"}\n'
    file.unlink()  # DVC may have linked it to its cache
    file.write_text(edited)
    with pytest.raises(DatasetError, match="uncommitted changes"):
        pull_data(pointer, root=repository)
    assert file.read_text() == edited


def test_data_that_was_never_pushed_is_told_as_that(repository: Path) -> None:
    """The author has to run `dvc push`; nobody else can mend it."""
    pointer_file = repository / "datasets.dvc"
    pointer_file.write_text(pointer_file.read_text().replace("md5: ", "md5: 0", 1).replace(".dir", "", 1)[:40])
    pointer_file.write_text(
        "outs:\n- md5: 0123456789abcdef0123456789abcdef.dir\n  size: 10\n  nfiles: 1\n  hash: md5\n  path: datasets\n"
    )
    with pytest.raises(DatasetError, match="dvc push"):
        pull_data(load_pointer(pointer_file), root=repository)


def test_a_corrupt_cache_is_not_believed(repository: Path) -> None:
    """DVC takes a cached object of the right name for the right one; the hash after the pull does not."""
    pointer = load_pointer(repository / "datasets.dvc")
    pull_data(pointer, root=repository)
    import shutil

    shutil.rmtree(repository / "datasets")
    victims = [p for p in (repository / ".dvc" / "cache").rglob("*") if p.is_file() and p.suffix != ".dir"]
    for victim in victims:
        if b"provenance" in victim.read_bytes():
            victim.chmod(0o644)
            victim.write_bytes(victim.read_bytes().replace(b"black", b"white"))
            victim.chmod(0o444)
    with pytest.raises(DatasetError, match=r"cache is corrupt|dvc push"):
        pull_data(pointer, root=repository)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "dvc add datasets"),
        ("<<<<<<< HEAD\nouts: []\n", "conflict markers"),
        ("outs: []\n", "one folder under 'outs'"),
        ("- 1\n", "one folder under 'outs'"),
        ("outs: [\n", "one folder under 'outs'"),
    ],
)
def test_a_broken_pointer_is_one_message(tmp_path: Path, text: str | None, says: str) -> None:
    """Missing, in conflict, or not a pointer: each with the next action."""
    file = tmp_path / "datasets.dvc"
    if text is not None:
        file.write_text(text)
    with pytest.raises(DatasetError, match=says):
        load_pointer(file)
