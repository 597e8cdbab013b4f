"""The child that asks DVC which files of a folder it takes: the patterns of `.dvcignore` are DVC's to read."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """`ROOT FOLDER`: print a JSON list of the files below the folder that `dvc add` takes, as POSIX paths."""
    from dvc.fs import localfs
    from dvc.repo import Repo

    root = Path(argv[0]).resolve()
    folder = root / argv[1]
    found = Repo(str(root)).dvcignore.find(localfs, str(folder))
    sys.stdout.write(json.dumps([Path(f).relative_to(folder).as_posix() for f in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
