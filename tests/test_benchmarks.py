"""Benchmarks that nobody can run every day still run: on a tiny shape, on the device that is there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import cold
import pytest
import torch
from cold import Cold
from packaging.requirements import Requirement

from appliance.training import loop

ROOT = Path(__file__).parent.parent
FELL = {"unseen_loss_before": 6.5, "unseen_loss": 1.5}


def load_benchmark(name: str) -> Any:
    """A benchmark's module: scripts of a folder that is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gpu = load_benchmark("gpu")


WANTED = ("trl", "peft", "bitsandbytes", "datasets", "boto3", "click", "jsonschema", "msgspec", "pydantic", "rich")


def list_required(names: Iterable[str]) -> set[str]:
    """These packages and all that they need, as installed here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        found.add(name)
        asked = [Requirement(r) for r in metadata.requires(name) or []]
        waiting += [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_the_wheels_to_carry_are_all_that_the_gpu_benchmark_and_tests_need() -> None:
    """On a machine that has torch and transformers, and what those bring, and no network."""
    told = set(re.findall(r"[a-z0-9-]+", gpu.__doc__.partition("ask for):")[2].partition("MFU is")[0]))
    wanted = list_required([*WANTED, "pytest", "pytest-timeout", "hypothesis"])
    assert sorted(wanted - list_required(["torch", "transformers"]) - told) == []


@pytest.mark.parametrize(("options", "installs"), [([], True), (["PYTHON=python3"], False)])
def test_the_gpu_tests_start_without_a_registry(options: list[str], installs: bool) -> None:
    """With a Python that is named nothing is installed; the default one is made first."""
    argv = ["make", "--dry-run", "--always-make", "gpu-test", *options]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (".ci/setup" in done.stdout) == installs
    assert "-m pytest -m gpu" in done.stdout


def test_a_child_of_the_gpu_tests_finds_the_product_where_nothing_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare checkout: packages are there, the product is not one of them."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p.endswith("-packages")))
    monkeypatch.setattr(sys, "executable", write_bare_python(tmp_path))
    Cold("cpu").run(tmp_path)
    log = (tmp_path / "worker.log").read_text()
    assert "No module named" not in log
    assert "job.json" in log, "the real worker looked for its job"


def write_bare_python(folder: Path) -> str:
    """This interpreter without what its environment adds to its paths."""
    bare = folder / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    return str(bare)


def test_a_peak_has_cudas_own_memory_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 bytes 30 are free and others hold 20: of its own 50 the process has reserved 45 now, 48 at its peak."""
    told = {"is_available": True, "mem_get_info": (30, 100), "memory_reserved": 45, "max_memory_reserved": 48}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_device, value=value: value)
    assert gpu.measure_used() == 70
    assert gpu.peak_bytes(20) == 48 + 5
    assert cold.measure_memory(20) == (48, 5)


def call_benchmark(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """`python benchmarks/gpu.py --tiny` in this process."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", *options])
    gpu.main()


def test_calls_of_single_jobs_add_up_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of other jobs stay, those of the same job are replaced; with other packages all begin anew."""
    out, seen = tmp_path / "figures.json", iter(range(100))

    def count(*_arguments: Any, **_options: Any) -> dict[str, Any]:
        return {"failed": str(next(seen))}

    def list_figures() -> dict[str, Any]:
        return {job: f["appliance"]["failed"] for job, f in json.loads(out.read_bytes())["jobs"].items()}

    monkeypatch.setattr(gpu, "run_contender", count)
    for job in ("1b-full", "70b-qlora", "1b-full"):
        call_benchmark(monkeypatch, "--only", job, "--out", str(out))
    assert list_figures() == {"1b-full": "7", "70b-qlora": "4"}
    monkeypatch.setattr(gpu, "describe_machine", lambda: {"date": "d", "device": "cpu", "versions": {"torch": "0"}})
    call_benchmark(monkeypatch, "--only", "70b-qlora", "--out", str(out))
    assert list_figures() == {"70b-qlora": "9"}


def test_all_that_a_failed_contender_said_lies_beside_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table has its last line; one that is stopped at `--timeout` leaves what it said until then."""
    script = tmp_path / "contender.py"
    lines = "import sys, time; print('first\\n' + 'x' * 999 + '\\nlast', file=sys.stderr, flush=True)"
    monkeypatch.setattr(gpu, "__file__", str(script))
    for end, seconds, word in (("sys.exit(1)", 60.0, "last"), ("time.sleep(60)", 5.0, "no end after 5 s")):
        script.write_text(f"{lines}; {end}")
        target = tmp_path / f"{len(end)}.json"
        figure = gpu.run_contender("1b-lora", "trl", is_tiny=True, timeout_s=seconds, target=target)
        assert figure["failed"] == word
        assert (tmp_path / figure["log"]).read_text() == f"first\n{'x' * 999}\nlast\n"
        assert figure["log"] in gpu.describe_figure("1b-lora", "trl", figure)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("job", ["8b-lora", "8b-qlora", "1b-full", "70b-qlora"])
def test_the_gpu_benchmark_has_a_figure_for_every_contender_and_they_learn_alike(tmp_path: Path, job: str) -> None:
    """A contender that fails is a line of the table on a GPU; on a tiny shape none may.

    All begin where the appliance does, learn far more than which tokens there are (ln 32), and end in parity.
    """
    out = tmp_path / "figures.json"
    argv = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--only", job, "--out", str(out)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_bytes())["jobs"][job]
    assert "appliance" in figures
    assert not [f["failed"] for f in figures.values() if "failed" in f]
    assert {f["loss_parity"] for f in figures.values()} == {"ok"}
    assert all(f["tokens_per_second"] > 0 and f["unseen_loss"] < 2.5 for f in figures.values())
    assert figures["appliance"]["predicted_gib"] > 0
    if "trl" in figures:  # the same rows, the same labels: a mask that is ignored shows here
        assert figures["trl"]["first_loss"] == pytest.approx(figures["appliance"]["first_loss"], abs=0.01)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "ok"),
        ({"unseen_loss": 1.95}, "ok"),
        ({"unseen_loss": 2.1}, r"off the appliance's by \+0.600, 0.500 allowed"),
        ({"unseen_loss": 0.9}, r"off the appliance's by -0.600, 0.500 allowed"),
        ({"unseen_loss": float("nan")}, "learned nothing"),
        ({"unseen_loss": 6.2}, "learned nothing: 6.500 before and 6.200 after"),
        ({"unseen_loss_before": 6.6}, "begins at 6.600, the appliance at 6.500: not the same weights"),
    ],
)
def test_a_loss_that_is_not_the_appliances_is_told_in_words(changes: dict[str, float], words: str) -> None:
    """Too high, too low, no number, nothing learned, or another start."""
    judged = gpu.judge_parity({"appliance": FELL, "trl": FELL | changes})
    assert judged["appliance"]["loss_parity"] == "ok"
    assert re.match(words, judged["trl"]["loss_parity"])
    assert len(gpu.list_parity_faults({"8b-lora": judged})) == (words != "ok")


def test_parity_without_the_appliance_still_wants_a_fall() -> None:
    """What failed has no loss to judge; the others must have learned something."""
    judged = gpu.judge_parity({"appliance": {"failed": "out of memory"}, "trl": FELL, "trl-best": FELL})
    assert "loss_parity" not in judged["appliance"]
    assert judged["trl"]["loss_parity"] == "ok"


def test_contenders_start_from_the_same_weights_in_every_precision(tmp_path: Path) -> None:
    """Drawn once: fp32 holds exactly what bf16 does."""
    home = gpu.write_base(tmp_path / "base", gpu.SHAPES["tiny"], vocabulary=512)
    wide, narrow = (
        gpu.build_weights(home, dtype=dtype, four_bit=False, attention="sdpa").state_dict()
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide.keys() == narrow.keys()
    assert all(w.dtype == torch.float32 and torch.equal(w, narrow[n].float()) for n, w in wide.items())
    assert len({w.float().sum().item() for w in wide.values()}) > 10, "each weight is a draw of its own"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_contender_whose_labels_are_off_by_one_fails_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own training loss falls all the same; the loss on unseen rows gives it away: exit code 1, and in the JSON."""
    collate = loop.collate_packed

    def shift(*arguments: Any, **options: Any) -> dict[str, Any]:
        batch = collate(*arguments, **options)
        return {**batch, **{k: batch[k].roll(-1, -1) for k in ("labels", "shift_labels")}}

    def run_here(job: str, contender: str, *, is_tiny: bool, **_rest: Any) -> dict[str, Any]:
        return gpu.measure(job, contender, is_tiny=is_tiny)

    out = tmp_path / "figures.json"
    monkeypatch.setattr(loop, "collate_packed", shift)
    monkeypatch.setattr(gpu, "run_contender", run_here)
    monkeypatch.setitem(gpu.JOBS["8b-lora"], "contenders", ("trl", "appliance"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--only", "8b-lora", "--out", str(out)])
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    assert "8b-lora: trl: loss on unseen rows: off the appliance's by" in str(caught.value)
    figures = json.loads(out.read_bytes())["jobs"]["8b-lora"]
    assert figures["trl"]["loss_parity"] != "ok"
    assert figures["appliance"]["last_loss"] < figures["appliance"]["first_loss"] - 1.0
