"""Forgetting on a real model: plain LoRA, with replay, and with elastic weight consolidation.

SmolLM2-135M learns the demo's task from the same task rows, each once, in every arm; replayed rows come on
top, in further steps. A seed draws the rows, their order and the adapter's start anew, for all arms alike. Measured on
rows that no arm trains on: exact match and NLL on held-out requests, and on general text the NLL of
reference answers and KL(base || tuned), all in nats per token. What an arm gains or loses on the task
against plain LoRA is the paired difference over all seeds' requests with its 95 % interval (Newcombe 1998).
General text is the project's own: chats written for this benchmark, and answers of the base model to the
package's prompts, every second of which is kept from training and from the Fisher.

Run it with `python benchmarks/forgetting.py`; what is finished is kept in `--work` and not done
again. Prints a table and writes `benchmarks/results/forgetting.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from appliance.data import load_prompts, order_general
from appliance.demo.requests import build_requests
from appliance.digest import canonical_json, write_atomic
from appliance.evaluation import Arm, GenerationJob, Prompt, generate
from appliance.example import Example, decode_examples
from appliance.general import answer_prompts, select_replay
from appliance.model import Base, load_template
from appliance.model.base import resolve_base
from appliance.plan import read_machine
from appliance.preparation import Workspace, read_versions
from appliance.recipe import EwcSection, load_recipe
from appliance.run import Run
from appliance.statistics import paired_gain_interval
from appliance.training import TrainingJob, prepare_rows, train

ROOT = Path(__file__).parent.parent
CHATS = Path(__file__).with_name("general_chats.jsonl")
TEST_ROWS, BATCH, FISHER_ROWS = 200, 8, 32
PROMPTS, ANSWER_TOKENS = 96, 64
THREADS = int(os.environ.get("OMP_NUM_THREADS", "0")) or read_machine().cores
RECIPE = load_recipe(ROOT / "recipes" / "demo.yaml")


@dataclass(frozen=True)
class Contender:
    """One way to train: a share of replayed rows, a strength of the penalty, or neither; `longer` is more task rows."""

    name: str
    share: float = 0.0
    strength: float = 0.0
    rate: float = 1e-3
    longer: float = 1.0


@dataclass(frozen=True)
class Setting:
    """What the arms of one seed share; `steps` of task rows, replayed ones not counted."""

    seed: int
    steps: int
    base: Base
    pool: tuple[Example, ...]
    kept: tuple[Example, ...]
    work: Path

    def draw_requests(self, longer: float) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        """The rows to train on and those to test on, the same for all arms; who trains longer has more behind them."""
        count, more = self.steps * BATCH, round((longer - 1.0) * self.steps) * BATCH
        rows = build_requests(count + TEST_ROWS + more, seed=self.seed)
        return (*rows[:count], *rows[count + TEST_ROWS :]), rows[count : count + TEST_ROWS]


def main() -> None:
    """Run what is not done yet, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "forgetting")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "appliance")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--share", type=float, nargs="*", default=[0.2])
    parser.add_argument("--strength", type=float, nargs="*", default=[30.0, 100.0])
    parser.add_argument("--longer", type=float, default=1.5, help="task rows of a longer arm of the last strength")
    parser.add_argument("--lower-rate", type=float, nargs="*", default=[], help="of plain LoRA, to compare")
    parser.add_argument("--pieces", type=int, default=99, help="stop after so many pieces; the next call goes on")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure_general(options.measure)))
        return
    contenders = [
        Contender("lora", rate=options.rate),
        *(Contender(f"replay {s:g}", share=s, rate=options.rate) for s in options.share),
        *(Contender(f"ewc {s:g}", strength=s, rate=options.rate) for s in options.strength),
        *(
            Contender(f"ewc {s:g} longer", strength=s, rate=options.rate, longer=options.longer)
            for s in options.strength[-1:]
            if options.longer > 1
        ),
        *(Contender(f"lora at {r:g}", rate=r) for r in options.lower_rate),
    ]
    workspace = Workspace(ROOT, options.cache, options.work, note=lambda text: print(f"  {text}", flush=True))
    base = resolve_base(RECIPE.base, root=ROOT, cache=options.cache, note=workspace.note)
    pool, kept = split_general(base, workspace)
    found: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contenders}
    pieces = [(seed, contender) for seed in options.seeds for contender in contenders]
    for seed, contender in pieces[: options.pieces]:
        setting = Setting(seed, options.steps, base, pool, kept, options.work)
        found[contender.name].append(run_contender(contender, setting))
        print(json.dumps({contender.name: found[contender.name][-1]}), flush=True)
    if options.pieces >= len(pieces):
        report(found, options=options)


def split_general(base: Base, workspace: Workspace) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The base's own answers: those to train with, and those that only the measurement sees."""
    run = Run(folder=workspace.runs, key="")
    answers = answer_prompts(
        base,
        load_prompts()[:PROMPTS],
        limit=ANSWER_TOKENS,
        run=run,
        workspace=workspace,
        precision="auto",
        threads=THREADS,
    )
    ordered = order_general(answers)
    return tuple(ordered[::2]), tuple(ordered[1::2])


def run_contender(contender: Contender, setting: Setting) -> dict[str, Any]:
    """Train, answer the held-out requests, and measure general text; each part once."""
    name = f"{contender.name.replace(' ', '-')}-{contender.rate:g}-{setting.steps}-{setting.seed}"
    folder, result = setting.work / name, setting.work / name / "result.json"
    if result.is_file():
        done: dict[str, Any] = json.loads(result.read_bytes())
        return done
    job = build_job(contender, setting, folder)
    borrow_fisher(folder, setting.work)
    if not (folder / "summary.json").is_file():
        train(job, note=lambda text: print(f"  {text}", flush=True), env={"OMP_NUM_THREADS": str(job.threads)})
    summary = json.loads((folder / "summary.json").read_bytes())
    tests = setting.draw_requests(contender.longer)[1]
    right = answer_task(tests, setting.base, job)
    template = load_template(setting.base.folder)
    texts = {"task": tests, "chats": decode_examples(CHATS.read_bytes()), "answers": setting.kept}
    for kind, rows in texts.items():
        prepare_rows(rows, template=template, max_length=512, file=folder / f"{kind}.rows.jsonl")
    measured = subprocess.run(
        [sys.executable, __file__, "--measure", str(folder)], check=True, capture_output=True, text=True
    )
    figures = {
        "right": right,
        **json.loads(measured.stdout.splitlines()[-1]),
        **{k: summary[k] for k in ("last_loss", "seconds", "steps", "device", "dtype", "threads")},
    }
    write_atomic(result, canonical_json(figures))
    return figures


def build_job(contender: Contender, setting: Setting, folder: Path) -> TrainingJob:
    """Task rows and, on top, the share of replayed ones."""
    template = load_template(setting.base.folder)
    requests = setting.draw_requests(contender.longer)[0]
    count = round(len(requests) * contender.share / (1 - contender.share))
    rows = (*requests, *(select_replay(setting.pool, count=count) if count else ()))
    prepare_rows(rows, template=template, max_length=512, file=folder / "train.rows.jsonl")
    (folder / "validation.rows.jsonl").write_bytes(b"")
    if contender.strength:
        fisher_rows = tuple(order_general(setting.pool)[:FISHER_ROWS])
        prepare_rows(fisher_rows, template=template, max_length=512, file=folder / "general.rows.jsonl")
    section = {
        "epochs": 1,
        "learning_rate": contender.rate,
        "effective_batch": BATCH,
        "checkpoints": 3,
        "seed": setting.seed,
    }
    return TrainingJob(
        folder=folder,
        adapter=folder / "adapter",
        base=setting.base.folder,
        base_name="base",
        method=RECIPE.method,
        training=RECIPE.training.model_copy(update=section),
        ewc=EwcSection(strength=contender.strength, rows=FISHER_ROWS) if contender.strength else None,
        micro_batch=BATCH,
        checkpointing=False,
        threads=THREADS,
        fingerprint={"benchmark": "forgetting"},
    )


def borrow_fisher(folder: Path, work: Path) -> None:
    """The Fisher does not depend on the strength: take the one of an earlier arm; its identity is checked anyway."""
    for file in sorted(work.glob("ewc-*/fisher.json")):
        if (folder / "general.rows.jsonl").is_file() and not (folder / "fisher.json").is_file():
            shutil.copyfile(file.with_suffix(".safetensors"), folder / "fisher.safetensors")
            shutil.copyfile(file, folder / "fisher.json")


def answer_task(requests: tuple[Example, ...], base: Base, job: TrainingJob) -> list[bool]:
    """Whether each held-out request is answered exactly."""
    template = load_template(base.folder)
    generation = GenerationJob(
        folder=job.folder / "task",
        arms=(Arm("candidate", base.folder, job.adapter, is_prompted=False),),
        stop_ids=tuple(sorted(template.stop_ids)),
        max_new_tokens=64,
        batch=32,
        precision="auto",
        threads=job.threads,
    )
    prompts = [Prompt(r.id, "candidate", template.encode_prompt(r.prompt)) for r in requests]
    said = {o.id: o.output.strip() for o in generate(generation, prompts, note=lambda _: None)}
    return [said[r.id] == r.answer for r in requests]


def measure_general(folder: Path) -> dict[str, float]:
    """NLL of base and tuned, and KL(base || tuned), per trained token, on the held-out task rows and texts."""
    import torch
    from peft import PeftModel

    from appliance.model.weights import load_model
    from appliance.training.rows import load_rows

    job = TrainingJob.model_validate_json((folder / "job.json").read_bytes())
    torch.set_num_threads(job.threads or 1)
    base = load_model(job.base, precision="fp32", device=torch.device("cpu"))
    model = PeftModel.from_pretrained(base, str(job.adapter)).eval()
    figures: dict[str, float] = {}
    for name in ("task", "chats", "answers"):
        total, tokens = torch.zeros(3, dtype=torch.float64), 0
        for row in load_rows(folder / f"{name}.rows.jsonl"):
            kept = torch.tensor([i - 1 for start, end in row.spans for i in range(start, end)])
            ids = torch.tensor([row.input_ids])
            with torch.no_grad():
                tuned = torch.log_softmax(model(input_ids=ids, logits_to_keep=kept).logits[0], -1)
                with model.disable_adapter():
                    plain = torch.log_softmax(model(input_ids=ids, logits_to_keep=kept).logits[0], -1)
            target = ids[0][kept + 1][:, None]
            drift = (plain.exp() * (plain - tuned)).sum(-1)
            total += torch.stack([-plain.gather(1, target).sum(), -tuned.gather(1, target).sum(), drift.sum()]).double()
            tokens += len(kept)
        parts = (total / tokens).tolist()
        figures |= {f"{name}_base_nll": parts[0], f"{name}_nll": parts[1], f"{name}_kl": parts[2]}
    return {k: round(v, 4) for k, v in figures.items()}


def report(found: dict[str, list[dict[str, Any]]], *, options: argparse.Namespace) -> None:
    """The table on standard output and the JSON beside it: means over the seeds."""
    plain = next(iter(found.values()))
    rows = {name: summarise(seeds, plain) for name, seeds in found.items()}
    columns = ("exact", "against lora", "task NLL", "chats NLL", "answers NLL", "chats KL", "answers KL", "s")
    print(f"\n{'':14} " + " ".join(f"{c:>16}" for c in columns))
    first = next(iter(rows.values()))
    bases = [first[f"{name}_base_nll"] for name in ("task", "chats", "answers")]
    print(f"{'base':14} {'-':>16} {'-':>16} " + " ".join(f"{value:16.3f}" for value in bases))
    for name, f in rows.items():
        values = [f[key] for key in ("task_nll", "chats_nll", "answers_nll", "chats_kl", "answers_kl")]
        gain = "{:+.1%} to {:+.1%}".format(*f["gain_interval"])
        row = " ".join(f"{value:16.3f}" for value in values)
        print(f"{name:14} {f['exact_match']:16.1%} {gain:>16} {row} {f['seconds']:16.0f}")
    setting = {k: vars(options)[k] for k in ("steps", "seeds", "rate")}
    document = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": f"{read_machine().cores} CPU cores, {_read_processor()}",
        "versions": read_versions(),
        "setting": {**setting, "rows_a_step": BATCH, "test_rows_a_seed": TEST_ROWS},
        "contenders": rows,
    }
    file = ROOT / "benchmarks" / "results" / "forgetting.json"
    write_atomic(file, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def summarise(seeds: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, each seed's exact match and general NLLs, and the paired gain over `plain`."""
    pairs = Counter(
        pair
        for ours, theirs in zip(seeds, plain, strict=True)
        for pair in zip(ours["right"], theirs["right"], strict=True)
    )
    counts = {
        "both": pairs[True, True],
        "wins": pairs[True, False],
        "losses": pairs[False, True],
        "neither": pairs[False, False],
    }
    exact = [fmean(seed["right"]) for seed in seeds]
    means = {
        key: round(fmean(seed[key] for seed in seeds), 4) for key, value in seeds[0].items() if isinstance(value, float)
    }
    return {
        **means,
        "exact_match": round(fmean(exact), 4),
        "gain_interval": [round(end, 4) for end in paired_gain_interval(**counts)],
        "pairs": counts,
        "by_seed": [
            {"exact_match": e, **{k: s[k] for k in ("chats_nll", "answers_nll", "chats_kl", "answers_kl")}}
            for e, s in zip(exact, seeds, strict=True)
        ],
        **{key: seeds[0][key] for key in ("steps", "device", "dtype", "threads")},
    }


def _read_processor() -> str:
    names = [x.split(":", 1)[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
