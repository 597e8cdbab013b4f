"""The parent's side of training: write the job, start the child, follow it, judge how it ended.

The child is a separate process so that its memory is free afterwards, an out-of-memory death can
be answered with half the micro-batch and the same effective batch, and this process never imports
torch. The job file is all that the child gets.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from appliance.command import WorkerEnd, run_worker
from appliance.digest import write_atomic
from appliance.errors import DeviceError, InterruptedRunError, LostDeviceError, TrainingError
from appliance.method import Method, can_checkpoint
from appliance.model.faults import name_end
from appliance.recipe import EwcSection, TrainingSection
from appliance.training.board import open_board
from appliance.training.checkpoints import read_facts
from appliance.training.mirror import Mirror, fetch_checkpoints, follow_checkpoints
from appliance.training.view import TrainingView


class TrainingJob(BaseModel):
    """What the training child needs to know; `folder` holds its inputs and all it writes.

    `micro_batch` rows and `threads` are of each of the `devices`; `sharded` where each holds a part of the layers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path
    adapter: Path
    base: Path
    base_name: str
    method: Method
    training: TrainingSection
    ewc: EwcSection | None = None
    micro_batch: int
    devices: int = 1
    sharded: bool = False
    checkpointing: bool
    threads: int | None = None
    fingerprint: dict[str, str]

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are kept."""
        return self.folder / "checkpoints"

    @property
    def share(self) -> int:
        """Rows of an optimizer step that each device has."""
        return self.training.effective_batch // self.devices


def train(
    job: TrainingJob,
    *,
    note: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    board: Path | None = None,
    mirror: Mirror | None = None,
) -> dict[str, Any]:
    """Train until the adapter is in place and return the child's summary; `board` is a folder for TensorBoard.

    With a `mirror`, checkpoints go to the store as they are sealed, and come from there when the
    folder has none.

    Out of memory: again with half the micro-batch, and where that is 1 already, with gradient checkpointing
    unless the recipe rules it out. Raises `TrainingError` (refused or worthless), `InterruptedRunError`
    (a signal; the same call resumes) or `DeviceError`.
    """
    if mirror is None:
        return _train(_adopt_facts(job), note=note, env=env, board=board)
    keep = job.training.keep
    fetch_checkpoints(mirror, job.checkpoints, keep=keep, fingerprint=job.fingerprint, note=note)
    with follow_checkpoints(mirror, job.checkpoints, keep=keep, note=note):
        return _train(_adopt_facts(job), note=note, env=env, board=board)


def _train(
    job: TrainingJob, *, note: Callable[[str], None], env: Mapping[str, str] | None, board: Path | None
) -> dict[str, Any]:
    while True:
        end = name_end(_run_child(job, env=env, note=note, board=board))
        if end.code == 0:
            summary: dict[str, Any] = json.loads((job.folder / "summary.json").read_bytes())
            return summary
        leaner = _shrink(job) if end.code == DeviceError.exit_code else None
        if leaner is None:
            raise _explain(end, job)
        job = leaner
        how = f"micro-batch {job.micro_batch}{' and gradient checkpointing' if job.checkpointing else ''}"
        note(f"out of memory; again with {how}, the effective batch stays")


def _adopt_facts(job: TrainingJob) -> TrainingJob:
    """The job with the threads, micro-batch and gradient checkpointing that its newest checkpoint was made with."""
    facts = read_facts(job.checkpoints)
    if facts is None:
        return job
    fits = job.share % facts.micro_batch == 0
    micro_batch = facts.micro_batch if fits else job.micro_batch
    found = {"threads": facts.threads, "micro_batch": micro_batch, "checkpointing": facts.checkpointing}
    return job.model_copy(update=found)


def _run_child(
    job: TrainingJob, *, env: Mapping[str, str] | None, note: Callable[[str], None], board: Path | None
) -> WorkerEnd:
    write_atomic(job.folder / "job.json", job.model_dump_json(indent=1).encode())
    with TrainingView() as view, open_board(board, journal=job.folder / "metrics.jsonl", note=note) as copy:

        def follow(event: dict[str, Any]) -> None:
            if "note" in event:
                note(event["note"])
            elif "alert" in event:
                alert = event["alert"]
                note(f"{'' if alert['kind'] == 'stopped' else 'alert: '}step {alert['step']}: {alert['words']}")
            elif "step" in event:
                view.show(event)
                copy()

        return run_worker(
            [sys.executable, "-m", "appliance.training.worker", str(job.folder)],
            log=job.folder / "worker.log",
            on_event=follow,
            env={**(env or {}), **({"OMP_NUM_THREADS": str(job.threads)} if job.threads else {})},
            devices=job.devices,
        )


def _shrink(job: TrainingJob) -> TrainingJob | None:
    """The same steps in less memory: half the micro-batch, at last gradient checkpointing; `None` after that."""
    if job.micro_batch > 1:
        return job.model_copy(update={"micro_batch": _halve(job.micro_batch, job.share)})
    if job.checkpointing or job.training.gradient_checkpointing == "off" or not can_checkpoint(job.method):
        return None
    return job.model_copy(update={"checkpointing": True})


def _halve(micro_batch: int, share: int) -> int:
    """The largest divisor of a device's rows that is at most half the micro-batch."""
    return next(m for m in range(max(1, micro_batch // 2), 0, -1) if share % m == 0)


def _explain(end: WorkerEnd, job: TrainingJob) -> TrainingError | InterruptedRunError | DeviceError:
    if end.code == InterruptedRunError.exit_code:
        when = end.failure or "before its first step"
        return InterruptedRunError(f"training stopped by a signal {when}; run the same command to go on")
    if end.code == DeviceError.exit_code:
        ways = "a shorter max_length, qlora or a larger device"
        is_off = job.training.gradient_checkpointing == "off"
        ways = f"training.gradient_checkpointing: auto, {ways}" if is_off else ways
        return DeviceError(f"out of memory with micro-batch 1: {end.failure}; use {ways}")
    if end.code == LostDeviceError.exit_code:
        return DeviceError(
            f"the device failed: {end.failure}; run the same command to go on from the newest checkpoint, here when "
            "nvidia-smi is well again or on another machine of this kind"
        )
    return TrainingError(f"training: {end.failure}")
