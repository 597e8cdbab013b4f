"""`python -m appliance.training.worker FOLDER`: the training child. Exit codes as in `appliance.child`.

Two children never work in one folder: the second waits a little for one that is being killed, then refuses.
On several devices it starts the others, as `... worker FOLDER RANK MEETING`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from appliance.child import Emit, StopFlag, import_libraries, run_child
from appliance.errors import TrainingError
from appliance.method import QloraMethod
from appliance.training.launch import TrainingJob
from appliance.training.peers import name_share, start_peers

_PATIENCE_S = 20.0


def main(folder: Path) -> int:
    """Run the job in `folder`, on several devices as the first of their processes."""
    environment = dict(os.environ)  # names the GPUs of all

    def work(stop: StopFlag, emit: Emit) -> None:
        with _hold(folder):
            job = TrainingJob.model_validate_json((folder / "job.json").read_bytes())
            os.environ.update(name_share(environment, 0))
            with start_peers(folder, devices=job.devices, environment=environment, emit=emit) as meeting:
                _run(job, rank=0, meeting=meeting, stop=stop, emit=emit)

    return run_child(work)


def follow(folder: Path, rank: int, meeting: Path) -> int:
    """Run the share of one device of the job in `folder`; what there is to say, the first one says."""

    def work(stop: StopFlag, _emit: Emit) -> None:
        stop.defer()  # the first one ends, and all with it
        job = TrainingJob.model_validate_json((folder / "job.json").read_bytes())
        _run(job, rank=rank, meeting=meeting, stop=stop, emit=_say_nothing)

    return run_child(work)


def _run(job: TrainingJob, *, rank: int, meeting: Path, stop: StopFlag, emit: Emit) -> None:
    with import_libraries(four_bit=isinstance(job.method, QloraMethod)):
        from appliance.training.trainer import run_job

    run_job(job, rank=rank, meeting=meeting, stop=stop, emit=emit)


def _say_nothing(**_event: object) -> None:
    """The first process speaks for all."""


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
    named, *of_a_peer = sys.argv[1:]
    if of_a_peer:
        sys.exit(follow(Path(named), int(of_a_peer[0]), Path(of_a_peer[1])))
    sys.exit(main(Path(named)))
