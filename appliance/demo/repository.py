"""The demo's Git and DVC repository, made with the real tools in the way a team makes its own."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from appliance.command import run_command
from appliance.demo.dataset import write_dataset
from appliance.digest import write_atomic

_IDENTITY = {
    "GIT_AUTHOR_NAME": "appliance demo",
    "GIT_AUTHOR_EMAIL": "demo@localhost",
    "GIT_COMMITTER_NAME": "appliance demo",
    "GIT_COMMITTER_EMAIL": "demo@localhost",
}
_IGNORED = "/datasets\n/.appliance\n"


def prepare_repository(folder: Path, *, remote: str, endpoint: str, quick: bool) -> Path:
    """A repository with the demo recipe and a DVC remote; made once, its endpoint set every time.

    The endpoint's port differs from start to start, so it goes to DVC's local, uncommitted config.
    """
    if not (folder / ".dvc" / "config").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / ".git").is_dir():
            run_command(["git", "init", "--quiet", "--initial-branch", "main"], cwd=folder)
        _dvc(folder, "init", "--quiet", "--force")
        _dvc(folder, "config", "core.analytics", "false")
        _dvc(folder, "remote", "add", "--force", "--default", "store", remote)
    _dvc(folder, "remote", "modify", "--local", "store", "endpointurl", endpoint)
    write_atomic(folder / ".gitignore", _IGNORED.encode())
    write_atomic(folder / "recipes" / "demo.yaml", read_recipe(quick=quick).encode())
    return folder


def read_recipe(*, quick: bool) -> str:
    """The demo recipe's text; with `quick`, one epoch."""
    text = resources.files("appliance.demo").joinpath("recipe.yaml").read_text("utf-8")
    return re.sub(r"(?m)^  epochs: .*$", "  epochs: 1", text) if quick else text


def commit_dataset(folder: Path, *, rows: int, message: str, env: Mapping[str, str]) -> str:
    """Write `rows` rows, `dvc add`, `dvc push`, `git commit`; say what happened.

    The push comes before the commit, so that no commit ever points to data that is not there.
    """
    write_dataset(folder / "datasets" / "workplace-requests", rows=rows)
    _dvc(folder, "add", "--quiet", "datasets")
    _dvc(folder, "push", "datasets.dvc", env=env)
    run_command(["git", "add", "--all"], cwd=folder)
    if run_command(["git", "status", "--porcelain"], cwd=folder).strip():
        run_command(
            ["git", "-c", "commit.gpgsign=false", "commit", "--quiet", "--message", message], cwd=folder, env=_IDENTITY
        )
        state = "committed"
    else:
        state = "unchanged"
    commit = run_command(["git", "rev-parse", "--short", "HEAD"], cwd=folder).strip()
    return f"{rows} rows, {state} at {commit}"


def _dvc(folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
    run_command([sys.executable, "-m", "dvc", *arguments], cwd=folder, env={"DVC_NO_ANALYTICS": "1", **(env or {})})
