"""Benchmarks that nobody can run every day still run: on a tiny shape, on the device that is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", ["8b-lora", "8b-qlora", "1b-full", "70b-qlora"])
def test_the_gpu_benchmark_has_a_figure_for_every_contender(tmp_path: Path, job: str) -> None:
    """A contender that fails is a line of the table on a GPU; on a tiny shape none may."""
    out = tmp_path / "figures.json"
    argv = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--only", job, "--out", str(out)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_bytes())["jobs"][job]
    assert "appliance" in figures
    assert not [f["failed"] for f in figures.values() if "failed" in f]
    assert all(f["tokens_per_second"] > 0 and 5.0 < f["loss"] < 8.0 for f in figures.values())
    assert figures["appliance"]["predicted_gib"] > 0
