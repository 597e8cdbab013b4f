"""Laws of the disk: a training that it has no room for is refused before the first step, with sizes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from test_reconcile import TRAINING
from tiny import make_recipe, write_base, write_dataset

from appliance import pipeline
from appliance.errors import StoreError
from appliance.plan import check_room
from appliance.plan.room import estimate_room
from appliance.preparation import Origin, Workspace, prepare
from appliance.run import open_run
from appliance.store import open_store
from appliance.training import mirror as mirroring


def test_what_does_not_fit_is_refused_with_its_sizes(tmp_path: Path) -> None:
    """Checkpoints and artifact by name and size, and what to do; what fits is let through."""
    recipe = make_recipe(training={"checkpoints": 8})
    check_room(recipe, tmp_path, trainable=1000, parameters=1000)
    expected = (
        r"GiB free, the training writes up to 4,842\.9 GiB: 4 checkpoints of 1,117\.6 GiB and an artifact of 372\.5 GiB"
    )
    with pytest.raises(StoreError, match=expected) as caught:
        check_room(recipe, tmp_path, trainable=10**11, parameters=10**12)
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "give another disk with --runs" in str(caught.value)


def test_what_an_interrupted_training_left_counts_as_room(tmp_path: Path) -> None:
    """Resuming needs no more than beginning did: a file as large as what is missing makes it fit."""
    recipe = make_recipe(training={"checkpoints": 4})
    with pytest.raises(StoreError):
        check_room(recipe, tmp_path, trainable=10**11, parameters=10**11)
    left = tmp_path / "checkpoints" / "checkpoint-1"
    left.mkdir(parents=True)
    with (left / "optimizer.pt").open("wb") as stream:
        stream.truncate(6 * 10**12)  # sparse: takes no room
    check_room(recipe, tmp_path, trainable=10**11, parameters=10**11)


def test_a_run_asks_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the estimate is what a training really writes: no checkpoint and no artifact is larger, few are smaller."""
    monkeypatch.setattr(mirroring, "_PERIOD_S", 0.02)  # a run as short as this one is over before it looks
    write_base(tmp_path / "base")
    write_dataset(tmp_path / "datasets" / "colours", rows=64)
    recipe = make_recipe(method={"type": "lora", "rank": 32}, training={**TRAINING, "epochs": 4})
    workspace = Workspace(tmp_path, tmp_path / "cache", tmp_path / "runs", note=lambda _: None)
    prepared = prepare(recipe, workspace=workspace)
    origin = Origin(commit=None, time="2026-01-01T00:00:00Z", actor="x")
    run = open_run(workspace.runs, name=recipe.name, key=prepared.key)
    with run.lock():
        pipeline._prepare_stage(run, prepared, workspace=workspace, origin=origin)
    plan = run.read("prepare")["plan"]
    run.amend("prepare", plan={**plan, "trainable_parameters": 10**14})
    with pytest.raises(StoreError, match="the training writes up to"):
        pipeline.run_prepared(prepared, workspace=workspace, store=None, origin=origin, until="train")
    assert not (run.training / "job.json").exists()
    run.amend("prepare", plan=plan)
    mirror = open_store(f"file://{tmp_path}/mirror")  # it keeps a checkpoint that the run folder has done with
    pipeline.run_prepared(
        prepared, workspace=replace(workspace, mirror=mirror), store=None, origin=origin, until="train"
    )
    _, checkpoint, artifact = estimate_room(
        recipe, trainable=plan["trainable_parameters"], parameters=plan["parameters"]
    )
    made = (run.adapter / "adapter_model.safetensors").stat().st_size
    assert 0.9 * artifact < made < 1.1 * artifact + 10_000
    seen: Counter[str] = Counter()
    for stored in mirror.list("checkpoints/"):
        seen[stored.key.rpartition("/")[0]] += stored.size
    assert seen
    assert all(0.9 * checkpoint < size < 1.1 * checkpoint + 50_000 for size in seen.values()), (seen, checkpoint)
