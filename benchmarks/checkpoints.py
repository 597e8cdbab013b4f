"""What checkpoints cost: seconds of saving and sealing against the seconds of the whole training.

SmolLM2-135M, LoRA r16, the demo dataset's rows, the recipe's default number of checkpoints over the
run. Run it with `python benchmarks/checkpoints.py`; the target is 3 % at most.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from train_cpu import CACHE, ROOT

from appliance.demo.requests import build_requests
from appliance.model import load_template
from appliance.model.base import resolve_base
from appliance.plan import read_machine
from appliance.recipe import TrainingSection, load_recipe
from appliance.training import TrainingJob, prepare_rows, train

TARGET = 0.03
BATCH = 16


def main() -> None:
    """Train once and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--cache", type=Path, default=CACHE)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(
            json.dumps(measure(Path(folder), rows=options.rows, epochs=options.epochs, cache=options.cache), indent=1)
        )


def measure(folder: Path, *, rows: int, epochs: float, cache: Path) -> dict[str, float]:
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
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "seconds per step": round((summary["seconds"] - saved) / summary["steps"], 3),
        "checkpoints": count,
        "seconds per checkpoint": round(saved / count, 3),
        "megabytes per checkpoint": round(size / 1e6, 1),
        "share": round(saved / summary["seconds"], 4),
        "target": TARGET,
    }


if __name__ == "__main__":
    main()
