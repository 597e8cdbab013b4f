"""`python -m appliance.evaluation.worker FOLDER`: the generation child. Exit codes as in `appliance.child`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from appliance.child import Emit, StopFlag, import_libraries, run_child
from appliance.digest import write_atomic
from appliance.evaluation.arms import Arm, Prompt
from appliance.evaluation.generate import GenerationJob
from appliance.evaluation.outputs import decode_outputs
from appliance.model import load_template
from appliance.model.faults import device_faults_as_errors


def main(folder: Path) -> int:
    """Answer every prompt of the job in `folder` that has no answer yet."""
    job = GenerationJob.model_validate_json((folder / "job.json").read_bytes())
    prompts = [msgspec.json.decode(x, type=Prompt) for x in (folder / "prompts.jsonl").read_bytes().splitlines()]

    def work(_stop: StopFlag, emit: Emit) -> None:
        done = _load_done(folder / "outputs.jsonl")
        emit(done=len(done), arm="")
        with import_libraries(four_bit=job.four_bit):
            import appliance.evaluation.generation  # noqa: F401 - what is below finds it
        with device_faults_as_errors():
            for arms in group_arms(job.arms):
                _run_arms(job, arms, arms[0].model, prompts=prompts, done=done, emit=emit)

    return run_child(work)


def _run_arms(
    job: GenerationJob,
    arms: Sequence[Arm],
    folder: Path,
    *,
    prompts: Sequence[Prompt],
    done: set[tuple[str, str]],
    emit: Emit,
) -> None:
    """The arms that share one model; a stop loses the answers of one batch."""
    from appliance.evaluation.beginning import read_beginning
    from appliance.evaluation.generation import (
        check_effect,
        cut_batches,
        generate_batch,
        load_arms,
        order_arms,
        select_padding,
        use_arm,
    )

    if job.threads:
        import torch

        torch.set_num_threads(job.threads)
    template = load_template(folder)
    model = load_arms(arms, folder=folder, precision=job.precision, four_bit=job.four_bit, spread=job.devices > 1)
    with (job.folder / "outputs.jsonl").open("ab") as sink:
        for arm, asked in order_arms(arms, prompts):
            with use_arm(model, arm):
                if arm.adapter is not None and asked:
                    check_effect(model, arm, asked[0])
                beginning = read_beginning(model, asked)
                for batch in cut_batches(asked, job.batch, padding=select_padding(arm)):
                    if all((p.id, p.arm) in done for p in batch):
                        continue
                    outputs = generate_batch(
                        model,
                        batch,
                        template=template,
                        stop_ids=job.stop_ids,
                        max_new_tokens=job.max_new_tokens,
                        beginning=beginning,
                    )
                    # a batch torn by a kill is generated again whole, and only what is missing is added
                    fresh = [o for o in outputs if (o.id, o.arm) not in done]
                    sink.write(b"".join(msgspec.json.encode(o) + b"\n" for o in fresh))
                    sink.flush()
                    os.fsync(sink.fileno())
                    done.update((p.id, p.arm) for p in batch)
                    emit(done=len(done), arm=arm.name)


def _load_done(file: Path) -> set[tuple[str, str]]:
    """What is answered already; a torn last line is cut off so that appending is safe."""
    if not file.is_file():
        return set()
    outputs = decode_outputs(file.read_bytes())
    write_atomic(file, b"".join(msgspec.json.encode(o) + b"\n" for o in outputs))
    return {(o.id, o.arm) for o in outputs}


def group_arms(arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms that can share one loaded model: same folder, and adapters of one kind, which PEFT demands.

    Arms without an adapter go with the first kind of their folder, so that no model is loaded for them alone.
    """
    from appliance.evaluation.generation import read_kind

    groups: dict[tuple[str, str], list[Arm]] = {}
    for arm in sorted(arms, key=lambda a: (str(a.model), a.adapter is None)):
        mine = [k for k in groups if k[0] == str(arm.model)]
        key = (str(arm.model), read_kind(arm)) if arm.adapter is not None or not mine else mine[0]
        groups.setdefault(key, []).append(arm)
    return list(groups.values())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
