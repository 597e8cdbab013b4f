"""What checkpoints cost: seconds of saving and sealing against the seconds of the whole training.

SmolLM2-135M, LoRA r16, the demo dataset's rows, the recipe's default number of checkpoints over the
run. `python benchmarks/checkpoints.py` takes about 4 minutes on 2 cores, prints its figures and writes
them to `benchmarks/results/checkpoints.json`; the target is 3 % at most.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from train_cpu import CACHE, RESULTS, ROOT, describe_machine

from appliance.demo.requests import build_requests
from appliance.model import load_template
from appliance.model.base import resolve_base
from appliance.plan import read_machine
from appliance.recipe import TrainingSection, load_recipe
from appliance.training import TrainingJob, prepare_rows, train

TARGET = 0.03
BATCH = 16


def main() -> None:
    """Train once, print the figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), rows=options.rows, epochs=options.epochs, cache=options.cache)
    written = json.dumps({**describe_machine(), **figures}, indent=1, sort_keys=True) + "\n"
    print(written, end="")
    (RESULTS / "checkpoints.json").write_text(written)


def measure(folder: Path, *, rows: int, epochs: float, cache: Path) -> dict[str, Any]:
    """Seconds of the run, of its checkpoints, and their share."""
    recipe = load_recipe(ROOT / "recipes" / "demo.yaml")
    base = resolve_base(recipe.base, root=ROOT, cache=cache, note=lambda _: None).folder
    prepare_rows(build_requests(rows), template=load_template(base), max_length=256, file=folder / "train.rows.jsonl")
    (folder / "validation.rows.jsonl").write_bytes(b"")
    default = TrainingSection.model_fields["checkpoints"].default
    section = recipe.training.model_copy(update={"epochs": epochs, "effective_batch": BATCH, "checkpoints": default})
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
    summary = train(job, note=lambda _: None)
    saved, count = summary["checkpoints"]["seconds"], summary["checkpoints"]["count"]
    size = sum(f.stat().st_size for f in max(job.checkpoints.iterdir(), key=lambda p: p.stat().st_mtime).iterdir())
    return {
        "rows": rows,
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "seconds_per_step": round((summary["seconds"] - saved) / summary["steps"], 3),
        "checkpoints": count,
        "seconds_per_checkpoint": round(saved / count, 3),
        "megabytes_per_checkpoint": round(size / 1e6, 1),
        "share": round(saved / summary["seconds"], 4),
        "target": TARGET,
    }


if __name__ == "__main__":
    main()
