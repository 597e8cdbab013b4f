"""Training speed on this CPU: the appliance against TRL as it comes and TRL as an expert sets it.

The same rows of the demo dataset, the same LoRA on SmolLM2-135M, the same batch of 8 rows, one epoch,
each contender in a process of its own, the three in turn, several rounds. A figure is the trained
dataset's real tokens (padding does not count) a second, the first steps left out; a ratio is the
median over the rounds. Run it with `make bench`; `ARGS="--rounds 1 --rows 96"` for a look.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from appliance.demo.requests import build_requests
from appliance.model import load_template
from appliance.model.base import resolve_base
from appliance.plan import read_machine
from appliance.recipe import Recipe, load_recipe
from appliance.training import TrainingJob, prepare_rows, train

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "appliance"
BATCH, WARM_UP, RATE = 8, 3, 3e-4
CONTENDERS = {
    "appliance": "rows end to end, head on trained positions, bf16",
    "trl": "TRL's SFTTrainer with its defaults: padded, fp32",
    "trl-tuned": "TRL's SFTTrainer, bf16, rows of like length together, fused AdamW",
}


def main() -> None:
    """Run the rounds and print figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options.contender, rows=options.rows)))
        return
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(1, options.rounds + 1):
        for name in CONTENDERS:
            figure = run_contender(name, rows=options.rows)
            figures[name].append(figure)
            print(
                f"round {number}  {name:<10} {figure['tokens_per_second']:6.0f} tokens/s  loss {figure['loss']:.3f}",
                flush=True,
            )
    print_table(figures)


def run_contender(name: str, *, rows: int) -> dict[str, float]:
    """One contender in a process of its own."""
    argv = [sys.executable, __file__, "--contender", name, "--rows", str(rows)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=1800)
    figure: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figure


def print_table(figures: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and each contender's time as a multiple of the appliance's, round by round."""
    print(f"\n{'':10} {'tokens/s':>9} {'ratio':>6} {'last loss':>10}")
    for name, words in CONTENDERS.items():
        rates = [f["tokens_per_second"] for f in figures[name]]
        ratios = [
            a["tokens_per_second"] / b["tokens_per_second"]
            for a, b in zip(figures["appliance"], figures[name], strict=True)
        ]
        loss = statistics.median(f["loss"] for f in figures[name])
        print(f"{name:<10} {statistics.median(rates):9.0f} {statistics.median(ratios):6.2f} {loss:10.3f}  {words}")
    print("ratio: the appliance's tokens/s over the contender's, the median of the rounds")


def measure(name: str, *, rows: int) -> dict[str, float]:
    """Train once; tokens per second after the warm-up and the mean loss of the last steps."""
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml")
    base = resolve_base(recipe.base, root=ROOT, cache=CACHE, note=lambda _: None).folder
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        if name == "appliance":
            return measure_appliance(recipe, base, folder, rows=rows)
        return measure_trl(base, folder, rows=rows, is_tuned=name == "trl-tuned")


def measure_appliance(recipe: Recipe, base: Path, folder: Path, *, rows: int) -> dict[str, float]:
    """The product's own call, child process and all."""
    template = load_template(base)
    token_rows = prepare_rows(build_requests(rows), template=template, max_length=256, file=folder / "train.rows.jsonl")
    (folder / "validation.rows.jsonl").write_bytes(b"")
    section = recipe.training.model_copy(
        update={"epochs": 1, "learning_rate": RATE, "effective_batch": BATCH, "checkpoints": 1}
    )
    cores = read_machine().cores
    job = TrainingJob(
        folder=folder,
        adapter=folder / "adapter",
        base=base,
        base_name="base",
        method=recipe.method,
        training=section,
        micro_batch=BATCH,
        checkpointing=False,
        threads=cores,
        fingerprint={},
    )
    train(job, note=lambda _: None, env={"OMP_NUM_THREADS": str(cores)})
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    steps = [(r["seconds"], r["loss"]) for r in records if "loss" in r]
    return summarise(steps, tokens=sum(len(r.input_ids) for r in token_rows))


def measure_trl(base: Path, folder: Path, *, rows: int, is_tuned: bool) -> dict[str, float]:
    """TRL on prompt and completion columns, so that it too trains on the answers only."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(read_machine().cores)
    tokenizer = AutoTokenizer.from_pretrained(base)
    talks = [[{"role": m.role, "content": m.content} for m in e.messages] for e in build_requests(rows)]
    dtype = torch.bfloat16 if is_tuned else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    tuned: dict[str, Any] = {"train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}
    steps: list[tuple[float, float]] = []
    began = 0.0

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_args: Any, **_rest: Any) -> None:
            nonlocal began
            began = time.monotonic()

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_rest: Any) -> None:
            if "loss" in logs:
                steps.append((time.monotonic() - began, logs["loss"]))

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            max_length=256,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=is_tuned,
            gradient_checkpointing=False,
            disable_tqdm=True,
            **(tuned if is_tuned else {}),
        ),
        train_dataset=Dataset.from_list([{"prompt": t[:-1], "completion": t[-1:]} for t in talks]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = [len(tokenizer.apply_chat_template(t, return_dict=True)["input_ids"]) for t in talks]
    return summarise(steps, tokens=sum(lengths))


def summarise(steps: list[tuple[float, float]], *, tokens: int) -> dict[str, float]:
    """`steps` are (seconds since the start, loss); every step has about the same number of tokens."""
    seconds = steps[-1][0] - steps[WARM_UP - 1][0]
    share = (len(steps) - WARM_UP) / len(steps)
    return {
        "tokens_per_second": tokens * share / seconds,
        "loss": statistics.mean(loss for _, loss in steps[-5:]),
    }


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
