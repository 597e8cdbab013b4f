"""The child that asks a DVC remote for every object of a pointer, each by name and with its size.

`dvc status --cloud` answers from an index of what was pushed once, so an object that was lost or cut
short since reads as there. DVC and its event loops stay in this process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from appliance.data.pointer import list_objects, load_pointer

_ASKERS = 16


def main(argv: list[str]) -> int:
    """`ROOT POINTER`: print a JSON list of the data's files that the remote lacks or has in another size."""
    from dvc.repo import Repo

    root = Path(argv[0])
    wanted = list_objects(load_pointer(root / argv[1]), root)
    remote = Repo(str(root)).cloud.get_remote_odb(hash_name="md5")
    with ThreadPoolExecutor(_ASKERS) as pool:
        held = list(pool.map(_build_question(remote), [(oid, size) for _, oid, size in wanted]))
    sys.stdout.write(json.dumps([name for (name, _, _), is_held in zip(wanted, held, strict=True) if not is_held]))
    return 0


def _build_question(remote: Any) -> Callable[[tuple[str, int]], bool]:
    def is_held(asked: tuple[str, int]) -> bool:
        oid, size = asked
        try:
            return bool(remote.fs.info(remote.oid_to_path(oid))["size"] == size)
        except FileNotFoundError:
            return False

    return is_held


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
