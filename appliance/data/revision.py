"""The data of any commit, fetched beside the repository: what `data diff` compares.

The pointer is the commit's; remote and credentials are today's, because a remote that moved takes its
objects along. Objects that the repository's own DVC cache has are not fetched again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from appliance.command import run_command
from appliance.data.pointer import load_pointer, pull_data
from appliance.digest import write_atomic
from appliance.errors import CommandError, DatasetError

_PLACE = ".dvc"


def fetch_revision(root: Path, revision: str, *, pointer: str, folder: Path) -> Path:
    """Bring the data that `pointer` meant at `revision` to `folder`; the folder of the data.

    Raises `CommandError` for an unknown revision and `DatasetError` when there is no pointer or no data.
    """
    if not (root / _PLACE).is_dir():
        raise DatasetError(f"{root}: no folder {_PLACE}; start in the repository's root (--root), or run `dvc init`")
    write_atomic(folder / pointer, _read_pointer(root, revision, pointer=pointer).encode())
    (folder / _PLACE).mkdir(exist_ok=True)
    for name in ("config", "config.local"):
        if (root / _PLACE / name).is_file():
            shutil.copyfile(root / _PLACE / name, folder / _PLACE / name)
    settings = f"[core]\n    no_scm = true\n    analytics = false\n[cache]\n    dir = {root / _PLACE / 'cache'}\n"
    write_atomic(folder / _PLACE / "beneath" / "config", settings.encode())
    found = load_pointer(folder / pointer)
    pull_data(found, root=folder, env={"DVC_SYSTEM_CONFIG_DIR": str(folder / _PLACE / "beneath")})
    return folder / found.out


def _read_pointer(root: Path, revision: str, *, pointer: str) -> str:
    argv = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"]
    try:
        commit = run_command(argv, cwd=root).strip()
    except CommandError as fault:
        raise CommandError(f"{revision}: no such commit in {root}; give one of its history (`git log`)") from fault
    try:
        return run_command(["git", "show", f"{commit}:./{pointer}"], cwd=root)
    except CommandError as fault:
        raise DatasetError(f"{pointer}: not in the commit {revision}; there is no data to compare with") from fault
