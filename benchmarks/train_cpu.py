"""Training speed on this CPU: the appliance against TRL as it comes and TRL as an expert sets it.

The same rows of the demo dataset, the same LoRA on SmolLM2-135M, 8 rows a step, one epoch, the same
order; each contender in a process of its own, in turn, for several rounds. A figure is the dataset's
real tokens (padding does not count) a second, the first steps left out; a ratio is the median over
the rounds of the ratios within a round. `--jobs` times whole processes instead: `appliance train` of
200 rows against `trl sft` of the same rows.

Run it with `make bench`; `ARGS="--rounds 1 --rows 64"` for a look, `ARGS="--only trl --rounds 1"` for
one peer. It prints a table and writes `benchmarks/results/train_cpu.json` and `train_cpu.svg`, the
losses of the appliance and of TRL over equal real tokens. Each contender's adapter is then
asked, by plain transformers in fp32 and outside of the timed part, for its loss on the same unseen rows:
the training losses alone depend on the order of the rows, which is each trainer's own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from appliance.command import ask_large_pages
from appliance.demo.requests import build_requests
from appliance.example import encode_examples
from appliance.model import load_template
from appliance.model.base import resolve_base
from appliance.plan import read_machine
from appliance.recipe import Recipe, load_recipe
from appliance.report.plots import Plot, draw_image
from appliance.training import TrainingJob, build_rows, prepare_rows, train

ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".cache" / "appliance"
RESULTS = ROOT / "benchmarks" / "results"
BATCH, WARM_UP, RATE, SEED = 8, 3, 3e-4, 17
UNSEEN_ROWS = 32
JOB_ROWS = 200
CONTENDERS = {
    "appliance": "rows end to end, their common prefix once, head on trained positions, bf16",
    "appliance-apart": "the same with each row's prefix computed for itself (speed.prefix: standard)",
    "trl": "TRL's SFTTrainer with its defaults: padded, fp32 weights under autocast, checkpointing",
    "trl-bf16": "TRL, bf16 weights, no checkpointing, rows of like length together, fused AdamW",
    "trl-pages": "trl-bf16 in pages of 2 MiB (GLIBC_TUNABLES), as the appliance starts its own processes",
    "trl-packed": "TRL, bf16 weights, no checkpointing, best-fit packing of 640 tokens, fused AdamW",
    "trl-flat": "TRL, bf16 weights, no checkpointing, padding-free batches, fused AdamW",
}
Figures = dict[str, list[dict[str, Any]]]


def main() -> None:
    """Run the rounds, print figures and ratios, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--only", action="append", choices=[c for c in CONTENDERS if c != "appliance"], default=[])
    parser.add_argument("--jobs", action="store_true", help="time whole processes of 200 rows")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options.contender, rows=options.rows)))
    elif options.jobs:
        compare_jobs(rounds=options.rounds)
    else:
        names = ["appliance", *(options.only or [c for c in CONTENDERS if c != "appliance"])]
        compare_rates(names, rounds=options.rounds, rows=options.rows)


def compare_rates(names: list[str], *, rounds: int, rows: int) -> None:
    """Tokens a second of each contender, round by round."""
    figures: Figures = {name: [] for name in names}
    for number in range(1, rounds + 1):
        for name in names:
            figure = run_contender(name, rows=rows)
            figures[name].append(figure)
            rate, loss = figure["tokens_per_second"], figure["unseen_loss"]
            print(f"round {number}  {name:<10} {rate:6.0f} tokens/s  loss on unseen rows {loss:.3f}", flush=True)
    print_table(figures)
    write_results(figures, rows=rows)


def run_contender(name: str, *, rows: int) -> dict[str, Any]:
    """One contender in a process of its own."""
    argv = [sys.executable, __file__, "--contender", name, "--rows", str(rows)]
    env = {**os.environ, **(ask_large_pages(os.environ) if name == "trl-pages" else {})}
    done = subprocess.run(argv, env=env, check=False, capture_output=True, text=True, timeout=3000)
    if done.returncode != 0:
        raise SystemExit(f"{name}: exit {done.returncode}\n{done.stderr[-2000:]}")
    figure: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figure


def find_ratio(figures: Figures, name: str) -> float:
    """The appliance's tokens/s over the contender's, the median of the rounds."""
    pairs = zip(figures["appliance"], figures[name], strict=True)
    return statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)


def print_table(figures: Figures) -> None:
    """Medians and ratios."""
    print(f"\n{'':10} {'tokens/s':>9} {'ratio':>6} {'unseen loss':>12}")
    for name, runs in figures.items():
        rate = statistics.median(f["tokens_per_second"] for f in runs)
        loss = statistics.median(f["unseen_loss"] for f in runs)
        print(f"{name:<10} {rate:9.0f} {find_ratio(figures, name):6.2f} {loss:12.3f}  {CONTENDERS[name]}")
    print("ratio: the appliance's tokens/s over the contender's, the median of the rounds")


def write_results(figures: Figures, *, rows: int) -> None:
    """Figures with date, hardware and versions, and the parity plot."""
    RESULTS.mkdir(exist_ok=True)
    result = {
        **describe_machine(),
        "rows": rows,
        "contenders": {n: CONTENDERS[n] for n in figures},
        "tokens_per_second": {n: [round(f["tokens_per_second"], 1) for f in runs] for n, runs in figures.items()},
        "ratio": {n: round(find_ratio(figures, n), 2) for n in figures if n != "appliance"},
        "unseen_loss": {n: round(statistics.median(f["unseen_loss"] for f in runs), 4) for n, runs in figures.items()},
    }
    (RESULTS / "train_cpu.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    names = [n for n in figures if n != "appliance-apart"][:2]  # a figure has two colours
    curves = {n: [(float(x), float(y)) for x, y in figures[n][-1]["curve"]] for n in names}
    plot = Plot("parity", "Loss over real tokens", curves, scale="log")
    (RESULTS / "train_cpu.svg").write_text(draw_image(plot))


def describe_machine() -> dict[str, Any]:
    """Date, processor and versions."""
    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    packages = ("torch", "transformers", "trl", "peft")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": model.partition(":")[2].strip() or platform.machine(),
        "cores": read_machine().cores,
        "versions": {p: metadata.version(p) for p in packages},
    }


def measure(name: str, *, rows: int) -> dict[str, Any]:
    """Train once; tokens a second after the warm-up, the loss on unseen rows, and the curve."""
    recipe, base = load_demo()
    with tempfile.TemporaryDirectory() as folder:
        if name in TRL:
            return measure_trl(name, base, Path(folder), rows=rows)
        return measure_appliance(name, recipe, base, Path(folder), rows=rows)


def load_demo() -> tuple[Recipe, Path]:
    """The demo's recipe and its base on this disk."""
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml")
    return recipe, resolve_base(recipe.base, root=ROOT, cache=CACHE, note=lambda _: None).folder


def measure_appliance(name: str, recipe: Recipe, base: Path, folder: Path, *, rows: int) -> dict[str, Any]:
    """The product's own call, child process and all."""
    token_rows = prepare_rows(
        build_requests(rows), template=load_template(base), max_length=256, file=folder / "train.rows.jsonl"
    )
    (folder / "validation.rows.jsonl").write_bytes(b"")
    changes: dict[str, Any] = {
        "epochs": 1,
        "learning_rate": RATE,
        "effective_batch": BATCH,
        "checkpoints": 1,
        "seed": SEED,
    }
    if name == "appliance-apart":
        changes["speed"] = recipe.training.speed.model_copy(update={"prefix": "standard"})
    cores = read_machine().cores
    job = TrainingJob(
        folder=folder,
        adapter=folder / "adapter",
        base=base,
        base_name="base",
        method=recipe.method,
        training=recipe.training.model_copy(update={**changes, "schedule": "linear", "warmup_ratio": 0.0}),
        micro_batch=BATCH,
        checkpointing=False,
        threads=cores,
        fingerprint={},
    )
    train(job, note=lambda _: None, env={"OMP_NUM_THREADS": str(cores)})
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    steps = [(r["seconds"], r["loss"]) for r in records if "loss" in r]
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), job.adapter)
    figure = summarise(steps, tokens=sum(len(r.input_ids) for r in token_rows))
    return figure | {"unseen_loss": find_unseen_loss(model, base, rows=rows)}


def find_unseen_loss(model: Any, base: Path, *, rows: int) -> float:
    """The mean loss of an answer's token over rows that come after those that were trained on, in fp32."""
    import torch

    model = model.float().eval()
    unseen = build_requests(rows + UNSEEN_ROWS)[rows:]
    total, count = 0.0, 0
    for row in build_rows(unseen, template=load_template(base), max_length=None):
        ids = torch.tensor([row.input_ids])
        labels = torch.full_like(ids, -100)
        for start, end in row.spans:
            labels[:, start:end] = ids[:, start:end]
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * row.trained
        count += row.trained
    return total / count


def measure_trl(name: str, base: Path, folder: Path, *, rows: int) -> dict[str, Any]:
    """TRL on prompt and completion columns, so that it too trains on the answers only."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(read_machine().cores)
    tokenizer = AutoTokenizer.from_pretrained(base)
    talks = build_talks(rows)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32 if name == "trl" else torch.bfloat16)
    steps: list[tuple[float, float]] = []
    began = 0.0

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_args: Any, **_rest: Any) -> None:
            nonlocal began
            began = time.monotonic()

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_rest: Any) -> None:
            if "loss" in logs:
                steps.append((time.monotonic() - began, logs["loss"]))

    common = {"num_train_epochs": 1, "learning_rate": RATE, "logging_steps": 1, "save_strategy": "no", "seed": SEED}
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **common, **TRL[name]),
        train_dataset=Dataset.from_list([{"prompt": t[:-1], "completion": t[-1:]} for t in talks]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = [len(tokenizer.apply_chat_template(t, return_dict=True)["input_ids"]) for t in talks]
    figure = summarise(steps, tokens=sum(lengths))
    return figure | {"unseen_loss": find_unseen_loss(trainer.model, base, rows=rows)}


_EXPERT: dict[str, Any] = {"gradient_checkpointing": False, "optim": "adamw_torch_fused", "max_length": 256}
_GROUPED = {**_EXPERT, "per_device_train_batch_size": BATCH, "train_sampling_strategy": "group_by_length"}
TRL: dict[str, dict[str, Any]] = {
    "trl": {"per_device_train_batch_size": BATCH},
    "trl-bf16": _GROUPED,
    "trl-pages": _GROUPED,
    "trl-packed": {**_EXPERT, "per_device_train_batch_size": 1, "packing": True, "max_length": 640},
    "trl-flat": {**_EXPERT, "per_device_train_batch_size": BATCH, "padding_free": True, "max_length": None},
}


def build_talks(rows: int) -> list[list[dict[str, str]]]:
    """The demo's rows as plain conversations."""
    return [[{"role": m.role, "content": m.content} for m in e.messages] for e in build_requests(rows)]


def summarise(steps: list[tuple[float, float]], *, tokens: int) -> dict[str, Any]:
    """`steps` are (seconds since the start, loss); every step has about the same number of tokens."""
    seconds = steps[-1][0] - steps[WARM_UP - 1][0]
    share = (len(steps) - WARM_UP) / len(steps)
    return {
        "tokens_per_second": tokens * share / seconds,
        "curve": [(round(tokens * (i + 1) / len(steps)), loss) for i, (_, loss) in enumerate(steps)],
    }


def compare_jobs(*, rounds: int) -> None:
    """Seconds from the command to the saved adapter: `appliance train` against `trl sft`, 200 rows, one epoch."""
    _, base = load_demo()
    ours, theirs = [], []
    for number in range(1, rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            ours.append(time_command(prepare_our_job(Path(folder)), cwd=Path(folder)))
            theirs.append(time_command(prepare_trl_job(Path(folder), base), cwd=Path(folder)))
        print(f"round {number}  appliance train {ours[-1]:6.1f} s  trl sft {theirs[-1]:6.1f} s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(f"appliance train takes {ratio:.2f} of the time of trl sft (median of {rounds})")
    RESULTS.mkdir(exist_ok=True)
    result = {**describe_machine(), "appliance_s": ours, "trl_s": theirs, "ratio": round(ratio, 3)}
    (RESULTS / "train_cpu_jobs.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")


def time_command(argv: list[str], *, cwd: Path) -> float:
    """Wall seconds of a command that must succeed; both get all cores (accelerate would give TRL one)."""
    env = {**os.environ, "OMP_NUM_THREADS": str(read_machine().cores)}
    began = time.monotonic()
    done = subprocess.run(argv, cwd=cwd, env=env, check=False, capture_output=True, text=True, timeout=3000)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(argv[:4])}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return round(time.monotonic() - began, 2)


def prepare_our_job(folder: Path) -> list[str]:
    """A dataset folder of which 200 rows are in train, a recipe, and the command."""
    demo = (ROOT / "recipes" / "demo.yaml").read_text("utf-8")
    data = folder / "datasets" / "workplace-requests"
    data.mkdir(parents=True)
    card = "name: workplace-requests\ndescription: Requests to tickets.\nlicence: Apache-2.0\ncontract: {type: text}\n"
    (data / "dataset.yaml").write_text(card)
    (data / "rows.jsonl").write_bytes(encode_examples(tuple(build_requests(int(JOB_ROWS / 0.8)))))
    recipe = demo.replace("epochs: 2", "epochs: 1").replace("effective_batch: 8", f"effective_batch: {BATCH}")
    (folder / "recipe.yaml").write_text(recipe)
    return [sys.executable, "-m", "appliance", "train", "recipe.yaml", "--cache", str(CACHE)]


def prepare_trl_job(folder: Path, base: Path) -> list[str]:
    """The same rows as prompt and completion, and TRL's own command with its defaults."""
    data = folder / "trl"
    data.mkdir()
    lines = [json.dumps({"prompt": t[:-1], "completion": t[-1:]}) for t in build_talks(JOB_ROWS)]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    options = {
        "--model_name_or_path": str(base),
        "--dataset_name": str(data),
        "--output_dir": str(folder / "out"),
        "--num_train_epochs": "1",
        "--per_device_train_batch_size": str(BATCH),
        "--learning_rate": str(RATE),
        "--lora_r": "16",
        "--lora_alpha": "32",
        "--lora_target_modules": "all-linear",
        "--report_to": "none",
        "--use_cpu": "true",
    }
    return [
        str(Path(sys.executable).parent / "trl"),
        "sft",
        "--use_peft",
        *(w for pair in options.items() for w in pair),
    ]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
