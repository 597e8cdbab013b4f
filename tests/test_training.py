"""Training: it learns, it can be killed at any moment, and it refuses what would be worthless."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import make_recipe, write_base

from appliance.command import WorkerEnd
from appliance.digest import digest_folder
from appliance.errors import DeviceError, InterruptedRunError, TrainingError
from appliance.example import Example, Message
from appliance.model import load_template
from appliance.recipe import Recipe
from appliance.training import TrainingJob, prepare_rows, train
from appliance.training.arguments import build_adapter_arguments, build_training_arguments, count_steps
from appliance.training.batches import build_records, collate_packed, collate_padded
from appliance.training.checkpoints import find_checkpoint, seal_checkpoint
from appliance.training.launch import _halve
from appliance.training.rows import load_rows

COLOURS = ("red", "blue", "green", "black")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def make_examples(count: int) -> list[Example]:
    """Rows of differing lengths whose answer is their colour."""
    return [
        Example(
            f"r{i}",
            (Message("user", f"{COLOURS[i % 4]} {'very ' * (i % 3)}thing {i}"), Message("assistant", COLOURS[i % 4])),
            provenance="program",
        )
        for i in range(count)
    ]


def make_job(base: Path, folder: Path, recipe: Recipe | None = None, *, micro_batch: int = 8) -> TrainingJob:
    """A job with 32 training and 8 validation rows on disk."""
    recipe = recipe or make_recipe()
    template = load_template(base)
    examples = make_examples(40)
    prepare_rows(examples[:32], template=template, max_length=256, file=folder / "train.rows.jsonl")
    prepare_rows(examples[32:], template=template, max_length=256, file=folder / "validation.rows.jsonl")
    return TrainingJob(
        folder=folder,
        adapter=folder / "adapter",
        base=base,
        base_name="tiny",
        method=recipe.method,
        training=recipe.training,
        micro_batch=micro_batch,
        checkpointing=False,
        threads=1,
        fingerprint={"run_key": "k"},
    )


def run_in_process(job: TrainingJob) -> dict[str, Any]:
    """The child's work in this process: no start-up cost."""
    from appliance.training.trainer import run_job

    run_job(job, stop=SimpleNamespace(is_set=False), emit=lambda **_event: None)
    summary: dict[str, Any] = json.loads((job.folder / "summary.json").read_bytes())
    return summary


def quiet(_text: str) -> None:
    """No notes."""


@pytest.fixture(scope="session")
def reference(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of a run that nothing interrupted."""
    return run_in_process(make_job(base, tmp_path_factory.mktemp("reference")))


def test_the_same_job_gives_the_same_bytes(base: Path, tmp_path: Path, reference: dict[str, Any]) -> None:
    """An adapter is a function of its job: no path, time or hash seed is in it."""
    job = make_job(base, tmp_path / "elsewhere")
    env = {**os.environ, "PYTHONHASHSEED": "123"}
    subprocess.run(
        [sys.executable, "-m", "appliance.training.worker", str(write_job(job))],
        check=True,
        env=env,
        capture_output=True,
    )
    assert digest_folder(job.adapter) == reference["adapter_sha256"]
    assert str(tmp_path) not in (job.adapter / "adapter_config.json").read_text()


def write_job(job: TrainingJob) -> Path:
    """The job file, as the parent writes it."""
    (job.folder / "job.json").write_text(job.model_dump_json())
    return job.folder


def wait_for_step(job: TrainingJob, step: int, child: subprocess.Popen[bytes]) -> None:
    """Until the child's journal reaches `step`."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and child.poll() is None:
        journal = job.folder / "metrics.jsonl"
        if journal.is_file() and any(
            json.loads(x)["step"] >= step for x in journal.read_text().splitlines() if x.endswith("}")
        ):
            return
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGKILL, 3), (signal.SIGTERM, 5)])
def test_a_killed_run_ends_with_the_same_weights(
    base: Path, tmp_path: Path, reference: dict[str, Any], number: signal.Signals, step: int
) -> None:
    """Killed at any step and started again, training gives the bytes of the run that was never killed."""
    job = make_job(base, tmp_path)
    command = [sys.executable, "-m", "appliance.training.worker", str(write_job(job))]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(job, step, child)
    child.send_signal(number)
    code = child.wait(timeout=60)
    assert code in (33, -number, 0)
    summary = train(job, note=quiet)
    assert summary["adapter_sha256"] == reference["adapter_sha256"]
    steps = [r["step"] for r in map(json.loads, (job.folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
    assert steps == list(range(1, 9)), "the journal has every step once"


def test_a_signal_stops_the_child_with_a_checkpoint_and_the_parent_says_so(base: Path, tmp_path: Path) -> None:
    """SIGTERM to the parent becomes a checkpoint in the child and exit code 33's error here."""
    recipe = make_recipe(training={"epochs": 100})
    job = make_job(base, tmp_path, recipe)
    journal = job.folder / "metrics.jsonl"

    def stop_when_running() -> None:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not (journal.is_file() and journal.stat().st_size):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_running, daemon=True).start()
    with pytest.raises(InterruptedRunError, match="run the same command to go on"):
        train(job, note=quiet)
    assert find_checkpoint(job.checkpoints, fingerprint=read_fingerprint(job)) is not None
    assert not job.adapter.exists(), "an unfinished run leaves no adapter"


def read_fingerprint(job: TrainingJob) -> dict[str, str]:
    """The fingerprint of the newest seal."""
    seals = sorted(job.checkpoints.glob("checkpoint-*/sealed.json"))
    found: dict[str, str] = json.loads(seals[-1].read_bytes())["fingerprint"]
    return found


def test_packed_and_padded_batches_train_alike(base: Path, tmp_path: Path, reference: dict[str, Any]) -> None:
    """Packing changes speed, not what is learned: the first loss agrees, the last closely."""
    summary = run_in_process(make_job(base, tmp_path, make_recipe(training={"packing": False})))
    assert summary["first_loss"] == pytest.approx(reference["first_loss"], rel=0.01)
    assert summary["last_loss"] == pytest.approx(reference["last_loss"], rel=0.1)


def test_a_smaller_micro_batch_keeps_the_effective_batch(base: Path, tmp_path: Path, reference: dict[str, Any]) -> None:
    """Accumulation is exact: the same steps and nearly the same losses."""
    summary = run_in_process(make_job(base, tmp_path, micro_batch=2))
    assert summary["steps"] == reference["steps"]
    assert summary["first_loss"] == pytest.approx(reference["first_loss"], rel=0.01)


def test_packed_rows_do_not_see_each_other(base: Path) -> None:
    """The logits of a row in a packed batch are those of the row alone, under standard attention."""
    import torch

    from appliance.model.weights import load_model
    from appliance.training import attention

    attention.register()
    packed_model = load_model(base, precision="fp32", device=torch.device("cpu"), attention=attention.NAME)
    plain_model = load_model(base, precision="fp32", device=torch.device("cpu"))
    template = load_template(base)
    records = [{"input_ids": template.encode_prompt(e.prompt), "spans": [[1, 2]]} for e in make_examples(5)]
    batch = collate_packed(records)
    with torch.no_grad():
        packed = packed_model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            cu_seq_lens_q=batch["cu_seq_lens_q"],
            max_length_q=batch["max_length_q"],
        ).logits[0]
        at = 0
        for record in records:
            alone = plain_model(input_ids=torch.tensor([record["input_ids"]])).logits[0]
            torch.testing.assert_close(packed[at : at + len(alone)], alone, atol=1e-5, rtol=1e-4)
            at += len(alone)


def test_the_loss_is_over_trained_tokens_only(base: Path, tmp_path: Path) -> None:
    """Both collators give exactly the tokens of the spans as labels, in order."""
    make_job(base, tmp_path)
    rows = load_rows(tmp_path / "train.rows.jsonl")[:3]
    expected = [t for r in rows for a, b in r.spans for t in r.input_ids[a:b]]
    assert collate_packed(build_records(rows))["shift_labels"][0].tolist() == expected
    padded = collate_padded(build_records(rows), pad_id=0)["labels"]
    assert padded[padded != -100].tolist() == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"method": {"type": "full"}, "training": {"learning_rate": 1.0, "epochs": 20}},
            "lower training.learning_rate",
        ),
        ({"method": {"type": "lora", "targets": ["no_such_layer"]}}, "linear layers of this model: down_proj"),
    ],
    ids=["diverges", "no-such-layer"],
)
def test_worthless_training_is_refused(base: Path, tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    """A diverging run or targets that match nothing end with the reason, and leave no adapter."""
    job = make_job(base, tmp_path, make_recipe(**overrides))
    with pytest.raises(TrainingError, match=message):
        run_in_process(job)
    assert not job.adapter.exists()


def test_a_truncated_base_is_a_message_not_a_traceback(base: Path, tmp_path: Path) -> None:
    """Damaged weights are named before the first step."""
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    job = make_job(base, tmp_path / "job").model_copy(update={"base": broken})
    with pytest.raises(Exception, match="cannot be loaded"):
        run_in_process(job)


def test_rows_that_are_too_long_are_listed_and_never_cut(base: Path, tmp_path: Path) -> None:
    """Every long row is named with its length and the limit."""
    with pytest.raises(TrainingError) as caught:
        prepare_rows(make_examples(3), template=load_template(base), max_length=20, file=tmp_path / "rows")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["row r0", "row r1", "row r2"]
    assert not (tmp_path / "rows").exists()


def make_checkpoint(folder: Path, step: int) -> Path:
    """A sealed checkpoint with one file."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes([step]) * 100)
    seal_checkpoint(checkpoint, fingerprint={"run_key": "k"})
    return checkpoint


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(tmp_path: Path) -> None:
    """Unsealed, truncated or altered: the newest sound checkpoint wins, and the bad ones stay for study."""
    good = make_checkpoint(tmp_path, 1)
    (make_checkpoint(tmp_path, 2) / "weights").write_bytes(b"short")
    (make_checkpoint(tmp_path, 10) / "sealed.json").unlink()
    assert find_checkpoint(tmp_path, fingerprint={"run_key": "k"}) == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "damaged-10", "damaged-2"]


def test_a_checkpoint_of_another_job_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    """Resuming with other data would give weights that nothing describes."""
    make_checkpoint(tmp_path, 1)
    with pytest.raises(TrainingError, match="run_key was k, is other"):
        find_checkpoint(tmp_path, fingerprint={"run_key": "other"})


@pytest.mark.parametrize(("micro", "effective", "half"), [(16, 16, 8), (5, 15, 1), (6, 12, 3), (1, 8, 1)])
def test_half_a_micro_batch_still_divides_the_effective_batch(micro: int, effective: int, half: int) -> None:
    """Out of memory never changes how many rows make a step."""
    assert _halve(micro, effective) == half


def test_out_of_memory_is_answered_with_half_the_micro_batch(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's exit 34 restarts it smaller; with nothing left to halve it is a device error."""
    from appliance.training import launch

    tried: list[int] = []

    def fail(job: TrainingJob, **_rest: object) -> WorkerEnd:
        tried.append(job.micro_batch)
        return WorkerEnd(DeviceError.exit_code, "out of memory")

    monkeypatch.setattr(launch, "_run_child", fail)
    with pytest.raises(DeviceError, match="micro-batch 1"):
        train(make_job(base, tmp_path), note=quiet)
    assert tried == [8, 4, 2, 1]


def test_arguments_are_what_the_recipe_says(tmp_path: Path) -> None:
    """Golden: the arguments of TRL and PEFT for the demo-like recipe."""
    recipe = make_recipe()
    arguments = build_training_arguments(
        recipe.training,
        method=recipe.method,
        rows=33,
        has_validation=True,
        micro_batch=4,
        bf16=True,
        on_cpu=True,
        checkpointing=False,
        output=Path("out"),
    )
    assert count_steps(recipe.training, rows=33) == arguments["max_steps"] == 10
    picked = (
        "gradient_accumulation_steps",
        "learning_rate",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "warmup_steps",
    )
    assert [arguments[k] for k in picked] == [2, 0.01, 3, 3, 2, 1]
    assert arguments["auto_find_batch_size"] is False
    assert arguments["report_to"] == []
    assert build_adapter_arguments(recipe.method) == {  # type: ignore[arg-type]
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
