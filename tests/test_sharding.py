"""Laws of a model shared out among devices, here processes on a CPU: the parts are the whole, in memory and on disk.

A second process has to load torch, which takes seconds, so most of it is slow.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_training
from pydantic import ValidationError
from test_ranks import BATCH, ROWS, find_peer, make_job, read_records
from test_resume import after_a_seal, finish, inside_a_save, kill
from test_training import write_job
from tiny import make_recipe, write_base
from warm import Warm

from appliance.training import TrainingJob


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


LORA = {"type": "lora", "rank": 4, "dropout": 0.1}
SHARDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": (LORA, {}),
    "checkpointing": (LORA, {"gradient_checkpointing": "on"}),
    "padded": (LORA, {"packing": False}),
    "kept": (LORA, {"keep": "best_loss", "learning_rate": 0.05, "checkpoints": 5}),
    "dora": ({**LORA, "variant": "dora"}, {}),
    "pissa": ({**LORA, "variant": "pissa", "dropout": 0.0}, {}),
    "qlora": ({"type": "qlora", "rank": 4}, {}),
    "ia3": ({"type": "ia3"}, {}),
    "prompt-tuning": ({"type": "prompt-tuning", "tokens": 4}, {}),
}


def make_sharded(base: Path, folder: Path, kind: str) -> TrainingJob:
    """The job of a kind on two devices that share out the base's layers."""
    method, training = SHARDED[kind]
    recipe = make_recipe(
        method=method,
        training={"epochs": 3, "effective_batch": BATCH, **training},
        needs={"devices": 2, "weights": "sharded"},
    )
    job = test_training.make_job(base, folder, recipe, micro_batch=1, rows=ROWS)
    job = job.model_copy(update={"sharded": True, "checkpointing": kind == "checkpointing"})
    write_job(job)
    return job


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(k, marks=pytest.mark.slow) for k in SHARDED if k != "lora")])
def test_a_base_that_is_shared_out_changes_no_byte(base: Path, warm: Warm, tmp_path: Path, kind: str) -> None:
    """Journal and adapter of devices that hold the base whole, the steps that have rows for one of them included."""
    job = make_sharded(base, tmp_path / "sharded", kind)
    shared_out = finish(warm, job)
    whole = make_sharded(base, tmp_path / "whole", kind).model_copy(update={"sharded": False})
    write_job(whole)
    assert finish(warm, whole) == shared_out
    measured = ("memory_bytes", "tokens_per_second", "seconds")
    journals = [[{k: v for k, v in r.items() if k not in measured} for r in read_records(j)] for j in (job, whole)]
    assert journals[0] == journals[1]
    assert any("validation_loss" in r for r in journals[0])


def run_ranks(script: str, base: Path, place: Path) -> Any:
    """What a script prints last, as JSON: it forks itself into ranks, which meet at `place`."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(base), str(place)],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PARTS = """
import json, os, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from appliance.errors import TrainingError
from appliance.model.weights import load_model
from appliance.training.ranks import join_ranks
from appliance.training.sharding import shard_base

base, meeting, size = Path(sys.argv[1]), Path(sys.argv[2]), 3
rank = next((r for r in range(1, size) if os.fork() == 0), 0)
torch.set_num_threads(1)
ranks = join_ranks(meeting, rank, size, torch.device("cpu"))
mesh = ranks.build_mesh()
loading = Path(f"{meeting}.loading")

def load():
    loading.open("x").close()
    model = load_model(base, precision="bf16", device=torch.device("cpu"))
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    before = {n: p.numel() for n, p in model.named_parameters()}
    names, model.get_base_model()._no_split_modules = model.get_base_model()._no_split_modules, None
    try:
        shard_base(model, mesh, device=torch.device("cpu"))
    except TrainingError as fault:
        refused = str(fault)
    model.get_base_model()._no_split_modules = names
    shard_base(model, mesh, device=torch.device("cpu"))
    loading.unlink()
    return before, model, refused

before, model, refused = ranks.one_by_one(load)
held = {n: getattr(p, "_local_tensor", p).numel() for n, p in model.named_parameters()}
answers = ranks.gather([{"held": held, "before": before, "refused": refused}])
if rank == 0:
    print(json.dumps(answers))
"""


def test_each_rank_holds_its_part_of_the_layers_and_one_at_a_time_the_whole(base: Path, tmp_path: Path) -> None:
    """The parts of a frozen matrix are the matrix; what is trained, and what is beside the layers, is whole on each."""
    answers = run_ranks(PARTS, base, tmp_path / "meeting")
    before = answers[0]["before"]
    for name, size in before.items():
        held = [a["held"][name] for a in answers]
        if ".layers." in name and "lora" not in name:
            assert sum(held) == size, name
        else:
            assert held == [size] * 3, name
    total = sum(n for name, n in before.items() if ".layers." in name and "lora" not in name)
    for answer in answers:
        assert sum(n for name, n in answer["held"].items() if ".layers." in name and "lora" not in name) < 0.4 * total
        assert answer["refused"].startswith("needs.weights: LlamaForCausalLM does not say what its layers are")


TRAINED = """
import json, os, sys
from pathlib import Path
import torch
from appliance.model.weights import load_model
from appliance.training.ranks import join_ranks
from appliance.training.sharding import (
    gather_weights, get_local, is_trained_in_parts, put_weights, share_optimizer, shard_trained,
)

base, folder, size = Path(sys.argv[1]), Path(sys.argv[2]), 3
rank = next((r for r in range(1, size) if os.fork() == 0), 0)
torch.set_num_threads(1)
cpu = torch.device("cpu")
ranks = join_ranks(folder / "meeting", rank, size, cpu)
torch.manual_seed(1)
rows = torch.randint(0, 200, (size, 1, 12))

def build(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

def look_at(row):
    return model(input_ids=row, labels=row, use_cache=False).loss

whole = model = load_model(base, precision="fp32", device=cpu)
for row in rows:
    look_at(row).backward()
expected = build(whole)
norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
expected.step()

model = load_model(base, precision="fp32", device=cpu)
shard_trained(model, ranks.build_mesh(), precision="fp32", device=cpu)
with torch.no_grad():
    look_at(rows[0])
optimizer = build(model)
share_optimizer(optimizer, keeps=ranks.is_lead)
look_at(rows[rank]).backward()
clipped = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
optimizer.step()
weights, state = gather_weights(model, keeps=ranks.is_lead), optimizer.state_dict()
found = {
    "norm": [float(norm), clipped.item()],
    "held": sum(get_local(p).numel() for p in model.parameters()),
    "kept": sum(w.numel() for w in weights.values()),
    "in parts": [is_trained_in_parts(whole), is_trained_in_parts(model)],
}
if ranks.is_lead:
    torch.save([weights, state], folder / "saved")
    named = dict(whole.named_parameters())
    assert weights.keys() == named.keys()
    found["far"] = max(float((weights[n] - p).abs().max()) for n, p in named.items())
    moments = expected.state_dict()["state"]
    found["moments"] = max(float((state["state"][i]["exp_avg"] - v["exp_avg"]).abs().max()) for i, v in moments.items())
ranks.add_up(0)
before = [get_local(p).clone() for p in model.parameters()]
saved, state = torch.load(folder / "saved", weights_only=True)
with torch.no_grad():
    for p in model.parameters():
        p.zero_()
put_weights(model, saved)
again = build(model)
share_optimizer(again, keeps=ranks.is_lead)
again.load_state_dict(state)
kept, back = (o.state for o in (optimizer, again))
found["back"] = all(map(torch.equal, before, map(get_local, model.parameters()))) and all(
    torch.equal(get_local(kept[p][k]), get_local(back[p][k])) for p in model.parameters() for k in kept[p]
)
answers = ranks.gather([found])
if rank == 0:
    print(json.dumps([sum(p.numel() for p in whole.parameters()), answers]))
"""


SCORED = """
import json, os, sys
from functools import partial
from pathlib import Path
import torch
from appliance.model.weights import load_model
from appliance.training import validation
from appliance.training.batches import collate_packed
from appliance.training.ranks import join_ranks
from appliance.training.sharding import shard_trained

base, meeting, size = Path(sys.argv[1]), Path(sys.argv[2]), 2
rank = next((r for r in range(1, size) if os.fork() == 0), 0)
torch.set_num_threads(1)
cpu = torch.device("cpu")
ranks = join_ranks(meeting, rank, size, cpu)
model = load_model(base, precision="fp32", device=cpu)
validation._HEAD_BYTES = 2 * 12 * model.config.vocab_size
row = [i % 200 for i in range(7, 40)]
records = [{"input_ids": row, "spans": [[start, start + n]]} for n, start in ((1 + 8 * rank, 3), (4, 2 + 9 * rank))]
score = partial(validation.score_rows, records=records, collate=collate_packed, size=1)
expected = score(model)
shard_trained(model, ranks.build_mesh(), precision="fp32", device=cpu)
found = score(model)
with torch.no_grad():
    for p in model.parameters():
        p.mul_(0.5)
changed = score(model)
answers = ranks.gather([[[s.loss for s in scores] for scores in (expected, found, changed)]])
if rank == 0:
    print(json.dumps(answers))
"""


def test_ranks_with_answers_of_different_lengths_score_them_together(base: Path, tmp_path: Path) -> None:
    """However often each asks the head: what is beside the layers is gathered once a batch, and anew for the next."""
    for expected, found, changed in run_ranks(SCORED, base, tmp_path / "meeting"):
        assert found == pytest.approx(expected, rel=1e-5)
        assert changed != pytest.approx(found, rel=1e-3)


def test_what_is_trained_in_parts_is_what_is_trained_whole(base: Path, tmp_path: Path) -> None:
    """A step of three ranks is that of one with all rows, its state is saved whole, and each takes its part back."""
    size, answers = run_ranks(TRAINED, base, tmp_path)
    assert sum(a["held"] for a in answers) == size
    assert max(a["held"] for a in answers) < 0.4 * size
    assert [a["kept"] for a in answers] == [size, 0, 0]
    for answer in answers:
        assert answer["in parts"] == [False, True]
        assert answer["norm"][0] == pytest.approx(answer["norm"][1], rel=1e-5)
        assert answer["back"]
    assert answers[0]["far"] < 1e-5
    assert answers[0]["moments"] < 1e-6


FULL: dict[str, dict[str, Any]] = {
    "packed": {"precision": "fp32"},
    "padded": {"precision": "bf16", "packing": False},
    "kept": {"precision": "bf16", "keep": "best_loss", "learning_rate": 0.05, "checkpoints": 5},
    "checkpointing": {"precision": "bf16", "gradient_checkpointing": "on"},
}


def make_full(base: Path, folder: Path, kind: str) -> TrainingJob:
    """Full training on two devices that share out all of it."""
    job = make_job(base, folder, devices=2, full=True, **FULL[kind])
    job = job.model_copy(update={"sharded": True, "checkpointing": kind == "checkpointing"})
    write_job(job)
    return job


@pytest.mark.slow
@pytest.mark.parametrize("kind", FULL)
def test_full_training_in_parts_learns_what_it_learns_whole_and_survives_kills(
    base: Path, warm: Warm, tmp_path: Path, kind: str
) -> None:
    """The losses are close, for sums come in another order. Killed, it ends in its own bytes; whole, it is refused."""
    job, whole = make_full(base, tmp_path / "parts", kind), make_full(base, tmp_path / "whole", kind)
    write_job(whole.model_copy(update={"sharded": False}))
    expected, _ = finish(warm, job), finish(warm, whole)
    if kind != "kept":  # at its rate any rounding ends elsewhere
        losses = [[r["validation_loss"] for r in read_records(j) if "validation_loss" in r] for j in (job, whole)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3 if kind == "packed" else 0.05)
    names = [sorted(f.name for f in j.adapter.iterdir()) for j in (job, whole)]
    assert names[0] == names[1]
    assert (job.adapter / "config.json").read_bytes() == (whole.adapter / "config.json").read_bytes()

    again = make_full(base, tmp_path / "again", kind)
    for moment in (after_a_seal, inside_a_save(0.002)):
        assert kill(warm, again, moment) == -signal.SIGKILL
    write_job(again.model_copy(update={"sharded": False}))
    assert warm.run(again.folder) != 0
    assert "weights was sharded, is whole" in (again.folder / "worker.log").read_text()
    write_job(again)
    assert finish(warm, again) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("signalled", "code"), [("killed", -signal.SIGKILL), ("stopped", 33)])
def test_the_other_device_lost_inside_a_save_ends_the_run_and_changes_no_byte(
    signalled: str, code: int, base: Path, warm: Warm, tmp_path: Path
) -> None:
    """The first one waits for its part, and ends at once in the same way; a stop is answered with a checkpoint."""
    expected = finish(warm, make_full(base, tmp_path / "expected", "packed"))
    job = make_full(base, tmp_path / "job", "packed")
    pid = warm.start(job.folder)
    inside_a_save(0.0)(job, lambda: warm.is_running(pid))
    began = time.monotonic()
    os.kill(find_peer(job), signal.SIGKILL if signalled == "killed" else signal.SIGTERM)
    assert warm.wait(pid) == code
    assert time.monotonic() - began < 20
    assert finish(warm, job) == expected


@pytest.mark.slow
@pytest.mark.parametrize("moment", [after_a_seal, inside_a_save(0.002)])
def test_a_kill_of_a_run_with_a_shared_base_changes_no_byte(
    moment: Callable[..., None], base: Path, warm: Warm, tmp_path: Path
) -> None:
    """It goes on as it was, or with the base whole: a checkpoint is the same either way."""
    expected = finish(warm, make_sharded(base, tmp_path / "expected", "lora"))
    for then_sharded in (True, False):
        job = make_sharded(base, tmp_path / str(then_sharded), "lora")
        assert kill(warm, job, moment) == -signal.SIGKILL
        write_job(job.model_copy(update={"sharded": then_sharded}))
        assert finish(warm, job) == expected


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"needs": {"weights": "sharded"}}, "there is one device"),
        ({"forgetting": {"ewc": {"strength": 1.0}}}, r"forgetting\.ewc looks at whole weights"),
        ({"training": {"speed": {"compile": "on"}}}, r"training\.speed\.compile compiles layers"),
    ],
)
def test_a_base_that_cannot_be_shared_out_is_refused(overrides: dict[str, Any], words: str) -> None:
    """By the recipe's key and the reason, before any device is asked."""
    with pytest.raises(ValidationError, match=rf"needs\.weights: {words}.*; write auto or whole"):
        make_recipe(**{"needs": {"devices": 2, "weights": "sharded"}, **overrides})
