"""Laws of the data pointer, with the real DVC: what a commit means is proven by hashing, never believed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import write_dataset

from appliance.data import check_pushed, digest_dvc_folder, fetch_revision, is_current, load_pointer, pull_data
from appliance.data.pointer import list_objects, read_listing
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


def write_everything(root: Path) -> None:
    """Every kind of file that a desktop, an editor or an archive leaves below `datasets/`."""
    folder = root / "datasets"
    write_dataset(folder / "colours")
    names = [".DS_Store", ".gitkeep", "x.tmp", "x/.dvc", "w/.hg", "Z", "a-b", "a/b", "a.b", "colours/crlf.txt"]
    names += ["colours/.hidden/deep/a b.txt", "colours/\u00fcber/\u6570\u636e.txt", "colours/ue\u0308ber.txt"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() + b"\r\n")
    for name in (".git/config", "colours/.hg/store", "y/.dvc/config", "y/rows.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left out")
    (folder / "w" / ".git").write_text("gitdir: elsewhere")
    (folder / "empty" / "empty").mkdir(parents=True)
    (folder / "empty.txt").write_text("")
    (root / "outside").mkdir()
    (root / "outside" / "file.txt").write_text("outside")
    (folder / "link.txt").symlink_to("../outside/file.txt")
    (folder / "linked").symlink_to("../outside")


IGNORES = {
    "comments": "# nothing\n\n   # here\n",
    "patterns": "*.tmp\n.DS_Store\n/datasets/colours/\u00fcber/\n",
    "negations": "*.txt\n!crlf.txt\ndatasets/a/\n!datasets/a/b\n",
    "nothing of it": "*.csv\n",
    "a folder above": None,
}


@pytest.mark.parametrize("patterns", IGNORES.values(), ids=IGNORES)
def test_whatever_is_below_the_folder_our_hash_is_dvcs(tmp_path: Path, patterns: str | None) -> None:
    """Hidden, temporary, nested, linked, in any script, ignored or not: what `dvc add` wrote is current here."""
    root = tmp_path / "repository"
    root.mkdir()
    run(root, "git", "init", "--quiet")
    dvc(root, "init", "--quiet")
    write_everything(root)
    pointer_folder = root
    if patterns is not None:
        (root / ".dvcignore").write_text(patterns)
    else:  # the project is a folder of a larger DVC repository
        (root / ".dvcignore").write_text("*.tmp\n")
        pointer_folder = root / "project"
        pointer_folder.mkdir()
        (root / "datasets").rename(pointer_folder / "datasets")
        (root / "outside").rename(pointer_folder / "outside")
    dvc(pointer_folder, "add", "--quiet", "datasets")
    pointer = load_pointer(pointer_folder / "datasets.dvc")
    listing = read_listing(pointer, pointer_folder)
    assert listing is not None
    assert len(listing) == pointer.nfiles
    assert [name for name, _, _ in list_objects(pointer, pointer_folder)[1:]] == list(listing)
    (pointer_folder / "datasets" / "colours" / "new.json").write_text("x")
    assert not is_current(pointer, pointer_folder)


def test_files_of_the_desktop_go_the_whole_way(repository: Path, tmp_path: Path) -> None:
    """Added, pushed, pulled into a fresh clone and proven, and whole on the remote; or ignored, and in nobody's way."""
    pull_data(load_pointer(repository / "datasets.dvc"), root=repository)
    (repository / ".dvcignore").write_text("*.log\n")
    for name in (".DS_Store", ".gitkeep", "x.tmp", "notes.log"):
        (repository / "datasets" / name).write_text(f"left by a program as {name}")
    dvc(repository, "add", "--quiet", "datasets")
    dvc(repository, "push", "--quiet")
    pointer = load_pointer(repository / "datasets.dvc")
    pull_data(pointer, root=repository)
    check_pushed(pointer, root=repository)
    fresh = tmp_path / "fresh"
    shutil.copytree(repository, fresh, ignore=shutil.ignore_patterns("datasets", "cache", "tmp"))
    pull_data(pointer, root=fresh)
    check_pushed(pointer, root=fresh)
    assert sorted(p.name for p in (fresh / "datasets").iterdir()) == [".DS_Store", ".gitkeep", "colours", "x.tmp"]


def test_what_differs_after_a_pull_is_said_in_words(repository: Path) -> None:
    """A damaged object is named by its place in the cache, with the file that it became; without both all is well."""
    pointer = load_pointer(repository / "datasets.dvc")
    pull_data(pointer, root=repository)
    rows = digest_md5(repository / "datasets" / "colours" / "rows.jsonl")
    victim = repository / ".dvc" / "cache" / "files" / "md5" / rows[:2] / rows[2:]
    shutil.rmtree(repository / "datasets")
    victim.chmod(0o644)
    victim.write_bytes(b"white")
    victim.chmod(0o444)  # DVC takes a read-only object at its word
    with pytest.raises(DatasetError, match=f"the DVC cache is corrupt: delete {victim}") as fault:
        pull_data(pointer, root=repository)
    for name in str(fault.value).partition(": delete ")[2].partition(",")[0].split():
        Path(name).unlink()
    pull_data(pointer, root=repository)
    assert is_current(pointer, repository)
    (repository / ".dvcignore").write_text("*.jsonl\n")
    (repository / "datasets" / "colours" / "more.jsonl").write_text("")
    with pytest.raises(DatasetError, match=r"other files than the commit: colours/more\.jsonl .*\.dvcignore"):
        pull_data(pointer, root=repository)


def test_jobs_that_share_a_cache_do_each_other_no_harm(template: Path, tmp_path: Path) -> None:
    """Two pulls at once into one cache outside of the checkouts; the third job, and older commits, need no remote."""
    shared = tmp_path / "cache" / "dvc"
    author = tmp_path / "author"
    shutil.copytree(template, author)
    for number in range(50):
        (author / "datasets" / f"{number}.txt").write_text(f"{number}\n" * 10_000)
    dvc(author, "add", "--quiet", "datasets")
    dvc(author, "push", "--quiet")
    jobs = [tmp_path / name for name in ("one", "two", "three")]
    for job in jobs:
        shutil.copytree(author, job, ignore=shutil.ignore_patterns("datasets", "cache", "tmp"))
        (job / ".dvc" / "config.local").write_text(f"[cache]\n    dir = {shared}\n")
    pull = "import pathlib, sys; from appliance.data import *; p = pathlib.Path.cwd(); "
    pull += "pull_data(load_pointer(p / 'datasets.dvc'), root=p)"
    children = [subprocess.Popen([sys.executable, "-c", pull], cwd=job, env={**os.environ, **ENV}) for job in jobs[:2]]
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    dvc(jobs[2], "remote", "modify", "--local", "store", "url", str(tmp_path / "nothing"))
    pointer = load_pointer(author / "datasets.dvc")
    pull_data(pointer, root=jobs[2])
    for job in jobs:
        assert is_current(pointer, job)
        assert not (job / ".dvc" / "cache").exists()
    objects = [p for p in (shared / "files" / "md5").rglob("*") if p.is_file()]
    assert {p.parent.name + p.name.removesuffix(".dir") for p in objects} == {digest_md5(p) for p in objects}
    run(jobs[2], "git", "add", "--all")
    run(jobs[2], "git", "-c", "user.name=a", "-c", "user.email=a@localhost", "commit", "--quiet", "--message", "data")
    folder = fetch_revision(jobs[2], "HEAD", pointer="datasets.dvc", folder=tmp_path / "earlier")
    assert is_current(pointer, folder.parent)


def digest_md5(file: Path) -> str:
    """DVC's id of a file."""
    return hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()


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
