"""The parent's side of generation: write the prompts, run the child, check what came back.

Outputs are appended batch by batch, so an interrupted evaluation goes on where it stopped; batches
are fixed by the job alone, so that it gives the same outputs as an uninterrupted one. Where memory runs
out, all arms answer again in batches of half the size: no arm is compared with another's rounding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict, ValidationError

from appliance.command import WorkerEnd, run_worker
from appliance.digest import digest_json, write_atomic
from appliance.errors import DeviceError, EvaluationError, InterruptedRunError, LostDeviceError
from appliance.evaluation.arms import Arm, Prompt
from appliance.evaluation.outputs import Output, decode_outputs
from appliance.model.faults import name_end
from appliance.progress import Progress


class GenerationJob(BaseModel):
    """What the generation child needs; prompts are in `prompts.jsonl`, outputs in `outputs.jsonl`.

    The base lies in 4 bits if `four_bit`, over so many `devices`. `weights` tell what the arms' files are: answers
    of others are not continued.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path
    arms: tuple[Arm, ...]
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    batch: int
    precision: str
    four_bit: bool = False
    devices: int = 1
    threads: int | None = None
    weights: tuple[str | None, ...] = ()


def generate(
    job: GenerationJob,
    prompts: Sequence[Prompt],
    *,
    note: Callable[[str], None],
    env: Mapping[str, str] | None = None,
) -> tuple[Output, ...]:
    """One output per prompt. Raises `EvaluationError`, `DeviceError`, or `InterruptedRunError` on a signal.

    Out of memory: all again in batches of half the size, down to one row.
    """
    job = _adopt_batch(job)
    write_atomic(job.folder / "prompts.jsonl", b"".join(msgspec.json.encode(p) + b"\n" for p in prompts))
    while True:
        _start_over_if_changed(job, prompts)
        write_atomic(job.folder / "job.json", job.model_dump_json(indent=1).encode())
        end = name_end(_run_child(job, count=len(prompts), note=note, env=env))
        if end.code == 0:
            return decode_outputs((job.folder / "outputs.jsonl").read_bytes())
        if end.code != DeviceError.exit_code or job.batch == 1:
            raise _explain(end)
        job = job.model_copy(update={"batch": job.batch // 2})
        note(f"out of memory; every arm answers again, in batches of {job.batch}")


def _adopt_batch(job: GenerationJob) -> GenerationJob:
    """The job in the batches that fitted last time, where it was the same job otherwise."""
    try:
        before = GenerationJob.model_validate_json((job.folder / "job.json").read_bytes())
    except (OSError, ValidationError):
        return job
    smaller = job.model_copy(update={"batch": min(job.batch, before.batch)})
    return smaller if smaller == before else job


def _run_child(
    job: GenerationJob, *, count: int, note: Callable[[str], None], env: Mapping[str, str] | None
) -> WorkerEnd:
    with Progress("generate", unit=" answers") as bar:

        def follow(event: dict[str, Any]) -> None:
            if "note" in event:
                note(event["note"])
            elif "done" in event:
                bar.advance(event["done"], total=count, note=event["arm"])

        return run_worker(
            [sys.executable, "-m", "appliance.evaluation.worker", str(job.folder)],
            log=job.folder / "worker.log",
            on_event=follow,
            env=env,
            devices=job.devices,
        )


def _explain(end: WorkerEnd) -> EvaluationError | InterruptedRunError | DeviceError:
    if end.code == InterruptedRunError.exit_code:
        return InterruptedRunError("evaluation stopped by a signal; run the same command to go on")
    if end.code == DeviceError.exit_code:
        return DeviceError(
            f"evaluation: out of memory with one row at a time: {end.failure}; the answers so far are kept: run the "
            "same command on a device with more, or where nothing else takes its memory"
        )
    if end.code == LostDeviceError.exit_code:
        return DeviceError(f"evaluation: the device failed: {end.failure}; run the same command to go on")
    return EvaluationError(f"evaluation: {end.failure}")


def _start_over_if_changed(job: GenerationJob, prompts: Sequence[Prompt]) -> None:
    """Outputs of another job (other prompts, weights or settings) are not continued."""
    stamp = job.folder / "outputs.of"
    digest = digest_json([job.model_dump(mode="json"), [msgspec.to_builtins(p) for p in prompts]])
    if not stamp.is_file() or stamp.read_text("ascii") != digest:
        (job.folder / "outputs.jsonl").unlink(missing_ok=True)
        write_atomic(stamp, digest.encode())
