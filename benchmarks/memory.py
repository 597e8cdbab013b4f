"""Memory on a GPU, counted without one: what each contender of `gpu.py` holds at its peak, at the models' real sizes.

The trainers run their steps on the CUDA device of `tests/emulated/`, which hands out addresses, counts them as torch's
allocator does, and here computes nothing large (`EMULATED_CUDA=shapes`): 70B takes minutes on two cores. Counted are
tensors alone. What CUDA takes for itself, workspaces of libraries and what an allocator cannot use again are not, and
losses and rates mean nothing. The plan's figure is for all of it: it is set beside the count with `CONTEXT` on top.

    make bench-memory                       # every job and contender, about half an hour on 2 cores
    make bench-memory ARGS="--only 8b-lora"

It writes `benchmarks/results/memory.json`. On a real GPU `gpu.py` measures the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a bare checkout, nothing installed
sys.path.insert(0, str(Path(__file__).parent))

import gpu
import torch

RESULTS = gpu.RESULTS / "memory.json"
CONTEXT = 0.5  # GiB that a process with CUDA takes before it has a tensor
ALLOWED = 0.05  # of the count: how far the plan may be off
STEPS = 3
CONTENDERS = ("trl", "trl-best", "appliance")  # a compiler's memory is that of its kernels, which are not here


def main() -> None:
    """Count the jobs, print the table, write the JSON; exit code 1 where the plan is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=gpu.JOBS, default=[])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON; other jobs in it are kept")
    parser.add_argument("--run", nargs=2, metavar=("JOB", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if os.environ.get("EMULATED_CUDA") != "shapes":
        raise SystemExit("there are no tensors to count without the emulated device: make bench-memory")
    if options.run:
        print(json.dumps(count(*options.run)))
        return
    found = json.loads(options.out.read_bytes())["jobs"] if options.out.exists() else {}
    for job in options.only or list(gpu.JOBS):
        wanted = [c for c in gpu.JOBS[job].get("contenders", CONTENDERS) if c in CONTENDERS]
        found[job] = {contender: count_apart(job, contender) for contender in wanted}
        gpu.write_results({**describe(), "jobs": found}, options.out)
    if faults := [job for job, figures in found.items() if abs(figures["appliance"]["off"]) > ALLOWED]:
        raise SystemExit(f"the plan is off by more than {ALLOWED:.0%}: {', '.join(faults)}")


def count_apart(job: str, contender: str) -> dict[str, Any]:
    """The figure from a process of its own, printed as a line of the table; a failure ends all, with what it said."""
    argv = [sys.executable, __file__, "--run", job, contender]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{done.stderr}{job} {contender}: exit code {done.returncode}")
    figure: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    plan = f", planned {figure['planned_gib']:.1f} for all ({figure['off']:+.1%})" if "off" in figure else ""
    held = f"{figure['held_gib']:6.2f} GiB for {figure['tokens']} tokens"
    print(f"{job:<10} {contender:<10} holds {held}{plan}", flush=True)
    return figure


def count(job: str, contender: str) -> dict[str, Any]:
    """The peak of this process's tensors over some steps of a job, in GiB."""
    sizes: list[int] = []
    with ExitStack() as stack:
        for change in (*leave_values_out(job), watch_sizes(sizes)):
            stack.enter_context(change)
        figure = gpu.measure(job, contender, is_tiny=False)
    held, planned = figure["peak_gib"], figure["predicted_gib"]
    counted = {"held_gib": held, "tokens": max(sizes)}
    if planned is None:
        return counted
    return {**counted, "planned_gib": planned, "off": round(planned / (held + CONTEXT) - 1, 4)}


def watch_sizes(sizes: list[int]) -> Any:
    """Put down how many tokens each pass with gradients computes at once, padding among them."""
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def watch(model: Any, *arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            sizes.append(next(v for v in (*arguments, options.get("input_ids")) if v is not None).numel())
        return forward(model, *arguments, **options)

    return patch.object(LlamaModel, "forward", watch)


def leave_values_out(job: str) -> list[Any]:
    """The few questions of the trainers that only values answer, answered; and TRL's kernels, which are Triton's."""
    from trl.kernels import chunked_logprob

    from appliance.training import trainer

    def fold(*arguments: Any, **_options: Any) -> None:
        for statistic in arguments[3:5]:  # the running maximum, the sum of exponentials
            statistic.fill_(1.0)

    return [
        patch.dict(gpu.JOBS, {job: gpu.JOBS[job] | {"steps": STEPS}}),
        patch.object(gpu, "score", lambda *_: 0.0),
        patch.object(chunked_logprob, "_forward_tile", fold),
        patch.object(chunked_logprob, "_backward_tile", lambda *_a, **_o: None),
        patch.object(trainer, "find_packing_fault", lambda *_a, **_o: ""),
        patch.object(trainer, "can_fuse", lambda *_a, **_o: True),
        patch.object(trainer, "check_trained", lambda *_a, **_o: None),
    ]


def describe() -> dict[str, Any]:
    """Date and versions; what was counted on is no device."""
    return {k: v for k, v in gpu.describe_machine().items() if k != "device"}


if __name__ == "__main__":
    main()
