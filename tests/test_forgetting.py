"""Forgetting: general rows reach training and nothing else, and the penalty is what its formula says."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from tiny import COLOURS, build_adapted, make_recipe, make_stop, write_base, write_dataset

from appliance import pipeline
from appliance.data import count_replayed, load_prompts
from appliance.digest import digest_folder
from appliance.errors import DatasetError, RecipeError, TrainingError
from appliance.evaluation import Output
from appliance.example import Example, Message, decode_examples
from appliance.general import _read_answers as read_answers
from appliance.general import choose_general, keep_finished, preview_replay, select_replay
from appliance.model import load_template
from appliance.model.shapes import read_sizes, read_weight_dtypes, read_weight_shapes
from appliance.plan import Machine, Plan, build_plan
from appliance.plan.activations import count_activations
from appliance.plan.penalty import measure_penalty
from appliance.preparation import Origin, Workspace, prepare
from appliance.recipe import EwcSection, Recipe, parse_recipe
from appliance.run import Run, open_run
from appliance.training import TrainingJob, prepare_rows
from appliance.training.rows import load_rows

ORIGIN = Origin(commit=None, time="2026-01-31T12:00:00Z", actor="tester")
STRONG = 1e6


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def make_rows(count: int, *, words: str) -> list[Example]:
    """Rows whose answers are longer than a colour."""
    return [
        Example(
            f"{words}{i}",
            (Message("user", f"{words} question {i}?"), Message("assistant", f"{words} answer {i * 7 % 13}")),
            "general",
        )
        for i in range(count)
    ]


def make_task(count: int) -> list[Example]:
    """Rows whose answer is their colour."""
    return [
        Example(f"r{i}", (Message("user", f"thing {i}: {c}"), Message("assistant", c)), "program")
        for i, c in ((i, COLOURS[i % 4]) for i in range(count))
    ]


def make_job(base: Path, folder: Path, *, strength: float | None, method: dict[str, Any] | None = None) -> TrainingJob:
    """A job of 32 task rows, with a penalty from 12 general rows when `strength` is given."""
    recipe = make_recipe(method=method or {"type": "lora", "rank": 4})
    template = load_template(base)
    for name, rows in (
        ("train", make_task(32)),
        ("validation", make_task(40)[32:]),
        ("general", make_rows(12, words="why")),
    ):
        prepare_rows(rows, template=template, max_length=256, file=folder / f"{name}.rows.jsonl")
    return TrainingJob(
        folder=folder,
        adapter=folder / "adapter",
        base=base,
        base_name="tiny",
        method=recipe.method,
        training=recipe.training.model_copy(update={"precision": "fp32"}),
        ewc=EwcSection(strength=strength) if strength is not None else None,
        micro_batch=4,
        checkpointing=False,
        threads=1,
        fingerprint={"run_key": "k"},
    )


def run_in_process(job: TrainingJob) -> dict[str, Any]:
    """The child's work in this process: no start-up cost."""
    from appliance.training.trainer import run_job

    run_job(job, stop=make_stop(), emit=lambda **_event: None)
    summary: dict[str, Any] = json.loads((job.folder / "summary.json").read_bytes())
    return summary


def build(job: TrainingJob) -> tuple[Any, Any]:
    """The model before its first step, and its penalty."""
    import torch

    from appliance.training.ewc import build_penalty

    torch.manual_seed(3)
    model = build_adapted(job)
    return model, build_penalty(job, model, precision="fp32", emit=lambda **_event: None)


def test_a_layer_that_no_general_row_reaches_is_left_out_of_the_penalty(base: Path, tmp_path: Path) -> None:
    """Names that a recipe gives fit a tower for images too: text rows never run it, so its update costs nothing."""
    import torch
    from test_plan import save_with_vision

    from appliance.training.ewc import build_penalty

    folder = shutil.copytree(base, tmp_path / "vision")
    save_with_vision(folder, "Gemma3")
    shutil.copy(base / "generation_config.json", folder)
    method = {"type": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]}
    job = make_job(folder, tmp_path / "job", strength=50.0, method=method)
    model, said = build_adapted(job), list[str]()
    penalty = build_penalty(job, model, precision="fp32", emit=lambda **event: said.append(event["note"]))
    adapted = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert len(penalty.terms) == len([n for n in adapted if "vision" not in n]) < len(adapted)
    assert re.search(r"forgetting\.ewc: no general row reaches 2 adapted layers \(.*vision.*\); .*without", said[-1])
    assert math.isfinite(penalty.add_gradients())
    assert torch.isfinite(next(p.grad for p in model.parameters() if p.grad is not None)).all()


METHODS: list[dict[str, Any]] = [
    {"type": "lora", "rank": 4},
    {"type": "lora", "rank": 4, "variant": "rslora", "alpha": 3},
    {"type": "lora", "rank": 4, "variant": "pissa", "targets": ["q_proj", "down_proj"]},
    {"type": "lora", "rank": 4, "variant": "olora"},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.get("variant", "plain"))
def test_the_low_rank_penalty_is_that_of_a_dense_model(base: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    """Value and gradients equal autograd's on dense updates, and the update is what merging would add to the base."""
    import torch

    from appliance.model.weights import load_model

    model, penalty = build(make_job(base, tmp_path, strength=50.0, method=method))
    dense = dict(load_model(base, precision="fp32", device=torch.device("cpu")).named_parameters())
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert layers
    starts = {n: m.get_delta_weight("default").detach().clone() for n, m in layers.items()}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_A["default"].weight, std=0.1)
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    expected = torch.zeros(())
    fishers = [t.fisher for t in penalty.terms]
    for (name, layer), fisher in zip(layers.items(), fishers, strict=True):
        update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        merged = layer.base_layer.weight + layer.get_delta_weight("default")
        plain = dense[name.removeprefix("base_model.model.") + ".weight"]
        torch.testing.assert_close(merged - plain, update - starts[name], atol=1e-5, rtol=1e-3)
        expected = expected + 0.5 * 50.0 * (fisher.float() * (update - starts[name]) ** 2).sum()
    expected.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert penalty.add_gradients() == pytest.approx(expected.item(), rel=1e-4)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, wanted[name], atol=1e-6, rtol=1e-3)
    penalty.add_gradients()
    name, twice = next((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    torch.testing.assert_close(twice, 2 * wanted[name], atol=1e-6, rtol=1e-3)


def test_the_full_penalty_is_the_distance_from_the_start(base: Path, tmp_path: Path) -> None:
    """Full training: value and gradients equal autograd's, embeddings and norms included."""
    import torch

    model, penalty = build(make_job(base, tmp_path, strength=50.0, method={"type": "full"}))
    starts = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert penalty.add_gradients() == 0.0
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    named = dict(model.named_parameters())
    assert len(penalty.terms) == len(named)
    fisher = {next(n for n, p in named.items() if p is t.weight): t.fisher.float() for t in penalty.terms}
    expected = sum(0.5 * 50.0 * (fisher[n] * (p - starts[n]) ** 2).sum() for n, p in named.items())
    gradients = torch.autograd.grad(expected, list(named.values()))
    assert penalty.add_gradients() == pytest.approx(expected.item(), rel=1e-4)
    for weight, gradient in zip(named.values(), gradients, strict=True):
        torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-3)


def test_the_fisher_of_frozen_weights_is_the_one_that_autograd_gives(base: Path, tmp_path: Path) -> None:
    """Outer products of inputs and output gradients are the weights' own gradients, and chance is seeded."""
    import torch

    from appliance.model.weights import load_model
    from appliance.training.fisher import estimate_inputs, estimate_weights

    make_job(base, tmp_path, strength=None)
    rows = load_rows(tmp_path / "general.rows.jsonl")[:4]
    model = load_model(base, precision="fp32", device=torch.device("cpu")).eval()
    modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "proj" in n}
    by_autograd = estimate_weights(model, rows, seed=5)
    model.requires_grad_(False)
    by_hooks = estimate_inputs(model, modules, rows, seed=5)
    assert set(by_hooks) == set(modules)
    for name, values in by_hooks.items():
        torch.testing.assert_close(values, by_autograd[f"{name}.weight"], atol=1e-9, rtol=0.02)
    again = estimate_inputs(model, modules, rows, seed=5)
    assert all(torch.equal(again[n], v) for n, v in by_hooks.items())
    assert not all(torch.equal(v, by_hooks[n]) for n, v in estimate_inputs(model, modules, rows, seed=6).items())
    assert all(p.grad is None for p in model.parameters())


def test_half_the_fisher_times_a_squared_change_is_the_drift_in_nats_per_token(base: Path, tmp_path: Path) -> None:
    """The unit of `strength`: for one changed weight the penalty at strength 1 is KL(base || changed) per token."""
    import torch

    from appliance.model.weights import load_model
    from appliance.training.fisher import estimate_weights

    make_job(base, tmp_path, strength=None)
    rows = load_rows(tmp_path / "general.rows.jsonl")
    model = load_model(base, precision="fp32", device=torch.device("cpu")).eval()
    fisher = estimate_weights(model, rows * 30, seed=1)
    name, values = max(((n, v) for n, v in fisher.items() if "proj" in n), key=lambda item: float(item[1].max()))
    place = int(values.float().argmax())

    def score() -> torch.Tensor:
        with torch.no_grad():
            parts = [model(input_ids=torch.tensor([r.input_ids])).logits[0] for r in rows]
        kept = [logits[start - 1 : end - 1] for logits, r in zip(parts, rows, strict=True) for start, end in r.spans]
        return torch.log_softmax(torch.cat(kept), -1)

    before, change = score(), 0.05
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[place] += change
    drift = float((before.exp() * (before - score())).sum(-1).mean())
    assert 0.5 * float(values.view(-1)[place]) * change**2 == pytest.approx(drift, rel=0.3)


def measure_drift(base: Path, job: TrainingJob) -> float:
    """KL(base || tuned) per token on the general rows."""
    import torch
    from peft import PeftModel

    from appliance.model.weights import load_model

    model = PeftModel.from_pretrained(load_model(base, precision="fp32", device=torch.device("cpu")), str(job.adapter))
    total, tokens = 0.0, 0
    for row in load_rows(job.folder / "general.rows.jsonl"):
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            tuned = torch.log_softmax(model.eval()(input_ids=ids).logits[0], -1)
            with model.disable_adapter():
                plain = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        for start, end in row.spans:
            total += float((plain.exp() * (plain - tuned))[start - 1 : end - 1].sum())
            tokens += end - start
    return total / tokens


def test_a_strong_penalty_keeps_the_model_near_its_base(base: Path, tmp_path: Path) -> None:
    """More strength, less drift; the penalty is a column of the journal, and the first loss is the data's alone."""
    jobs = [make_job(base, tmp_path / str(s), strength=s) for s in (None, 300.0, STRONG)]
    summaries = [run_in_process(job) for job in jobs]
    drifts = [measure_drift(base, job) for job in jobs]
    assert drifts[2] < 0.2 * drifts[1] < 0.2 * drifts[0]
    assert summaries[1]["first_loss"] == pytest.approx(summaries[0]["first_loss"], rel=1e-5)
    assert summaries[1]["last_loss"] < summaries[1]["first_loss"]
    journals = [[json.loads(x) for x in (j.folder / "metrics.jsonl").read_bytes().splitlines()] for j in jobs]
    assert not any("penalty" in r for r in journals[0])
    penalties = [r["penalty"] for r in journals[1] if "loss" in r]
    assert penalties[0] == 0.0
    assert len(penalties) == 8
    assert all(p > 0 for p in penalties[2:]), "the first step warms up at rate 0"
    assert not any("penalty" in r for r in journals[1] if "validation_loss" in r)


@pytest.mark.parametrize("method", [{"type": "qlora", "rank": 4}, {"type": "full"}], ids=["qlora", "full"])
def test_other_methods_train_with_the_penalty(base: Path, tmp_path: Path, method: dict[str, Any]) -> None:
    """A 4-bit base and full weights: the loss falls and the penalty is at work."""
    job = make_job(base, tmp_path, strength=10.0, method=method)
    summary = run_in_process(job)
    records = [json.loads(x) for x in (job.folder / "metrics.jsonl").read_bytes().splitlines()]
    assert summary["last_loss"] < summary["first_loss"]
    assert max(r.get("penalty", 0.0) for r in records) > 0


def test_a_killed_run_with_a_penalty_ends_with_the_same_weights(base: Path, tmp_path: Path) -> None:
    """SIGKILL after a checkpoint and again: the same Fisher is read and the final bytes are the same."""
    whole = run_in_process(make_job(base, tmp_path / "whole", strength=300.0))
    job = make_job(base, tmp_path / "killed", strength=300.0)
    (job.folder / "job.json").write_text(job.model_dump_json())
    child = subprocess.Popen(
        [sys.executable, "-m", "appliance.training.worker", str(job.folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and child.poll() is None and not list(job.checkpoints.glob("*/sealed.json")):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=60)
    before = (job.folder / "fisher.safetensors").stat().st_mtime_ns
    assert not job.adapter.exists()
    assert run_in_process(job)["adapter_sha256"] == whole["adapter_sha256"] == digest_folder(job.adapter)
    assert (job.folder / "fisher.safetensors").stat().st_mtime_ns == before, "the Fisher was read, not estimated again"


def test_a_damaged_fisher_is_estimated_again_to_the_same_values(base: Path, tmp_path: Path) -> None:
    """A truncated file is no reason to train with other values; a Fisher of other rows is not used."""
    job = make_job(base, tmp_path, strength=300.0)
    first = build(job)[1].fisher_sha256
    file = tmp_path / "fisher.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    assert build(job)[1].fisher_sha256 == first
    prepare_rows(
        make_rows(12, words="how"), template=load_template(base), max_length=256, file=tmp_path / "general.rows.jsonl"
    )
    assert build(job)[1].fisher_sha256 != first


def test_a_fisher_that_protects_nothing_is_refused() -> None:
    """All zeros, or a value that is not finite: said before the first step."""
    import torch

    from appliance.training.fisher import check_fisher

    with pytest.raises(TrainingError, match="zero everywhere"):
        check_fisher({"a": torch.zeros(2, 2)})
    with pytest.raises(TrainingError, match="Fisher of a is not finite"):
        check_fisher({"a": torch.tensor([1.0, float("inf")])})


def test_a_layer_whose_update_is_not_low_rank_is_refused(base: Path, tmp_path: Path) -> None:
    """DoRA's magnitude is outside the formula; the message names the way out."""
    method = {"type": "lora", "rank": 4, "variant": "dora"}
    with pytest.raises(TrainingError, match=r"is not B A of a linear layer; use another method\.variant"):
        build(make_job(base, tmp_path, strength=1.0, method=method))


def write_general(folder: Path, *, rows: int = 12, words: str = "why", **changes: Any) -> Path:
    """A folder of general rows; `changes` are put into the first one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.yaml").write_text("name: general\n")
    lines = [json.loads(json.dumps({"id": e.id, "provenance": e.provenance})) for e in make_rows(rows, words=words)]
    for line, example in zip(lines, make_rows(rows, words=words), strict=True):
        line["messages"] = [{"role": m.role, "content": m.content} for m in example.messages]
    if lines:
        lines[0] |= changes
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_workspace(root: Path, base: Path, notes: list[str] | None = None) -> Workspace:
    """A repository with the colours dataset and the tiny base."""
    write_dataset(root / "datasets" / "colours")
    if not (root / "base").exists():
        (root / "base").symlink_to(base)
    return Workspace(
        root=root, cache=root / "cache", runs=root / "runs", note=(notes if notes is not None else []).append
    )


def make_forgetting(**sections: Any) -> Recipe:
    """The tiny recipe with a `forgetting` section."""
    return make_recipe().model_copy(
        update={"forgetting": Recipe.model_validate({**make_recipe().model_dump(), "forgetting": sections}).forgetting}
    )


def test_replayed_rows_reach_training_and_nothing_else(base: Path, tmp_path: Path) -> None:
    """The asked share of train's token rows is general; splits, validation, test and few-shot rows are as without."""
    workspace = make_workspace(tmp_path, base)
    write_general(tmp_path / "general")
    recipe = make_forgetting(replay={"path": "general", "share": 0.2}, ewc={"path": "general", "rows": 5})
    prepared = prepare(recipe, workspace=workspace)
    plain = prepare(make_recipe(), workspace=workspace)
    finished = pipeline.run_recipe(recipe, workspace=workspace, store=None, origin=ORIGIN, until="train")
    run = open_run(workspace.runs, name=recipe.name, key=prepared.key)
    assert finished.key == prepared.key
    assert run.is_done("train")
    tokens = {s: [r.id for r in load_rows(run.training / f"{s}.rows.jsonl")] for s in ("train", "validation", "test")}
    replayed = [i for i in tokens["train"] if i.startswith("general:")]
    assert len(replayed) == count_replayed(0.2, train_rows=len(plain.splits.train))
    assert len(replayed) / len(tokens["train"]) == pytest.approx(0.2, abs=0.01)
    assert len(set(tokens["train"])) == len(tokens["train"])
    for side in ("train", "validation", "test"):
        assert decode_examples((run.examples / f"{side}.jsonl").read_bytes()) == getattr(plain.splits, side)
    assert not any("general" in i for side in ("validation", "test") for i in tokens[side])
    assert prepared.splits.digest == plain.splits.digest
    assert len(load_rows(run.training / "general.rows.jsonl")) == 5
    assert run.read("prepare")["plan"]["rows"] == len(tokens["train"])
    assert [e.id for e in preview_replay(prepared)] == replayed, "`appliance plan` counts the very same rows"
    assert preview_replay(plain) == ()
    records = [json.loads(x) for x in (run.training / "metrics.jsonl").read_bytes().splitlines()]
    assert max(r.get("penalty", 0.0) for r in records) > 0, "the penalty of the recipe was at work in the child"
    job = TrainingJob.model_validate_json((run.training / "job.json").read_bytes())
    assert job.ewc == recipe.forgetting.ewc
    assert "general_rows" in job.fingerprint
    assert pipeline._describe_data(prepared, replayed=len(replayed))["provenance"]["general"] == len(replayed)


def test_the_choice_of_rows_depends_on_their_content_alone() -> None:
    """Another order of files gives the same choice; a small pool is gone through again under other ids."""
    pool = make_rows(9, words="why")
    assert select_replay(tuple(pool), count=4) == select_replay(tuple(reversed(pool)), count=4)
    twice = select_replay(tuple(pool), count=14)
    assert len({e.id for e in twice}) == 14
    assert {e.content_hash for e in twice} == {e.content_hash for e in pool}
    assert {e.provenance for e in twice} == {"general"}


def test_the_run_key_depends_on_the_general_rows(base: Path, tmp_path: Path) -> None:
    """One changed general row is another run; without the section nothing changes for older recipes."""
    workspace = make_workspace(tmp_path, base)
    keys = []
    for words in ("why", "how"):
        write_general(tmp_path / "general", words=words)
        keys.append(prepare(make_forgetting(replay={"path": "general"}), workspace=workspace).key)
    keys.append(prepare(make_forgetting(replay={"path": "general", "share": 0.3}), workspace=workspace).key)
    keys.append(prepare(make_forgetting(ewc={"path": "general"}), workspace=workspace).key)
    keys.append(prepare(make_recipe(), workspace=workspace).key)
    assert len(set(keys)) == 5
    assert "forgetting" not in make_recipe().model_dump(exclude_none=True)


BAD_FOLDERS: list[tuple[str, dict[str, Any], str]] = [
    (
        "missing",
        {},
        r"forgetting\.replay\.path: .*: \[missing\] no such folder; run `dvc pull`, correct the path, or leave it out",
    ),
    ("empty", {"rows": 0}, "the file has no rows"),
    ("synthetic", {"provenance": "synthetic"}, "a synthetic row without a review"),
    ("roles", {"messages": [{"role": "user", "content": "hi"}]}, "the last turn is user, expected assistant"),
    ("schema", {"provenence": "human"}, "did you mean provenance"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD_FOLDERS, ids=[b[0] for b in BAD_FOLDERS])
def test_a_bad_folder_of_general_rows_is_one_clear_message(
    base: Path, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    """Each fault names the key of the recipe, the place and the remedy; no base model is loaded for it."""
    workspace = make_workspace(tmp_path, base)
    if name != "missing":
        write_general(tmp_path / "general", **changes)
    with pytest.raises(DatasetError, match=message) as caught:
        prepare(make_forgetting(replay={"path": "general"}), workspace=workspace)
    assert all(line.startswith("forgetting.replay.path: ") for line in str(caught.value).splitlines())


def test_a_general_row_that_asks_what_the_dataset_asks_is_refused(base: Path, tmp_path: Path) -> None:
    """Also as an early turn of a longer chat, in other case and spacing; the row and the side are named."""
    workspace = make_workspace(tmp_path, base)
    test = prepare(make_recipe(), workspace=workspace).splits.test[0]
    turns = [
        {"role": "user", "content": f"  {test.request.upper()} "},
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": "nothing"},
    ]
    write_general(tmp_path / "general", messages=turns)
    message = rf"forgetting\.ewc\.path: row why0 has the prompt of test row {test.id}; remove it"
    with pytest.raises(DatasetError, match=message):
        prepare(make_forgetting(ewc={"path": "general"}), workspace=workspace)


def test_general_rows_do_not_belong_into_the_dataset(base: Path, tmp_path: Path) -> None:
    """A reviewed dataset refuses them; they have a folder of their own."""
    workspace = make_workspace(tmp_path, base)
    file = tmp_path / "datasets" / "colours" / "rows.jsonl"
    file.write_text(file.read_text().replace('"program"', '"general"', 1))
    with pytest.raises(DatasetError, match=r"\[unreviewed\] row r0: a general row in a reviewed dataset"):
        prepare(make_recipe(), workspace=workspace)


RECIPE = """name: colours
base: {{model: ./base}}
dataset: {{path: datasets/colours}}
method: {method}
forgetting: {forgetting}
"""
LORA = "{type: lora}"
BAD_SECTIONS = [
    (
        LORA,
        "{replay: {share: 0.9}}",
        r"r:5: forgetting\.replay\.share: found 0\.9, expected .* less than or equal to 0\.5",
    ),
    (LORA, "{replay: {share: 0}}", r"forgetting\.replay\.share: found 0, expected a value greater than 0"),
    (LORA, "{ewc: {strength: 0}}", r"forgetting\.ewc\.strength: found 0, expected a value greater than 0"),
    (LORA, "{ewc: {strenght: 1}}", r"unknown key forgetting\.ewc\.strenght; did you mean strength\?"),
    (LORA, "{replays: {}}", r"unknown key forgetting\.replays; did you mean replay\?"),
    (LORA, "{}", r"forgetting: says nothing; give replay or ewc"),
    ("{type: lora, variant: dora}", "{ewc: {}}", r"forgetting\.ewc: the update of variant dora is not that of a plain"),
    ("{type: lora, variant: mica}", "{ewc: {}}", r"forgetting\.ewc: the update of variant mica is not that of a plain"),
]


@pytest.mark.parametrize(("method", "forgetting", "message"), BAD_SECTIONS, ids=[b[0] + b[1] for b in BAD_SECTIONS])
def test_a_bad_section_is_one_clear_message(method: str, forgetting: str, message: str) -> None:
    """Shares and strengths out of range, misspelt keys and methods it cannot serve name the key."""
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(RECIPE.format(method=method, forgetting=forgetting), source="r")
    assert len(str(caught.value).splitlines()) == 1


def test_the_prompts_of_the_package_are_many_and_differ() -> None:
    """About 200 prompts, no two alike."""
    prompts = load_prompts()
    assert len(prompts) == len({p.casefold() for p in prompts}) >= 200


def write_talker(base: Path, folder: Path, *, says: str) -> Path:
    """A base that answers every prompt with the characters of `says`: each token calls for the next one."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, folder)
    template, model = load_template(base), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    chain = [*template.encode("\n").ids, *template.encode(says).ids]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        head = torch.zeros_like(model.lm_head.weight)
        for token, following in itertools.pairwise(chain):
            head[following] = model.get_input_embeddings().weight[token] * 100
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    kept = (base / "generation_config.json").read_bytes()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(kept)
    return folder


def test_the_base_model_answers_the_general_prompts_itself(base: Path, tmp_path: Path) -> None:
    """Without a folder: the base's answers are replayed and kept for other runs; with none, a folder is asked for."""
    notes: list[str] = []
    workspace = make_workspace(tmp_path, write_talker(base, tmp_path / "talker", says="ok<|im_end|>"), notes)
    prepared = prepare(make_forgetting(replay={"share": 0.25}, ewc={"rows": 6}), workspace=workspace)
    run = Run(folder=tmp_path / "run", key=prepared.key)
    run.folder.mkdir()
    chosen = choose_general(prepared, run=run, workspace=workspace, threads=1)
    assert len(chosen.ewc) == 6
    assert len(chosen.replay) == count_replayed(0.25, train_rows=len(prepared.splits.train))
    assert {e.provenance for e in (*chosen.replay, *chosen.ewc)} == {"general"}
    assert {e.request for e in chosen.replay} <= set(load_prompts())
    assert {e.answer for e in chosen.replay} == {"ok"}
    assert sum("answers 202 general prompts" in n for n in notes) == 1, "both sections share the answers"
    assert "202 of 202 general prompts have an answer of the base model to keep" in notes
    (kept,) = (tmp_path / "cache" / "general").iterdir()
    assert read_answers(kept) is not None
    kept.write_bytes(kept.read_bytes()[:-20])
    assert read_answers(kept) is None, "a torn file is made again"
    kept.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"replay\.path: the base model finished no answer of 160 tokens that fits"):
        choose_general(prepared, run=run, workspace=workspace, threads=1)


def test_answers_that_were_cut_or_are_empty_are_not_kept() -> None:
    """A cut answer would teach to stop in the middle."""
    asked = [Example(i, (Message("user", i), Message("assistant", "")), "general") for i in "abcd"]
    said: list[tuple[str, str, Literal["eos", "length"]]] = [
        ("a", " yes ", "eos"),
        ("b", "so lon", "length"),
        ("c", "  ", "eos"),
    ]
    outputs = [
        Output(id=i, arm="zero_shot", output=t, stop=s, tokens=3, prompt_tokens=3, seconds=0.1) for i, t, s in said
    ]
    assert [(e.id, e.answer) for e in keep_finished(asked, outputs)] == [("a", "yes")]


def count_live_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that tensors made by `work` hold at once, by the allocator's own record."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


PLANNED: list[tuple[str, dict[str, Any]]] = [
    *(("fp32", m) for m in METHODS),
    ("fp32", {"type": "lora", "rank": 4, "variant": "gaussian"}),
    ("fp32", {"type": "lora", "rank": 4, "variant": "orthogonal"}),
    ("fp32", {"type": "full"}),
    ("bf16", {"type": "full"}),
]
every_planned_method = pytest.mark.parametrize(
    ("stored", "method"), PLANNED, ids=[f"{s}-{m.get('variant', m['type'])}" for s, m in PLANNED]
)


def store_base(base: Path, folder: Path, stored: str) -> Path:
    """The tiny base with its weights in this dtype, none of them as round as the norms of a fresh model."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    torch.manual_seed(1)
    dtype = torch.bfloat16 if stored == "bf16" else torch.float32
    changed = {n: (w + 0.01 * torch.randn_like(w)).to(dtype) for n, w in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def count_held(penalty: Any) -> int:
    """Bytes of every tensor that a penalty keeps."""
    starts = [t.start if isinstance(t.start, tuple) else (t.start,) for t in penalty.terms]
    tensors = [*(t.fisher for t in penalty.terms), *(s for start in starts for s in start if s is not None)]
    return sum(t.nbytes for t in tensors)


@every_planned_method
def test_the_plan_counts_what_the_penalty_holds(
    base: Path, tmp_path: Path, stored: str, method: dict[str, Any]
) -> None:
    """Byte for byte its tensors, and its largest moment; a plan with it is larger by them, and by nothing else."""
    home = store_base(base, tmp_path / "base", stored)
    job = make_job(home, tmp_path, strength=50.0, method=method)
    model, penalty = build(job)
    held = count_held(penalty)
    planned = measure_penalty(job.method, read_weight_shapes(home), read_weight_dtypes(home))
    assert planned.kept == held > 0

    for weight in model.parameters():
        weight.grad = weight.detach().clone() if weight.requires_grad else None
    largest = max(t.fisher.numel() for t in penalty.terms)
    passing = count_live_bytes(penalty.add_gradients)
    factors = 0 if method["type"] == "full" else 3 * 4 * 4 * (64 + 128)  # of the matrix at hand and the one before
    assert planned.passing == 12 * largest <= passing <= planned.passing + factors + 64

    def plan(recipe: Recipe) -> Plan:
        machine = Machine(cores=1, memory_bytes=8 << 30)
        facts = {"lengths": [200] * 40, "trained_tokens": 40, "validation_rows": 0}
        return build_plan(recipe, **facts, base=home, machine=machine, longest_general=20)

    plain, guarded = plan(make_recipe(method=method)), plan(make_ewc_recipe(method))
    assert guarded.peak_bytes - plain.peak_bytes == pytest.approx(1.07 * held, abs=1)
    assert plan(make_ewc_recipe(method, replay={})) == plain, "replay holds no memory of its own"


def make_ewc_recipe(method: dict[str, Any], **sections: Any) -> Recipe:
    """The tiny recipe of a method with the penalty, or with the given `forgetting`."""
    values = {**make_recipe(method=method).model_dump(), "forgetting": sections or {"ewc": {}}}
    return Recipe.model_validate(values)


def test_the_plan_counts_the_estimate_of_the_fisher(base: Path, tmp_path: Path) -> None:
    """fp32 sums of every matrix before the first step: they are the peak where rows are short and general rows long."""
    import torch

    from appliance.model.weights import load_model
    from appliance.training.fisher import estimate_inputs

    method = {"type": "lora", "rank": 4}
    job = make_job(base, tmp_path, strength=50.0, method=method)
    model = load_model(base, precision="fp32", device=torch.device("cpu")).eval()
    planned = measure_penalty(job.method, shapes := read_weight_shapes(base), {})
    modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")}
    rows = load_rows(tmp_path / "general.rows.jsonl")[:3]
    measured = count_live_bytes(lambda: estimate_inputs(model, modules, rows, seed=1))
    sizes = read_sizes(base)
    longest = max(len(r.input_ids) for r in rows)
    activations = count_activations("fused", sizes, shapes, width=4.0, fused_norms=True)
    kept = activations.estimate(longest, checkpointing=False)
    moving = kept + longest * 12.3 * 2 * sizes.vocabulary  # in fp32
    assert planned.estimating < measured < planned.estimating + 1.5 * moving
    machine = Machine(cores=1, memory_bytes=1 << 20)
    facts = {"lengths": [2] * 40, "trained_tokens": 40, "validation_rows": 0}
    plan = build_plan(make_ewc_recipe(method), **facts, base=base, machine=machine, longest_general=longest)
    loaded = 2 * sum(math.prod(s) for s in shapes.values()) + 4 * plan.trainable_parameters
    kept = count_activations("fused", sizes, shapes, width=2.0, fused_norms=True).estimate(longest, checkpointing=False)
    held = loaded + planned.estimating + kept + longest * 12.3 * sizes.vocabulary
    assert plan.peak_bytes == pytest.approx(1.07 * held + (1 << 30), abs=1)
    assert "forgetting.ewc takes 0.0 GiB of it before the first step" in "\n".join(plan.warnings)
