"""What a working repository holds: files that are kept like the release's, and files that are the team's.

Kept files (workflows and their scripts) come from this release. Their digests are recorded when they are
written, so that a newer release replaces what nobody touched and leaves alone what somebody did.
Started files (recipe, data card, owners, ...) are written once, where there is nothing yet.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
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
_OWNERS = (".github/CODEOWNERS", "CODEOWNERS", "docs/CODEOWNERS")
_NAME = re.compile(r"[^a-z0-9]+")
_HOST = re.compile(r"github\.com[:/]([A-Za-z0-9][A-Za-z0-9-]*)/")

State = Literal["same", "missing", "outdated", "changed"]


@dataclass(frozen=True, slots=True)
class Change:
    """One file, what was found, and how it differs from the release.

    `outdated` is as an earlier release wrote it; `changed` is what somebody made of it.
    """

    path: str
    state: State
    diff: str = ""


def check_files(root: Path) -> tuple[Change, ...]:
    """How the kept files of `root` stand to this release's; writes nothing."""
    recorded = _read_record(root)
    return tuple(_compare(root, path, recorded=recorded) for path in _KEPT)


def start_repository(root: Path, *, remote: str | None) -> tuple[str, ...]:
    """Write what is missing or outdated and nothing else; what was done, a line each.

    `remote` is the S3 URL for DVC, where the repository has none. Raises `CommandError` when Git fails.
    """
    root.mkdir(parents=True, exist_ok=True)
    done: list[str] = []
    if not _is_repository(root):
        run_command(["git", "init", "--quiet", "--initial-branch", "main"], cwd=root)
        done.append("made a Git repository with the branch main")
    done += _write_kept(root)
    done += _start_data(root, remote=remote)
    done += _start_recipe(root)
    done += _start_file(root, "prices.yaml", _read("start/prices.yaml"))
    if not any((root / p).exists() for p in _OWNERS):
        owner = _find_owner(root)
        text = _read("start/codeowners").format(lead="" if owner else "# ", owner=owner or "@ORGANISATION/TEAM")
        done += _start_file(root, _OWNERS[0], text)
    return tuple(done)


def _write_kept(root: Path) -> list[str]:
    recorded, done = _read_record(root), []
    for path, change in zip(_KEPT, check_files(root), strict=True):
        if change.state == "changed":
            done.append(f"left {path}: somebody changed it; `appliance init --check` shows how")
            continue
        if change.state != "same":
            write_atomic(root / path, _read(_KEPT[path]).encode())
            done.append(f"wrote {path}")
        if not path.endswith((".yml", ".py")):
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
        return Change(path, "same")
    state: State = "outdated" if recorded.get(path) == digest_bytes(theirs) else "changed"
    lines = difflib.unified_diff(
        ours.splitlines(), theirs.decode("utf-8", "replace").splitlines(), "release", path, lineterm=""
    )
    return Change(path, state, "\n".join(lines))


def _start_data(root: Path, *, remote: str | None) -> list[str]:
    """DVC's own files, as `dvc init` and `dvc remote add` write them, and what Git must leave out."""
    done = []
    config = root / ".dvc" / "config"
    if not config.exists() and remote:
        done += _start_file(root, ".dvc/config", _read("start/dvcconfig").format(remote=remote))
    elif not config.exists():
        done += _start_file(root, ".dvc/config", "[core]\n    analytics = false\n")
    if "remote" not in config.read_text("utf-8"):
        done.append(f"{config}: has no remote yet; `dvc remote add --default store s3://BUCKET/dvc`")
    done += _start_file(root, ".dvc/.gitignore", "/config.local\n/tmp\n/cache\n")
    done += _start_file(root, ".dvcignore", "")
    ignored = root / ".gitignore"
    lines = ignored.read_text("utf-8").splitlines() if ignored.is_file() else []
    wanted = _read("start/gitignore").splitlines()
    missing = [w for w in wanted if not {w, w + "/", w.lstrip("/"), w.lstrip("/") + "/"} & set(lines)]
    if missing:
        write_atomic(ignored, "".join(f"{line}\n" for line in [*lines, *missing]).encode())
        done.append(f"added {' '.join(missing)} to .gitignore")
    return done


def _start_recipe(root: Path) -> list[str]:
    """A recipe, and the card of the dataset that it reads, where there is none at all."""
    if any((root / "recipes").glob("*.yaml")):
        return []
    name = _NAME.sub("-", root.resolve().name.lower()).strip("-")[:63] or "model"
    cards = sorted((root / "datasets").glob("*/dataset.yaml"))
    dataset = cards[0].parent.name if cards else name
    done = _start_file(root, f"recipes/{name}.yaml", _read("start/recipe.yaml").format(name=name, dataset=dataset))
    if not cards and not (root / "datasets.dvc").exists():
        done += _start_file(
            root, f"datasets/{dataset}/dataset.yaml", _read("start/dataset.yaml").format(dataset=dataset)
        )
    return done


def _start_file(root: Path, path: str, text: str) -> list[str]:
    if (root / path).exists():
        return []
    write_atomic(root / path, text.encode())
    return [f"wrote {path}"]


def _find_owner(root: Path) -> str:
    """The account on GitHub that the remote `origin` names, empty without one."""
    try:
        found = _HOST.search(run_command(["git", "remote", "get-url", "origin"], cwd=root))
    except CommandError:
        return ""
    return f"@{found[1]}" if found else ""


def _is_repository(root: Path) -> bool:
    try:
        run_command(["git", "rev-parse", "--git-dir"], cwd=root)
    except CommandError:
        return False
    return True


def _read_record(root: Path) -> dict[str, str]:
    """Digests of the kept files as they were written; a lost or broken record only makes `init` more careful."""
    try:
        record = json.loads((root / RECORD).read_bytes())
    except (OSError, ValueError):
        return {}
    return {k: str(v) for k, v in record.items()} if isinstance(record, dict) else {}


def _read(name: str) -> str:
    return resources.files("appliance.starter").joinpath("files", *name.split("/")).read_text("utf-8")
