"""`python -m appliance.training.worker FOLDER`: the training child. Exit codes as in `appliance.child`.

Two children never work in one folder: the second waits a little for one that is being killed, then refuses.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from appliance.child import Emit, StopFlag, run_child
from appliance.errors import TrainingError
from appliance.training.launch import TrainingJob

_PATIENCE_S = 20.0


def main(folder: Path) -> int:
    """Run the job in `folder`."""

    def work(stop: StopFlag, emit: Emit) -> None:
        from appliance.training.trainer import run_job

        with _hold(folder):
            run_job(TrainingJob.model_validate_json((folder / "job.json").read_bytes()), stop=stop, emit=emit)

    return run_child(work)


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Keep `folder` for this process, whatever ends it. Raises `TrainingError` when another one stays in it."""
    with (folder / "worker.lock").open("w") as handle:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as fault:
                if time.monotonic() > deadline:
                    raise TrainingError(f"{folder}: another process trains here; wait for it or stop it") from fault
                time.sleep(0.1)
        yield


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
