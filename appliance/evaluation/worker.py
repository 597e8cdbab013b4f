"""`python -m appliance.evaluation.worker FOLDER`: the generation child.

Exit codes: 0 every prompt answered; 33 stopped by a signal between two batches. One JSON object a
line on standard output for the parent.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from appliance.digest import write_atomic
from appliance.evaluation.arms import Arm, Prompt
from appliance.evaluation.generate import GenerationJob
from appliance.evaluation.outputs import decode_outputs
from appliance.model import load_template

_QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(folder: Path) -> int:
    """Answer every prompt of the job that has no answer yet."""
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _frame: stopped.append(n))
    os.environ.update(_QUIET)
    job = GenerationJob.model_validate_json((folder / "job.json").read_bytes())
    prompts = [msgspec.json.decode(x, type=Prompt) for x in (folder / "prompts.jsonl").read_bytes().splitlines()]
    done = _load_done(folder / "outputs.jsonl")
    _emit(done=len(done), arm="")
    for model_folder, arms in itertools.groupby(sorted(job.arms, key=_place), key=_place):
        if stopped or _run_arms(job, list(arms), Path(model_folder), prompts=prompts, done=done, stopped=stopped):
            return 33
    return 0


def _run_arms(
    job: GenerationJob,
    arms: Sequence[Arm],
    folder: Path,
    *,
    prompts: Sequence[Prompt],
    done: set[tuple[str, str]],
    stopped: list[int],
) -> bool:
    """The arms that share one model; whether a signal stopped them."""
    from appliance.evaluation.generation import cut_batches, generate_batch, load_arms, use_arm

    if job.threads:
        import torch

        torch.set_num_threads(job.threads)
    template = load_template(folder)
    model = load_arms(arms, folder=folder, precision=job.precision)
    with (job.folder / "outputs.jsonl").open("ab") as sink:
        for arm in arms:
            with use_arm(model, arm):
                for batch in cut_batches([p for p in prompts if p.arm == arm.name], job.batch):
                    if all((p.id, p.arm) in done for p in batch):
                        continue
                    if stopped:
                        return True
                    outputs = generate_batch(
                        model, batch, template=template, stop_ids=job.stop_ids, max_new_tokens=job.max_new_tokens
                    )
                    # a batch torn by a kill is generated again whole, and only what is missing is added
                    fresh = [o for o in outputs if (o.id, o.arm) not in done]
                    sink.write(b"".join(msgspec.json.encode(o) + b"\n" for o in fresh))
                    sink.flush()
                    os.fsync(sink.fileno())
                    done.update((p.id, p.arm) for p in batch)
                    _emit(done=len(done), arm=arm.name)
    return False


def _load_done(file: Path) -> set[tuple[str, str]]:
    """What is answered already; a torn last line is cut off so that appending is safe."""
    if not file.is_file():
        return set()
    outputs = decode_outputs(file.read_bytes())
    write_atomic(file, b"".join(msgspec.json.encode(o) + b"\n" for o in outputs))
    return {(o.id, o.arm) for o in outputs}


def _place(arm: Arm) -> str:
    return str(arm.model)


def _emit(**event: object) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
