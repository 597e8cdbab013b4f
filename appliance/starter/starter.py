"""What a working repository holds: files that are kept like the release's, and files that are the team's.

Kept files (workflows and their scripts) come from this release. Their digests are recorded when they are
written, so that a newer release replaces what nobody touched and leaves alone what somebody did.
Started files (recipe, data card, owners, ...) are written once, where there is nothing yet.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePath
from typing import Literal

from appliance.command import run_command
from appliance.digest import digest_bytes, write_atomic
from appliance.errors import CommandError

RECORD = ".github/appliance-files.json"
_KEPT = {
    **{
        f".github/workflows/{n}.yml": f"github/workflows/{n}.yml"
        for n in ("validate", "report", "retrain", "reconcile", "promote")
    },
    **{f".github/scripts/{n}": f"github/scripts/{n}" for n in ("appliance", "comment.py")},
}
_SCRIPT = ".github/scripts/appliance"
_BRANCHES = ("main", "master")  # those in the workflows' `branches:`
_OWNERS = (".github/CODEOWNERS", "CODEOWNERS", "docs/CODEOWNERS")
_NAME = re.compile(r"[^a-z0-9]+")
_URL, _SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://[^/]|file:///."), re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_HOST = re.compile(r"github\.com[:/]([A-Za-z0-9][A-Za-z0-9-]*)/")

State = Literal["same", "missing", "outdated", "changed"]


@dataclass(frozen=True, slots=True)
class Change:
    """One file, what was found, and how it differs from the release.

    `outdated` has nothing of anybody's in it: an earlier release wrote it, or line ends or mode alone differ.
    `changed` is what somebody made of it.
    """

    path: str
    state: State
    diff: str = ""


def check_files(root: Path) -> tuple[Change, ...]:
    """How the kept files of `root` stand to this release's; writes nothing.

    Raises `CommandError` below the top of a repository, where GitHub does not look for them.
    """
    top = _find_top(root)
    if top is not None and top != root.resolve():
        raise CommandError(
            f"{root}: below the top of the repository {top}, where GitHub does not look for .github; "
            f"give --root {top}, or make it a repository of its own first (git init)"
        )
    recorded = _read_record(root)
    return tuple(_compare(root, path, recorded=recorded) for path in _KEPT)


def start_repository(root: Path, *, remote: str | None, default_remote: str | None = None) -> tuple[str, ...]:
    """Write what is missing or outdated and nothing else; what was done, a line each.

    `remote` is the S3 URL (or folder) for DVC that was asked for, `default_remote` one for a repository that has none.
    Raises `CommandError` when Git fails, below the top of a repository, for a `remote` that is neither, and where the
    folder cannot be made or something else has a file's place.
    """
    changes = check_files(root)
    _check_places(root)
    remote = _find_remote(remote, root) if remote is not None else None
    try:
        root.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, NotADirectoryError, FileExistsError) as fault:
        raise CommandError(f"{root}: cannot be made ({fault.strerror}); choose another folder") from fault
    done: list[str] = []
    if _find_top(root) is None:
        run_command(["git", "init", "--quiet", "--initial-branch", "main"], cwd=root)
        done.append("made a Git repository with the branch main")
    done += _write_kept(root, changes)
    done += _add_lines(root, ".gitattributes", _read("start/gitattributes").splitlines())
    done += _start_remote(root, remote=remote, default=default_remote)
    done += _start_file(root, ".dvc/.gitignore", "/config.local\n/tmp\n/cache\n")
    done += _start_file(root, ".dvcignore", "")
    done += _add_lines(root, ".gitignore", _read("start/gitignore").splitlines())
    done += _start_recipe(root)
    done += _start_file(root, "prices.yaml", _read("start/prices.yaml"))
    if not any((root / p).exists() for p in _OWNERS):
        text = _read("start/codeowners").format(owner=f"@{_find_account(root) or 'ORGANISATION'}/TEAM")
        done += [f"{line}; fill in who approves" for line in _start_file(root, _OWNERS[0], text)]
    return (*done, *_note_branch(root))


def _check_places(root: Path) -> None:
    files = (*_KEPT, RECORD, ".dvc/config", ".gitattributes", ".gitignore")
    folders = {str(p) for f in files for p in PurePath(f).parents} | {"datasets", "recipes"}
    for place in (root / f for f in sorted(folders)):
        if place.exists() and not place.is_dir():
            raise CommandError(f"{place}: is a file, expected a folder; move it away and run `appliance init` again")
    for place in (root / f for f in files):
        if place.is_dir():
            raise CommandError(f"{place}: is a folder, expected a file; move it away and run `appliance init` again")


def _write_kept(root: Path, changes: Sequence[Change]) -> list[str]:
    recorded, done = _read_record(root), []
    for path, change in zip(_KEPT, changes, strict=True):
        if change.state == "changed":
            done.append(f"left {path}: somebody changed it; `appliance init --check` shows how")
            continue
        if change.state != "same":
            write_atomic(root / path, _read(_KEPT[path]).encode())
            done.append(f"wrote {path}")
        if path == _SCRIPT:
            (root / path).chmod(0o755)
        recorded[path] = digest_bytes(_read(_KEPT[path]).encode())
    content = (json.dumps(recorded, indent=2, sort_keys=True) + "\n").encode()
    if not (root / RECORD).is_file() or (root / RECORD).read_bytes() != content:
        write_atomic(root / RECORD, content)
    return done


def _compare(root: Path, path: str, *, recorded: dict[str, str]) -> Change:
    ours = _read(_KEPT[path])
    file = root / path
    if not file.is_file():
        return Change(path, "missing")
    theirs = file.read_bytes()
    if theirs == ours.encode():
        if path != _SCRIPT or os.access(file, os.X_OK):
            return Change(path, "same")
        return Change(path, "outdated", "its mode forbids to execute it, the release's is 755")
    if theirs.replace(b"\r\n", b"\n") == ours.encode():
        return Change(path, "outdated", "its lines end in CRLF, the release's in LF")
    state: State = "outdated" if recorded.get(path) == digest_bytes(theirs) else "changed"
    lines = difflib.unified_diff(
        ours.splitlines(), theirs.decode("utf-8", "replace").splitlines(), "release", path, lineterm=""
    )
    return Change(path, state, "\n".join(lines))


def _find_remote(remote: str, root: Path) -> str:
    """A URL as it is; a folder as DVC's config has it: from `.dvc`, where it was given from here."""
    if _URL.match(remote) or Path(remote).is_absolute():
        return remote
    if _SCHEME.match(remote):
        raise CommandError(f"--remote {remote}: not a URL; expected one such as s3://BUCKET/dvc, or a folder")
    return os.path.relpath(Path(remote).absolute(), root.resolve() / ".dvc")


def _start_remote(root: Path, *, remote: str | None, default: str | None) -> list[str]:
    """DVC's config, as `dvc init` and `dvc remote add` write it; one that has a remote is left as it is."""
    config = root / ".dvc" / "config"
    url, is_new = remote or default, not config.exists()
    text = "[core]\n    analytics = false\n" if is_new else config.read_bytes().decode("utf-8", "surrogateescape")
    if "remote" in text:
        if remote is None or remote in re.findall(r"^\s*url\s*=\s*(.*?)\s*$", text, re.MULTILINE):
            return []
        return [f"left {config}: it has another remote than {remote}; `dvc remote modify NAME url {remote}` changes it"]
    if url is not None:
        text = _add_remote(text, url)
    if is_new or url is not None:
        write_atomic(config, text.encode("utf-8", "surrogateescape"))
    done = ["wrote .dvc/config"] if is_new else []
    if url is None:
        return [*done, f"{config}: has no remote yet; `dvc remote add --default store s3://BUCKET/dvc`"]
    return done or [f"added the remote {url} to .dvc/config"]


def _add_remote(text: str, url: str) -> str:
    """The config with a default remote `store`, in its own line ends."""
    end = "\r\n" if "\r\n" in text else "\n"
    core, found = f"[core]{end}", re.search(r"^\[core\][ \t]*\r?\n", text, re.MULTILINE)
    before, after = (text[: found.start()], text[found.end() :]) if found else ("", text)
    closed = after if not after or after.endswith("\n") else after + end
    return f"{before}{core}    remote = store{end}{closed}['remote \"store\"']{end}    url = {url}{end}"


def _add_lines(root: Path, path: str, wanted: Sequence[str]) -> list[str]:
    """Append the lines that a file lacks, in its own line ends; its bytes stay, in whatever encoding they are."""
    file = root / path
    content = file.read_bytes() if file.is_file() else b""
    lines = {line.strip() for line in content.decode("latin-1").splitlines()}
    missing = [w for w in wanted if not {w, w + "/", w.lstrip("/"), w.lstrip("/") + "/"} & lines]
    if not missing:
        return []
    end = b"\r\n" if b"\r\n" in content else b"\n"
    lead = content if not content or content.endswith(b"\n") else content + end
    write_atomic(file, lead + b"".join(line.encode() + end for line in missing))
    return [f"added {', '.join(missing)} to {path}"]


def _start_recipe(root: Path) -> list[str]:
    """A recipe, and the card of the dataset that it reads, where there is none at all."""
    if any((root / "recipes").glob("*.yaml")):
        return []
    name = _NAME.sub("-", root.resolve().name.lower()).strip("-")[:63] or "model"
    cards, rows = (sorted((root / "datasets").glob(f"*/{p}")) for p in ("dataset.yaml", "*.jsonl"))
    has_pointer = (root / "datasets.dvc").exists()
    if has_pointer and not (cards or rows):
        return ["no recipe yet: datasets.dvc names data that is not here; `dvc pull`, then `appliance init` again"]
    dataset = (cards or rows)[0].parent.name if cards or rows else name
    text = _read("start/recipe.yaml").format(file=name, name=_quote(name), path=_quote(f"datasets/{dataset}"))
    done = _start_file(root, f"recipes/{name}.yaml", text)
    if not cards and not has_pointer:
        card = _read("start/dataset.yaml").format(name=_quote(dataset))
        done += _start_file(root, f"datasets/{dataset}/dataset.yaml", card)
    return done


def _quote(text: str) -> str:
    """A YAML string, whatever it would mean without quotes (`2024`, `no`, `a: b`): JSON's form is one."""
    return json.dumps(text, ensure_ascii=False)


def _start_file(root: Path, path: str, text: str) -> list[str]:
    if (root / path).exists():
        return []
    write_atomic(root / path, text.encode())
    return [f"wrote {path}"]


def _find_account(root: Path) -> str:
    """The account on GitHub that the remote `origin` names, a person's or an organisation's; empty without one."""
    found = _HOST.search(_ask_git(root, "remote", "get-url", "origin"))
    return found[1] if found else ""


def _note_branch(root: Path) -> list[str]:
    """A word where no push would start anything: the workflows wait for `_BRANCHES`, the repository has another."""
    branch = _ask_git(root, "symbolic-ref", "--short", "refs/remotes/origin/HEAD").removeprefix("origin/")
    if not branch:
        own = _ask_git(root, "for-each-ref", "--format=%(refname:short)", "refs/heads").split()
        branch = next((b for b in _BRANCHES if b in own), _ask_git(root, "symbolic-ref", "--short", "HEAD"))
    if not branch or branch in _BRANCHES:
        return []
    names = " or ".join(_BRANCHES)
    return [f"retrain.yml and validate.yml start at pushes to {names}, not to {branch}: add it to their `branches:`"]


def _find_top(root: Path) -> Path | None:
    """The top of the work tree that `root` is in, also where `root` is still to be made; `None` outside of any."""
    home = root.resolve()
    top = _ask_git(next(p for p in (home, *home.parents) if p.is_dir()), "rev-parse", "--show-toplevel")
    return Path(top).resolve() if top else None


def _ask_git(root: Path, *arguments: str) -> str:
    """What Git answers, empty where it has no answer."""
    try:
        return run_command(["git", *arguments], cwd=root).strip()
    except CommandError:
        return ""


def _read_record(root: Path) -> dict[str, str]:
    """Digests of the kept files as they were written; a lost or broken record only makes `init` more careful."""
    try:
        record = json.loads((root / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return {k: str(v) for k, v in record.items()} if isinstance(record, dict) else {}


def _read(name: str) -> str:
    return resources.files("appliance.starter").joinpath("files", *name.split("/")).read_text("utf-8")
