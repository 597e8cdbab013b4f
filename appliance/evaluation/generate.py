"""The parent's side of generation: write the prompts, run the child, check what came back.

Outputs are appended batch by batch, so an interrupted evaluation goes on where it stopped; batches
are fixed by the job alone, so that it gives the same outputs as an uninterrupted one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict

from appliance.command import run_worker
from appliance.digest import digest_json, write_atomic
from appliance.errors import DeviceError, EvaluationError, InterruptedRunError, LostDeviceError
from appliance.evaluation.arms import Arm, Prompt
from appliance.evaluation.outputs import Output, decode_outputs
from appliance.model.faults import name_end
from appliance.progress import Progress


class GenerationJob(BaseModel):
    """What the generation child needs; prompts are in `prompts.jsonl`, outputs in `outputs.jsonl`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path
    arms: tuple[Arm, ...]
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    batch: int
    precision: str
    threads: int | None = None


def generate(
    job: GenerationJob,
    prompts: Sequence[Prompt],
    *,
    note: Callable[[str], None],
    env: Mapping[str, str] | None = None,
) -> tuple[Output, ...]:
    """One output per prompt. Raises `EvaluationError`, `DeviceError`, or `InterruptedRunError` on a signal."""
    _start_over_if_changed(job, prompts)
    write_atomic(job.folder / "prompts.jsonl", b"".join(msgspec.json.encode(p) + b"\n" for p in prompts))
    write_atomic(job.folder / "job.json", job.model_dump_json(indent=1).encode())
    with Progress("generate", unit=" answers") as bar:

        def follow(event: dict[str, Any]) -> None:
            if "note" in event:
                note(event["note"])
            elif "done" in event:
                bar.advance(event["done"], total=len(prompts), note=event["arm"])

        end = run_worker(
            [sys.executable, "-m", "appliance.evaluation.worker", str(job.folder)],
            log=job.folder / "worker.log",
            on_event=follow,
            env=env,
        )
    end = name_end(end)
    if end.code == InterruptedRunError.exit_code:
        raise InterruptedRunError("evaluation stopped by a signal; run the same command to go on")
    if end.code == DeviceError.exit_code:
        raise DeviceError(
            f"evaluation: out of memory: {end.failure}; the answers so far are kept: run the same command on a device "
            "with more, or where nothing else takes its memory"
        )
    if end.code == LostDeviceError.exit_code:
        raise DeviceError(f"evaluation: the device failed: {end.failure}; run the same command to go on")
    if end.code:
        raise EvaluationError(f"evaluation: {end.failure}")
    return decode_outputs((job.folder / "outputs.jsonl").read_bytes())


def _start_over_if_changed(job: GenerationJob, prompts: Sequence[Prompt]) -> None:
    """Outputs of another job (other prompts, adapter or settings) are not continued."""
    stamp = job.folder / "outputs.of"
    digest = digest_json([job.model_dump(mode="json"), [msgspec.to_builtins(p) for p in prompts]])
    if not stamp.is_file() or stamp.read_text("ascii") != digest:
        (job.folder / "outputs.jsonl").unlink(missing_ok=True)
        write_atomic(stamp, digest.encode())
