"""Training: it learns, it can be killed at any moment, and it refuses what would be worthless."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import TEMPLATE, make_recipe, make_stop, write_base

from appliance.child import Emit
from appliance.command import WorkerEnd
from appliance.digest import digest_folder
from appliance.errors import DeviceError, TrainingError
from appliance.example import Example, Message
from appliance.model import load_template
from appliance.recipe import Recipe, count_steps
from appliance.training import TrainingJob, prepare_rows, train
from appliance.training.arguments import build_adapter_arguments, build_training_arguments
from appliance.training.batches import build_records, collate_packed, collate_padded
from appliance.training.launch import _halve
from appliance.training.rows import load_rows

COLOURS = ("red", "blue", "green", "black")
FULL = {"method": {"type": "full"}, "training": {"epochs": 1, "learning_rate": 0.001, "checkpoints": 1}}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def make_examples(count: int, *, last: str | None = None) -> list[Example]:
    """Rows of differing lengths whose answer is their colour; the last one's may be another."""
    answers = [COLOURS[i % 4] for i in range(count - 1)] + [last or COLOURS[(count - 1) % 4]]
    return [
        Example(
            f"r{i}",
            (Message("user", f"{COLOURS[i % 4]} {'very ' * (i % 3)}thing {i}"), Message("assistant", answer)),
            provenance="program",
        )
        for i, answer in enumerate(answers)
    ]


def make_job(
    base: Path, folder: Path, recipe: Recipe | None = None, *, micro_batch: int = 8, rows: int = 32
) -> TrainingJob:
    """A job with so many training and 8 validation rows on disk, for the devices that its recipe needs."""
    recipe = recipe or make_recipe()
    template = load_template(base)
    examples = make_examples(rows + 8)
    prepare_rows(examples[:rows], template=template, max_length=256, file=folder / "train.rows.jsonl")
    prepare_rows(examples[rows:], template=template, max_length=256, file=folder / "validation.rows.jsonl")
    return TrainingJob(
        folder=folder,
        adapter=folder / "adapter",
        base=base,
        base_name="tiny",
        method=recipe.method,
        training=recipe.training,
        micro_batch=micro_batch,
        devices=recipe.needs.devices,
        checkpointing=False,
        threads=1,
        fingerprint={"run_key": "k"},
    )


def ignore(**_event: object) -> None:
    """Nothing is said."""


def run_in_process(job: TrainingJob, *, emit: Emit = ignore) -> dict[str, Any]:
    """The child's work in this process: no start-up cost."""
    from appliance.training.trainer import run_job

    run_job(job, stop=make_stop(), emit=emit)
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


@pytest.mark.parametrize("form", ["folder", "list"])
def test_a_full_model_keeps_every_chat_template_of_its_base(base: Path, tmp_path: Path, form: str) -> None:
    """A second template, for tools, lies in a folder of its own: the artifact has it, and all of it can be read."""
    folder, tools = shutil.copytree(base, tmp_path / "base"), TEMPLATE + "{{ tools or '' }}"
    if form == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tools)
    else:  # as tokenizers were published before there were such folders
        (folder / "chat_template.jinja").unlink()
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
        config["chat_template"] = [{"name": n, "template": t} for n, t in (("default", TEMPLATE), ("tool_use", tools))]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    job = make_job(folder, tmp_path / "job", make_recipe(**FULL))
    run_in_process(job)
    load_template(job.adapter)
    assert (job.adapter / "chat_template.jinja").read_text() == TEMPLATE
    assert (job.adapter / "additional_chat_templates" / "tool_use.jinja").read_text() == tools
    assert {p.stat().st_mode & 0o777 for p in job.adapter.rglob("*") if p.is_file()} == {0o644}


def test_a_full_model_keeps_how_its_base_samples(base: Path, tmp_path: Path) -> None:
    """Sampling values without `do_sample`, as published bases have them, reach checkpoints and artifact as they are."""
    folder, own = shutil.copytree(base, tmp_path / "base"), {"eos_token_id": [257], "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(own))
    job = make_job(folder, tmp_path / "job", make_recipe(**FULL))
    run_in_process(job)
    for made in (job.adapter, *job.checkpoints.glob("checkpoint-*")):
        kept = json.loads((made / "generation_config.json").read_bytes())
        assert {k: kept[k] for k in own} == own
        assert "do_sample" not in kept


def test_packed_and_padded_batches_train_alike(base: Path, tmp_path: Path, reference: dict[str, Any]) -> None:
    """Packing changes speed, not what is learned: the first loss agrees, the last closely."""
    summary = run_in_process(make_job(base, tmp_path, make_recipe(training={"packing": False})))
    assert summary["first_loss"] == pytest.approx(reference["first_loss"], rel=0.01)
    assert summary["last_loss"] == pytest.approx(reference["last_loss"], rel=0.1)


@pytest.mark.parametrize("overrides", [{"training": {"packing": False}}, {"method": {"type": "prompt-tuning"}}])
def test_a_tokenizer_without_special_tokens_is_padded_with_a_stop_token(
    base: Path, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    """What ends generation is known without the tokenizer; padding is masked, so that any token will do."""
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    digests = {
        name: run_in_process(make_job(b, tmp_path / name, make_recipe(**overrides)))["adapter_sha256"]
        for name, b in (("without", folder), ("with", base))
    }
    assert digests["without"] == digests["with"]


def test_a_smaller_micro_batch_keeps_the_effective_batch(base: Path, tmp_path: Path, reference: dict[str, Any]) -> None:
    """Accumulation is exact: the same steps and nearly the same losses."""
    summary = run_in_process(make_job(base, tmp_path, micro_batch=2))
    assert summary["steps"] == reference["steps"]
    assert summary["first_loss"] == pytest.approx(reference["first_loss"], rel=0.01)


def test_the_worst_step_before_the_first_leaves_no_trace(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is proven by the longest rows together; with the proof and without, dropout and all, the same bytes."""
    from appliance.training import proof, trainer

    recipe = make_recipe(method={"type": "lora", "rank": 4, "dropout": 0.1})
    proven: list[int] = []

    def prove(*arguments: Any, micro_batch: int) -> None:
        proof.prove_worst_step(*arguments, micro_batch=micro_batch)
        proven.append(micro_batch)

    monkeypatch.setattr(trainer, "prove_worst_step", prove)
    with_proof = run_in_process(make_job(base, tmp_path / "with", recipe, micro_batch=4))
    monkeypatch.setattr(trainer, "prove_worst_step", lambda *_a, **_k: None)
    without = run_in_process(make_job(base, tmp_path / "without", recipe, micro_batch=4))
    assert proven == [4]
    assert with_proof["adapter_sha256"] == without["adapter_sha256"]


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_the_worst_step_is_proven_beside_all_that_a_later_step_holds(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    """The longest rows meet both moments of every trained weight, and gradients where a step adds to some."""
    from appliance.training import proof

    compute, found = proof._compute_gradients, []

    def look(trainer: Any, records: Any) -> None:
        moments = len(trainer.optimizer.state) if trainer.optimizer else 0
        weights = [p for p in trainer.model.parameters() if p.requires_grad]
        found.append((len(records), moments / len(weights), sum(w.grad is not None for w in weights) / len(weights)))
        compute(trainer, records)

    monkeypatch.setattr(proof, "_compute_gradients", look)
    run_in_process(make_job(base, tmp_path, micro_batch=micro_batch))
    assert found == [(micro_batch, 0, 0), (micro_batch, 1, micro_batch < 8)]


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
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["row r0", "row r1", "row r2"]
    assert "nothing is cut" in lines[-1]
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize(("micro", "effective", "half"), [(16, 16, 8), (5, 15, 1), (6, 12, 3), (1, 8, 1)])
def test_half_a_micro_batch_still_divides_the_effective_batch(micro: int, effective: int, half: int) -> None:
    """Out of memory never changes how many rows make a step."""
    assert _halve(micro, effective) == half


@pytest.mark.parametrize(
    "case",
    [
        ({}, [(1, True)], "use a shorter max_length"),
        ({"training": {"gradient_checkpointing": "off"}}, [], "use training.gradient_checkpointing: auto, a shorter"),
        ({"method": {"type": "prefix-tuning", "tokens": 4}}, [], "use a shorter max_length"),
    ],
    ids=["auto", "ruled out", "a method that cannot"],
)
def test_out_of_memory_is_answered_with_half_the_micro_batch(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: tuple[dict[str, Any], list[tuple[int, bool]], str],
) -> None:
    """The child's exit 34 restarts it smaller, at last with gradient checkpointing; then it is a device error."""
    overrides, last, advice = case
    from appliance.training import launch

    tried: list[tuple[int, bool]] = []
    said: list[str] = []

    def fail(job: TrainingJob, **_rest: object) -> WorkerEnd:
        tried.append((job.micro_batch, job.checkpointing))
        return WorkerEnd(DeviceError.exit_code, "out of memory")

    monkeypatch.setattr(launch, "_run_child", fail)
    with pytest.raises(DeviceError, match=f"micro-batch 1: out of memory; {advice}"):
        train(make_job(base, tmp_path, make_recipe(**overrides)), note=said.append)
    assert tried == [(8, False), (4, False), (2, False), (1, False), *last]
    ways = ["micro-batch 1", "micro-batch 1 and gradient checkpointing"][: 1 + len(last)]
    assert said[2:] == [f"out of memory; again with {way}, the effective batch stays" for way in ways]


def test_a_constant_rate_rises_over_its_warm_up_first(base: Path, tmp_path: Path) -> None:
    """`warmup_ratio` counts whatever the schedule; what follows differs."""
    training = {"schedule": "constant", "warmup_ratio": 0.25, "epochs": 2}
    job = make_job(base, tmp_path, make_recipe(training=training))
    run_in_process(job)
    rates = [json.loads(line).get("learning_rate") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r for r in rates if r is not None] == pytest.approx([0.0, 0.005, *[0.01] * 6])


def test_arguments_are_what_the_recipe_says(tmp_path: Path) -> None:
    """Golden: the arguments of TRL and PEFT for the demo-like recipe."""
    recipe = make_recipe()
    arguments = build_training_arguments(
        recipe.training,
        method=recipe.method,
        rows=33,
        has_validation=True,
        micro_batch=2,
        devices=2,
        bf16=True,
        on_cpu=True,
        checkpointing=False,
        output=Path("out"),
    )
    assert count_steps(recipe.training, rows=33) == arguments["max_steps"] == 10
    picked = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "warmup_steps",
    )
    assert [arguments[k] for k in picked] == [4, 2, 0.01, 3, 3, None, 1]
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
