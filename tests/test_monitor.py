"""Laws of monitoring: decisions are a fold over the journal, alarms ring on their curve and on no healthy one."""

from __future__ import annotations

import json
import math
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_training import make_examples, make_job, run_in_process, write_job
from tiny import make_recipe, make_stop, write_base

from appliance.digest import digest_folder
from appliance.errors import InterruptedRunError, RecipeError, TrainingError
from appliance.recipe import parse_recipe
from appliance.training import prepare_rows, train
from appliance.training.board import crc32c, frame_record, open_board
from appliance.training.monitor import (
    Rules,
    Watched,
    measure_sameness,
    select_kept_step,
    watch_record,
    watch_records,
)
from appliance.training.view import Status, draw_sparkline, render_line, render_view

RULES = Rules(keep="best_loss", patience=3, max_steps=1000)
FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def make_step(step: int, loss: float, *, rate: float = 1e-4) -> dict[str, Any]:
    """A step's record."""
    return {"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": rate}


def make_evaluation(step: int, loss: float, **more: float) -> dict[str, Any]:
    """An evaluation's record over 40 rows."""
    values = {"exact_match": 0.0, "same_answer": 0.1, "same_reference": 0.1, "rows": 40} | more
    return {"step": step, "validation_loss": loss, **{f"validation_{k}": v for k, v in values.items()}}


def make_curve(training: list[float], validation: list[float], **more: list[float]) -> list[dict[str, Any]]:
    """Steps with an evaluation after every tenth; `more` are further numbers of the evaluations."""
    records = []
    for step, loss in enumerate(training, 1):
        records.append(make_step(step, loss))
        at = step // 10 - 1
        if step % 10 == 0 and at < len(validation):
            records.append(make_evaluation(step, validation[at], **{k: v[at] for k, v in more.items()}))
    return records


def list_kinds(seen: Watched) -> list[str]:
    """The kinds of the alerts, in order."""
    return [a.kind for a in seen.alerts]


FALLING = [2.0 * 0.97**i for i in range(100)]


@pytest.mark.parametrize("name", ["healthy-demo", "healthy-small"])
def test_a_healthy_run_raises_no_alarm(name: str) -> None:
    """Journals of real runs of SmolLM2 on the demo's rows (1,000 of them; 100) as recorded: nothing to say."""
    records = [json.loads(line) for line in (FIXTURES / f"{name}.jsonl").read_text().splitlines()]
    assert sum("validation_loss" in r for r in records) >= 3
    for keep in ("last", "best_loss", "best_exact_match"):
        seen = watch_records(records, Rules(keep=keep, patience=3, max_steps=1000))  # type: ignore[arg-type]
        assert seen.alerts == ()
        assert seen.refusal == ""
        assert not seen.is_stopped


def test_overfitting_stops_the_run_and_names_the_best_step() -> None:
    """Validation loss above its best for `patience` evaluations while training loss falls: alarm, then stop."""
    seen = watch_records(make_curve(FALLING, [1.0, 0.8, 0.9, 1.0, 1.1, 1.2]), RULES)
    assert list_kinds(seen) == ["overfitting", "stopped"]
    assert {a.step for a in seen.alerts} == {50}
    assert "step 20" in seen.alerts[0].words
    assert select_kept_step(seen, RULES, last=50) == 20


def test_without_patience_overfitting_is_said_and_nothing_is_stopped() -> None:
    """`patience: null` never stops."""
    rules = replace(RULES, patience=None)
    seen = watch_records(make_curve(FALLING, [1.0, 0.8, 0.9, 1.0, 1.1, 1.2]), rules)
    assert list_kinds(seen) == ["overfitting"]
    assert not seen.is_stopped
    assert select_kept_step(seen, replace(rules, keep="last"), last=60) == 60


def test_rising_together_is_not_overfitting() -> None:
    """When training loss does not fall either, the trouble has another name."""
    flat = [1.0 + 0.001 * i for i in range(100)]
    assert "overfitting" not in list_kinds(watch_records(make_curve(flat, [1.0, 1.1, 1.2, 1.3, 1.4]), RULES))


def test_the_last_evaluation_cannot_stop_a_run_that_is_over() -> None:
    """A run at its last step ended by its steps, not by rule."""
    seen = watch_records(make_curve(FALLING, [1.0, 1.1, 1.2, 1.3]), replace(RULES, max_steps=40))
    assert not seen.is_stopped
    assert "stopped" not in list_kinds(seen)


def test_exact_match_decides_where_it_is_asked_for_and_loss_breaks_ties() -> None:
    """Rising confidence in few mistakes raises the loss while more rows are right: those are kept."""
    rules = replace(RULES, keep="best_exact_match")
    records = make_curve(FALLING, [1.0, 0.8, 0.9, 0.95, 1.0], exact_match=[0.0, 0.0, 0.4, 0.6, 0.6])
    seen = watch_records(records, rules)
    assert not seen.is_stopped
    assert select_kept_step(seen, rules, last=50) == 40
    assert select_kept_step(watch_records(records, RULES), RULES, last=50) == 20


@pytest.mark.parametrize(
    "losses",
    [
        [2.5, 2.5, 9.0, 15.0, 12.0, 11.0, 13.0, 14.0],
        [2.5, 2.5, *[7.3] * 20],
        [*[2.0 - 0.05 * i for i in range(20)], *[1.0 + 0.1 * i for i in range(60)]],
        [2.0, math.nan],
        [2.0, math.inf],
    ],
    ids=["explodes", "stays-on-a-high-shelf", "slowly", "nan", "inf"],
)
def test_divergence_is_refused_with_the_reason(losses: list[float]) -> None:
    """Fast, on a shelf below any multiple, slowly, or not finite: refused, and the remedy named."""
    seen = Watched()
    for step, loss in enumerate(losses, 1):
        seen = watch_record(seen, make_step(step, loss, rate=0.0 if step == 1 else 1.0), RULES)
        if seen.refusal:
            break
    assert "lower training.learning_rate" in seen.refusal
    assert seen.alerts[-1].kind == "divergence"
    assert step <= 16 or losses[2] < 2.0, "a loss that is lost at once is refused within a few steps"


def test_a_climbing_loss_is_said_before_it_is_refused() -> None:
    """Half of what was learned lost again is an alarm; the run goes on."""
    seen = watch_records(make_curve([*FALLING[:60], *[0.4 + 0.03 * i for i in range(50)]], []), RULES)
    assert list_kinds(seen) == ["divergence"]
    assert seen.refusal == ""


def test_small_noisy_batches_are_not_divergence() -> None:
    """A lucky first row is no level to judge by: single rows of 0.2 to 3.8 around 2.0 are never refused."""
    noisy = [0.3, *[2.0 + 1.8 * math.sin(7.3 * i) for i in range(300)]]
    seen = watch_records(make_curve(noisy, []), RULES)
    assert seen.refusal == ""
    assert seen.alerts == ()


@pytest.mark.parametrize(("untrained", "is_refused"), [(6.9, False), (2.4, True)])
def test_an_easy_first_batch_is_no_level_to_judge_by(untrained: float, is_refused: bool) -> None:
    """Where a run began is told by some rows, whatever the first batch was; a jump from there is refused."""
    records = make_curve([0.06, *[7.7 - 0.03 * i for i in range(60)]], [])
    records[0]["untrained_loss"] = untrained
    assert bool(watch_records(records, RULES).refusal) == is_refused


def test_the_first_step_records_where_the_run_began(base: Path, tmp_path: Path) -> None:
    """The mean loss over rows before any update, once: a first batch of one row may be far from it."""
    recipe = make_recipe(training={"effective_batch": 1, "epochs": 0.25, "warmup_ratio": 0.0})
    job = make_job(base, tmp_path, recipe, micro_batch=1)
    run_in_process(job)
    first, *later = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
    assert first["untrained_loss"] == pytest.approx(first["loss"], abs=1.0)
    assert first["untrained_loss"] != first["loss"]
    assert not any("untrained_loss" in r for r in later)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 24, 31, 32, 47, 1000])
def test_the_rows_of_the_first_measure_are_from_all_over_the_data(count: int) -> None:
    """Rows often lie by kind: no stretch is left out that is longer than two shares of the rows."""
    from appliance.training.loop import pick_spread

    places = pick_spread(range(count), 16)
    assert len(places) == min(16, count)
    assert all(b > a for a, b in pairwise(places))
    assert all(b - a <= 2 * max(1, count / 16) for a, b in pairwise([*places, count]))


def test_a_plateau_is_said_once_and_not_at_the_end_of_a_schedule() -> None:
    """Four evaluations within 1%, at a rate that could still move something."""
    flat = [1.0, 0.5, 0.5, 0.499, 0.498, 0.4981, 0.4982]
    rules = replace(RULES, patience=None, max_steps=80)
    assert list_kinds(watch_records(make_curve([1.0] * 70, flat), rules)) == ["plateau"]
    decayed = [
        r | {"learning_rate": 1e-6} if r["step"] > 20 and "loss" in r else r for r in make_curve([1.0] * 70, flat)
    ]
    assert list_kinds(watch_records(decayed, rules)) == []


def test_a_curve_that_falls_is_no_plateau_however_often_it_is_looked_at() -> None:
    """A hundred evaluations each less than 1% better than the one before are not flat; a pause in the middle is."""
    falling = [5.5 * 0.9975**i for i in range(100)]
    rules = replace(RULES, patience=1)
    assert list_kinds(watch_records(make_curve([1.0] * 1000, falling), rules)) == []
    pausing = [*falling[:50], *[falling[50] - 0.001 * i for i in range(30)], *falling[60:80]]
    assert list_kinds(watch_records(make_curve([1.0] * 1000, pausing), rules)) == ["plateau"]


def test_a_rule_that_no_row_can_serve_is_said(base: Path, tmp_path: Path) -> None:
    """A split may give no validation row by chance: asked for the best exact match, the last step is kept aloud."""
    recipe = make_recipe(training={"keep": "best_exact_match", "epochs": 1})
    job, said = make_job(base, tmp_path, recipe), list[str]()
    (tmp_path / "validation.rows.jsonl").write_bytes(b"")
    assert run_in_process(job, emit=lambda **event: said.append(str(event.get("note"))))["kept"] == "last"
    assert any("best_exact_match" in n and "no validation row" in n for n in said)


def test_a_collapse_is_said_when_it_lasts() -> None:
    """Nearly all rows with one answer, twice, where the references differ; a single evaluation may be a beginner's."""
    share = [0.2, 0.95, 0.3, 0.95, 0.97]
    seen = watch_records(make_curve(FALLING, [1.0, 0.9, 0.8, 0.7, 0.6], same_answer=share), RULES)
    assert [(a.kind, a.step) for a in seen.alerts] == [("collapse", 50)]
    alike = make_curve(FALLING, [1.0, 0.9, 0.8], same_answer=[0.95] * 3, same_reference=[0.9] * 3)
    assert watch_records(alike, RULES).alerts == ()


def test_sameness_is_one_for_one_answer_and_small_for_right_ones() -> None:
    """An answer is known up to its first error; rows agree with the answer whose beginnings they are."""
    assert measure_sameness([(5,)] * 10) == 1.0
    assert measure_sameness([(5, 6, 1), (5,), (5,), (5, 6)]) == 1.0
    assert measure_sameness([(1, 9), (2, 9), (3, 9), (4, 9)]) == 0.25
    assert measure_sameness([(1, 2), (1, 2, 3), (1, 2, 4), (1, 2, 4), (7,)]) == 0.6
    assert measure_sameness([]) == 0.0


def test_a_cut_and_replayed_journal_decides_the_same() -> None:
    """Wherever a journal is cut and the same records follow, the state is that of the whole."""
    records = make_curve(FALLING, [1.0, 0.8, 0.9, 1.0, 1.1, 1.2])
    whole = watch_records(records, RULES)
    for cut in range(len(records)):
        seen = watch_records([json.loads(json.dumps(r)) for r in records[:cut]], RULES)
        for record in records[cut:]:
            seen = watch_record(seen, record, RULES)
        assert seen == whole


def test_keeping_the_best_exact_match_needs_validation_rows() -> None:
    """A rule that could never be followed is refused by line and key."""
    text = "name: a\nbase: {model: ./b}\ndataset: {path: d, split: {validation: 0}}\nmethod: {type: lora}\n"
    assert parse_recipe(text, source="r.yaml").training.keep == "best_loss"
    with pytest.raises(RecipeError, match="best_exact_match needs validation rows"):
        parse_recipe(f"{text}training: {{keep: best_exact_match}}\n", source="r.yaml")


@pytest.mark.parametrize("packing", [True, False])
def test_exact_rows_are_those_that_greedy_generation_gets_right(base: Path, tmp_path: Path, packing: bool) -> None:
    """The validation pass and real generation agree on every row, in fp32, with right and wrong rows among them."""
    import torch
    from transformers import AutoTokenizer

    from appliance.model import load_template
    from appliance.model.weights import load_model
    from appliance.training import attention
    from appliance.training.batches import build_records, collate_packed, collate_padded
    from appliance.training.rows import load_rows
    from appliance.training.validation import score_rows, summarise_scores

    attention.register()
    file = tmp_path / "rows.jsonl"
    prepare_rows(make_examples(16), template=load_template(base), max_length=256, file=file)
    rows = load_rows(file)
    name = attention.NAME if packing else "sdpa"
    model = load_model(base, precision="fp32", device=torch.device("cpu"), attention=name)
    records = build_records(rows)
    pad = AutoTokenizer.from_pretrained(base).pad_token_id
    collate = collate_packed if packing else partial(collate_padded, pad_id=pad)
    learn(model, records[:8], collate=collate)

    scores = score_rows(model, records, collate=collate, size=5)
    model.set_attn_implementation("sdpa")
    generated = []
    for row in rows:
        start, end = row.spans[-1]
        prompt = torch.tensor([row.input_ids[:start]])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=end - start, do_sample=False,
            eos_token_id=257, pad_token_id=257,
        )  # fmt: skip
        generated.append(output[0, start:].tolist() == row.input_ids[start:end])
    assert [s.is_exact for s in scores] == generated
    assert 0 < sum(generated) < len(generated), "both kinds of rows are there"
    assert summarise_scores(scores)["eval_exact_match"] == sum(generated) / 16
    model.set_attn_implementation(name)
    again = summarise_scores(score_rows(model, records, collate=collate, size=16))
    assert again["eval_loss"] == pytest.approx(summarise_scores(scores)["eval_loss"], rel=1e-4), "whatever the batches"


def learn(model: Any, records: list[dict[str, Any]], *, collate: Any) -> None:
    """Plain steps until about half of the records are answered right."""
    import torch

    from appliance.training.batches import drop_places
    from appliance.training.validation import score_rows

    batch = collate(records)
    if "label_rows" in batch:
        batch = drop_places(batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        if sum(s.is_exact for s in score_rows(model, records, collate=collate, size=8)) >= len(records) // 2:
            return
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch, use_cache=False).loss.backward()
            optimizer.step()


OVERFITS = {
    "method": {"type": "lora", "rank": 8},
    "training": {"epochs": 60, "learning_rate": 0.02, "checkpoints": 40, "patience": 2, "schedule": "constant"},
}


def make_overfitting_job(base: Path, folder: Path, method: dict[str, Any] | None = None) -> Any:
    """A job that is stopped early: 8 rows to learn by heart, validated on rows with other answers."""
    from appliance.model import load_template

    overrides: dict[str, Any] = OVERFITS
    if method is not None:
        overrides = {"method": method, "training": {**OVERFITS["training"], "learning_rate": 0.003}}
    recipe = make_recipe(**overrides)
    job = make_job(base, folder, recipe)
    template = load_template(base)
    examples = make_examples(40)
    prepare_rows(examples[:8], template=template, max_length=256, file=folder / "train.rows.jsonl")
    others = [
        msgspec.structs.replace(e, messages=(e.messages[0], examples[at + 1].messages[1]))
        for at, e in enumerate(examples[30:38], 30)
    ]
    prepare_rows(others, template=template, max_length=256, file=folder / "validation.rows.jsonl")
    return job


@pytest.fixture(scope="session")
def stopped(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """A job that stopped early, and its summary."""
    job = make_overfitting_job(base, tmp_path_factory.mktemp("stopped"))
    return job, run_in_process(job)


def test_an_early_stop_is_an_end_and_the_artifact_is_the_best_step(stopped: tuple[Any, dict[str, Any]]) -> None:
    """The summary says by what it stopped and which step it kept; the bytes are that step's checkpoint's."""
    from safetensors.torch import load_file

    job, summary = stopped
    assert summary["stopped_by"] == "patience"
    assert summary["kept_step"] < summary["steps"] < summary["max_steps"]
    assert summary["kept_validation_loss"] == summary["best_validation_loss"] < summary["last_validation_loss"]
    checkpoint = job.checkpoints / f"checkpoint-{summary['kept_step']}"
    assert checkpoint.is_dir(), "rotation leaves the best checkpoint"
    assert len(list(job.checkpoints.glob("checkpoint-*"))) <= 3, "those for resuming, and the best"
    kept, made = (load_file(f / "adapter_model.safetensors") for f in (checkpoint, job.adapter))
    assert kept.keys() == made.keys()
    assert all(kept[k].equal(made[k]) for k in kept)
    events = [json.loads(line) for line in (job.folder / "events.jsonl").read_text().splitlines()]
    assert events == summary["alerts"]
    assert events[-1]["kind"] == "stopped"
    assert events[-1].keys() == {"step", "kind", "words", "numbers"}


def test_full_training_keeps_the_best_weights_too(base: Path, tmp_path: Path) -> None:
    """The artifact of a full run is the best checkpoint in the artifact's dtype."""
    from safetensors.torch import load_file

    job = make_overfitting_job(base, tmp_path, method={"type": "full"})
    summary = run_in_process(job)
    assert summary["kept_step"] < summary["steps"]
    kept = load_file(job.checkpoints / f"checkpoint-{summary['kept_step']}" / "model.safetensors")
    made = load_file(job.adapter / "model.safetensors")
    assert all(kept[k].to(made[k].dtype).equal(made[k]) for k in made)
    again = run_in_process(job)  # as after a kill between the stop and the artifact
    assert again["adapter_sha256"] == summary["adapter_sha256"], "configuration files included"


def test_a_run_killed_after_its_early_stop_takes_no_further_step(
    base: Path, tmp_path: Path, stopped: tuple[Any, dict[str, Any]]
) -> None:
    """Killed between the stop and the artifact, the same command makes the artifact and nothing else."""
    from appliance.training import trainer

    job = make_overfitting_job(base, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_artifact", stop_here)
        with pytest.raises(KeyboardInterrupt):
            run_in_process(job)
    journal = (job.folder / "metrics.jsonl").read_bytes()
    summary = run_in_process(job)
    assert (job.folder / "metrics.jsonl").read_bytes() == journal
    assert summary["adapter_sha256"] == stopped[1]["adapter_sha256"]
    assert summary["stopped_by"] == "patience"


def stop_here(*_arguments: Any, **_options: Any) -> None:
    """A kill at this very line."""
    raise KeyboardInterrupt


def test_a_run_interrupted_at_any_step_stops_early_at_the_same_step(
    base: Path, tmp_path: Path, stopped: tuple[Any, dict[str, Any]]
) -> None:
    """Stopped by a signal every few steps and started again, it ends with the same bytes and the same reasons."""
    from appliance.training.trainer import run_job

    job = make_overfitting_job(base, tmp_path)
    for stride in (1, 2, 3, 5, 7, 11):
        flag = make_stop()
        seen = 0

        def count(stride: int = stride, flag: Any = flag, **event: Any) -> None:
            nonlocal seen
            seen += "loss" in event
            flag.is_set = seen >= stride

        try:
            run_job(job, stop=flag, emit=count)
            break
        except InterruptedRunError:
            continue
    summary = run_in_process(job)
    assert summary["adapter_sha256"] == stopped[1]["adapter_sha256"]
    assert [summary[k] for k in ("steps", "kept_step", "alerts")] == [
        stopped[1][k] for k in ("steps", "kept_step", "alerts")
    ]


def test_a_lost_best_checkpoint_means_starting_over(
    base: Path, tmp_path: Path, stopped: tuple[Any, dict[str, Any]]
) -> None:
    """The newest checkpoint alone cannot give the best weights: it is not resumed from."""
    from appliance.training import trainer

    job = make_overfitting_job(base, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_artifact", stop_here)
        with pytest.raises(KeyboardInterrupt):
            run_in_process(job)
    best = job.checkpoints / f"checkpoint-{stopped[1]['kept_step']}" / "adapter_model.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    notes: list[str] = []
    trainer.run_job(job, stop=make_stop(), emit=lambda **event: notes.append(str(event.get("note", ""))))
    assert any("training starts over" in n for n in notes)
    assert digest_folder(job.adapter) == stopped[1]["adapter_sha256"]


def test_a_learning_rate_of_one_is_stopped_within_a_few_steps(base: Path, tmp_path: Path) -> None:
    """The reason is said and written down, and no artifact is left."""
    training = {"epochs": 50, "learning_rate": 1.0, "warmup_ratio": 0.0}
    job = make_job(base, tmp_path, make_recipe(method={"type": "full"}, training=training))
    with pytest.raises(TrainingError, match=r"lower training\.learning_rate"):
        run_in_process(job)
    (event,) = map(json.loads, (job.folder / "events.jsonl").read_text().splitlines())
    assert event["kind"] == "divergence"
    assert event["step"] <= 16
    assert not job.adapter.exists()
    assert not (job.folder / "summary.json").exists()


def test_a_killed_run_with_early_stopping_ends_with_the_same_weights(
    base: Path, tmp_path: Path, stopped: tuple[Any, dict[str, Any]]
) -> None:
    """SIGKILL shortly before the stop: the same bytes, and the parent hears the reason."""
    job = make_overfitting_job(base, tmp_path)
    command = [sys.executable, "-m", "appliance.training.worker", str(write_job(job))]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_step(job, stopped[1]["steps"] - 2, child)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=60)
    notes: list[str] = []
    summary = train(job, note=notes.append)
    assert summary["adapter_sha256"] == stopped[1]["adapter_sha256"]
    assert any(n.startswith("step ") and "stopped early" in n for n in notes)
    events = [(j.folder / "events.jsonl").read_bytes() for j in (job, stopped[0])]
    assert events[0] == events[1], "what was seen is the same, whichever life it was seen in"


def wait_for_step(job: Any, step: int, child: subprocess.Popen[bytes]) -> None:
    """Until the child's journal reaches `step`, or the child has ended."""
    journal = job.folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        lines = journal.read_text().splitlines() if journal.is_file() else []
        if any(json.loads(line)["step"] >= step for line in lines if line.endswith("}")):
            return
        time.sleep(0.005)


def make_event(step: int, **more: Any) -> dict[str, Any]:
    """A step's event as the child emits it."""
    return {
        "step": step, "max_steps": 202, "epoch": step / 100, "loss": 2.0 / step, "grad_norm": 1.25,
        "learning_rate": 2.9e-4, "tokens_per_second": 268.4, "memory_bytes": 3 << 29, **more,
    }  # fmt: skip


def make_status() -> Status:
    """After 57 steps and an evaluation at 51."""
    status = Status()
    for step in range(1, 58):
        status.take(make_event(step))
        if step == 51:
            status.take({"step": 51, "max_steps": 202, "epoch": 0.5, "validation_loss": 0.388,
                         "validation_exact_match": 0.417})  # fmt: skip
    status.elapsed, status.left = 72.0, 184.0
    return status


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_view_fits_the_terminal_and_says_everything(width: int) -> None:
    """Three lines of at most the width; from 80 columns on nothing is cut."""
    lines = render_view(make_status(), width=width)
    assert len(lines) == 3
    assert all(len(line) <= width for line in lines)
    if width >= 80:
        text = "\n".join(lines)
        way = ("57/202 steps", "epoch 0.57", "1:12", "3:04 left")
        losses = ("loss 0.035", "validation 0.388", "41.7%", "step 51", "█", "▁")
        machine = ("learning rate 0.00029", "gradient norm 1.25", "268 tokens/s", "1.50 GiB")
        for words in (*way, *losses, *machine):
            assert words in text


@pytest.mark.parametrize("width", range(30, 100, 7))
def test_a_field_of_the_view_is_whole_or_left_out(width: int) -> None:
    """A number that is cut is another number: on a narrow terminal fields go, the first ones stay."""
    fields = [f for line in render_view(make_status(), width=200) for f in line.strip().split("  ")]
    known = {f for f in fields if not {*f} & {*"━╌▁█"}}
    shown = [f for line in render_view(make_status(), width=width) for f in line.strip().split("  ")]
    assert {f for f in shown if not {*f} & {*"━╌▁█"}} <= known
    assert "loss 0.035" in shown


def test_a_log_line_says_the_same_without_pictures() -> None:
    """One line, plain ASCII."""
    line = render_line(make_status())
    assert line.isascii()
    for words in ("train 57/202 steps 72 s, about 184 s left", "loss 0.035", "validation 0.388", "exact 41.7%"):
        assert words in line


def test_a_sparkline_is_as_wide_as_asked_and_falls_with_its_values() -> None:
    """The first block is the highest, the last the lowest; equal values are a flat line; none are nothing."""
    line = draw_sparkline([10.0 - i / 10 for i in range(100)], 12)
    assert len(line) == 12
    assert (line[0], line[-1]) == ("█", "▁")
    assert sorted(line, reverse=True) == list(line)
    assert draw_sparkline([1.0, 1.0], 12) == "▁▁"
    assert draw_sparkline([], 12) == ""


def test_an_event_file_holds_the_journal_and_is_written_anew(tmp_path: Path) -> None:
    """Every record's scalars with their steps, each checksum right; a second opening replaces the first's file."""
    journal, folder = tmp_path / "metrics.jsonl", tmp_path / "board"
    lines = [json.dumps(r) for r in (make_step(1, 2.5), make_step(2, 1.5), make_evaluation(2, 1.25))]
    for count in (1, 3):
        with open_board(folder, journal=journal, note=fail) as copy:
            journal.write_text("".join(f"{line}\n" for line in lines[:count]) + '{"torn')
            copy()
            copy()
    (file,) = folder.iterdir()
    first, *events = read_records(file.read_bytes())
    assert first.endswith(b"brain.Event:2")
    assert len(events) == 3
    assert b"loss/train" in events[0]
    assert struct.pack("<f", 2.5) in events[0]
    assert b"\x10\x02" in events[2], "the step, as field 2"
    assert b"loss/validation" in events[2]


def fail(text: str) -> None:
    """No note is expected."""
    raise AssertionError(text)


def test_an_event_file_that_cannot_be_written_never_ends_a_run(tmp_path: Path) -> None:
    """At the start it is refused with the flag to change; on a full disk later the copy ends with one note."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrainingError, match="give --tensorboard another folder"),
        open_board(tmp_path / "file", journal=tmp_path / "j", note=fail),
    ):
        pass
    folder, notes = tmp_path / "board", list[str]()
    (tmp_path / "j").write_text(json.dumps(make_step(1, 2.0)) + "\n")
    with open_board(folder, journal=tmp_path / "j", note=notes.append) as copy, limit_file_size(10):
        copy()
        copy()
    assert len(notes) == 1
    assert "the run goes on" in notes[0]


@contextmanager
def limit_file_size(limit: int) -> Iterator[None]:
    """Writes beyond `limit` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_without_a_folder_no_event_file_is_written(tmp_path: Path) -> None:
    """TensorBoard is an option: nothing by default, not even the journal is read."""
    with open_board(None, journal=tmp_path / "none", note=fail) as copy:
        copy()
    assert list(tmp_path.iterdir()) == []


def test_the_checksum_is_the_published_one() -> None:
    """RFC 3720, appendix B.4, and the usual check value."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def read_records(data: bytes) -> list[bytes]:
    """The messages of an event file; fails on a wrong checksum."""
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        message = data[12 : 12 + length]
        assert frame_record(message) == data[: 16 + length]
        found.append(message)
        data = data[16 + length :]
    return found
