"""The main job on one page: check -> plan -> train -> evaluate -> judge -> card -> publish -> promote.

Each stage records that it is done only after its files are durable, so an interrupted run is
finished by the same command and nothing is done twice. A version that the registry already has for
the same recipe, data and base is never made again.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from appliance import __version__, evaluation, registry, report, training
from appliance.data import Dataset, Report, Splits, check_dataset, split_dataset
from appliance.digest import canonical_json, digest_file, digest_folder, list_files, write_atomic
from appliance.errors import DatasetError
from appliance.example import decode_examples, encode_examples
from appliance.manifest import FileEntry, Manifest
from appliance.model import Base, load_template, render_row, resolve_base
from appliance.plan import Machine, Plan, build_plan, read_machine
from appliance.recipe import FullMethod, Recipe
from appliance.run import Run, build_run_key, open_run
from appliance.store import Store

Until = Literal["train", "evaluate", "publish"]
_BATCH = 32
_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where things are: the repository, the cache of bases, the run folders."""

    root: Path
    cache: Path
    runs: Path
    note: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Origin:
    """Which commit asked for the run, when (UTC, 2026-01-31T12:00:00Z), and who runs it."""

    commit: str | None
    time: str
    actor: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before training: the checked data, the base, and the key of the run."""

    recipe: Recipe
    dataset: Dataset
    splits: Splits
    base: Base
    key: str


@dataclass(frozen=True, slots=True)
class Finished:
    """How a run ended. `version` is empty when nothing was published."""

    name: str
    key: str
    folder: Path | None
    outcome: str
    reasons: tuple[str, ...]
    version: str
    alias: str
    was_done: bool


def prepare(recipe: Recipe, *, workspace: Workspace) -> Prepared:
    """Check and split the data, bring the base model. Raises `DatasetError` listing every fault."""
    checked = check_data(recipe, root=workspace.root)
    if checked.errors or checked.dataset is None:
        raise DatasetError("\n".join(str(f) for f in checked.errors))
    for finding in checked.warnings:
        workspace.note(f"warning: {finding}")
    base = resolve_base(recipe.base, root=workspace.root, cache=workspace.cache, note=workspace.note)
    splits = split_dataset(checked.dataset, recipe.dataset.split)
    key = build_run_key(recipe, data_digest=checked.dataset.digest, base_digest=base.digest)
    return Prepared(recipe=recipe, dataset=checked.dataset, splits=splits, base=base, key=key)


def check_data(recipe: Recipe, *, root: Path) -> Report:
    """The findings for a recipe's dataset; lengths are checked against the base when rows are prepared."""
    return check_dataset(
        root / recipe.dataset.path,
        split=recipe.dataset.split,
        gates_min_test_rows=recipe.evaluation.gates.min_test_rows,
    )


def plan_run(prepared: Prepared, *, machine: Machine) -> Plan:
    """The plan of a run, from its real token rows; trains nothing."""
    template = load_template(prepared.base.folder)
    rows = [render_row(e, template) for e in prepared.splits.train]
    return build_plan(
        prepared.recipe,
        lengths=[len(r.input_ids) for r in rows],
        trained_tokens=sum(r.trained for r in rows),
        validation_rows=len(prepared.splits.validation),
        base=prepared.base.folder,
        machine=machine,
    )


def run_recipe(
    recipe: Recipe,
    *,
    workspace: Workspace,
    store: Store | None,
    origin: Origin,
    until: Until = "publish",
    force: bool = False,
) -> Finished:
    """Do the main job for one recipe, or as much of it as is not done yet."""
    prepared = prepare(recipe, workspace=workspace)
    if store is not None and not force:
        version = registry.find_run(store, recipe.name, prepared.key)
        if version is not None:
            return _finish_published(recipe, prepared.key, version, store=store, origin=origin)
    run = open_run(workspace.runs, name=recipe.name, key=prepared.key)
    with run.lock():
        _prepare_stage(run, prepared, workspace=workspace, origin=origin)
        _train_stage(run, prepared, workspace=workspace)
        if until == "train":
            return _describe(run, recipe, version="")
        _evaluate_stage(run, prepared, workspace=workspace, store=store)
        _judge_stage(run, prepared)
        _card_stage(run, prepared)
        if until == "evaluate" or store is None:
            return _describe(run, recipe, version="")
        return _publish_stage(run, prepared, workspace=workspace, store=store, origin=origin)


def publish_run(prepared: Prepared, *, workspace: Workspace, store: Store, origin: Origin) -> Finished:
    """Publish a run whose card is done. Raises `DatasetError` when it is not."""
    run = open_run(workspace.runs, name=prepared.recipe.name, key=prepared.key)
    with run.lock():
        if not run.is_done("card"):
            raise DatasetError(f"{run.folder}: this run has no card yet; run `appliance evaluate` first")
        return _publish_stage(run, prepared, workspace=workspace, store=store, origin=origin)


def _prepare_stage(run: Run, prepared: Prepared, *, workspace: Workspace, origin: Origin) -> None:
    """Split rows and token rows on disk, every mask checked, and the plan."""
    if run.is_done("prepare"):
        return
    workspace.note(
        f"{len(prepared.splits.train)} train, {len(prepared.splits.validation)} validation, "
        f"{len(prepared.splits.test)} test rows; run {prepared.key[:12]}"
    )
    template = load_template(prepared.base.folder)
    limit = prepared.recipe.training.max_length
    for side in ("train", "validation", "test"):
        examples = getattr(prepared.splits, side)
        write_atomic(run.examples / f"{side}.jsonl", encode_examples(examples))
        file = run.training / f"{side}.rows.jsonl"
        rows = training.prepare_rows(examples, template=template, max_length=limit, file=file)
        if side == "train":
            sample = training.show_mask(rows[0], template)
    machine = read_machine()
    plan = plan_run(prepared, machine=machine)
    for warning in plan.warnings:
        workspace.note(f"warning: {warning}")
    run.finish(
        "prepare",
        plan=plan.to_json(),
        mask_example=sample,
        time=origin.time,
        commit=origin.commit,
        cores=machine.cores,
    )


def _train_stage(run: Run, prepared: Prepared, *, workspace: Workspace) -> None:
    """The adapter, unless one is there whose bytes are those that training recorded."""
    if run.is_done("train") and _is_intact(run):
        return
    record = run.read("prepare")
    plan = record["plan"]
    workspace.note(
        f"training {plan['trainable_parameters'] / 1e6:.1f}M of {plan['parameters'] / 1e6:.0f}M parameters: "
        f"{plan['steps']} steps of {plan['effective_batch']} rows, {plan['tokens']:,} tokens"
    )
    job = training.TrainingJob(
        folder=run.training,
        adapter=run.adapter,
        base=prepared.base.folder,
        base_name=prepared.base.model,
        method=prepared.recipe.method,
        training=prepared.recipe.training,
        micro_batch=plan["micro_batch"],
        checkpointing=plan["checkpointing"],
        threads=record["cores"],
        fingerprint={
            "run_key": run.key,
            "train_rows": digest_file(run.training / "train.rows.jsonl"),
            "validation_rows": digest_file(run.training / "validation.rows.jsonl"),
            **_read_versions(),
        },
    )
    summary = training.train(job, note=workspace.note, env={"OMP_NUM_THREADS": str(record["cores"])})
    run.finish("train", summary=summary)
    shutil.rmtree(job.checkpoints, ignore_errors=True)


def _is_intact(run: Run) -> bool:
    recorded = run.read("train")["summary"]["adapter_sha256"]
    return run.adapter.is_dir() and digest_folder(run.adapter) == recorded


def _evaluate_stage(run: Run, prepared: Prepared, *, workspace: Workspace, store: Store | None) -> None:
    """One scored result per test row and arm."""
    if run.is_done("evaluate"):
        return
    recipe, section = prepared.recipe, prepared.recipe.evaluation
    champion = _fetch_champion(run, prepared, workspace=workspace, store=store)
    template = load_template(prepared.base.folder)
    arms = evaluation.build_arms(
        section,
        base=prepared.base.folder,
        artifact=run.adapter,
        is_adapter=not isinstance(recipe.method, FullMethod),
        champion=run.folder / "champion" if champion else None,
    )
    test = decode_examples((run.examples / "test.jsonl").read_bytes())
    train = decode_examples((run.examples / "train.jsonl").read_bytes())
    prompts = [
        p for arm in arms for p in evaluation.build_prompts(arm, test, section=section, train=train, template=template)
    ]
    workspace.note(f"evaluating {', '.join(a.name for a in arms)} on {len(test)} held-out rows")
    job = evaluation.GenerationJob(
        folder=run.evaluation,
        arms=arms,
        stop_ids=tuple(sorted(template.stop_ids)),
        max_new_tokens=section.max_new_tokens,
        batch=_BATCH,
        precision=recipe.training.precision,
        threads=run.read("prepare")["cores"],
    )
    outputs = evaluation.generate(job, prompts, note=workspace.note)
    results = evaluation.score_outputs(outputs, test, prepared.dataset.card.contract)
    write_atomic(run.evaluation / "results.jsonl", evaluation.encode_results(results))
    run.finish("evaluate", champion=champion)


def _fetch_champion(run: Run, prepared: Prepared, *, workspace: Workspace, store: Store | None) -> str | None:
    """Pull the version behind the alias, when it was trained on the same base."""
    name, alias = prepared.recipe.name, prepared.recipe.publish.alias
    if store is None or registry.read_alias(store, name, alias) is None:
        return None
    version, manifest = registry.resolve(store, f"{name}@{alias}")
    if manifest.base.get("revision") != prepared.base.revision:
        workspace.note(f"the champion {version} has another base model; it is not compared")
        return None
    folder = run.folder / "champion"
    shutil.rmtree(folder, ignore_errors=True)
    registry.pull(store, f"{name}@{version}", folder)
    return version


def _judge_stage(run: Run, prepared: Prepared) -> None:
    if run.is_done("judge"):
        return
    results = evaluation.decode_results((run.evaluation / "results.jsonl").read_bytes())
    section = prepared.recipe.evaluation
    verdict = evaluation.judge(results, metric=section.metric, gates=section.gates)
    write_atomic(run.evaluation / "verdict.json", canonical_json(verdict.to_json()))
    run.finish("judge", verdict=verdict.to_json())


def _card_stage(run: Run, prepared: Prepared) -> None:
    if run.is_done("card"):
        return
    metrics = [json.loads(line) for line in (run.training / "metrics.jsonl").read_bytes().splitlines()]
    record, recipe = run.read("prepare"), prepared.recipe
    card = report.build_card(
        recipe=recipe,
        run_key=run.key,
        git_commit=record["commit"],
        created_at=record["time"],
        base=prepared.base.to_json(),
        data=_describe_data(prepared),
        training={**run.read("train")["summary"], "trained_tokens": record["plan"]["trained_tokens"], "mask_example": record["mask_example"]},
        metrics=metrics,
        verdict=run.read("judge")["verdict"],
        versions=_read_versions(),
    )
    report.write_card(card, run.card)
    run.finish("card")


def _describe_data(prepared: Prepared) -> dict[str, Any]:
    rows = prepared.dataset.rows
    provenance = [r.example.provenance for r in rows]
    return {
        "name": prepared.dataset.card.name,
        "licence": prepared.dataset.card.licence,
        "rows": len(rows),
        "train": len(prepared.splits.train),
        "validation": len(prepared.splits.validation),
        "test": len(prepared.splits.test),
        "digest": prepared.dataset.digest,
        "split_digest": prepared.splits.digest,
        "provenance": {p: provenance.count(p) for p in sorted(set(provenance))},
    }


def _publish_stage(run: Run, prepared: Prepared, *, workspace: Workspace, store: Store, origin: Origin) -> Finished:
    """Artifact and card as one immutable version; the alias moves only on `ship`."""
    folder = _collect(run)
    manifest = _build_manifest(run, prepared, folder=folder)
    workspace.note(f"publishing {manifest.name} {manifest.version} to {store.url}")
    version = registry.publish(store, manifest=manifest, folder=folder)
    run.finish("publish", version=version)
    _promote(prepared.recipe, version, manifest, store=store, origin=origin)
    return _describe(run, prepared.recipe, version=version)


def _collect(run: Run) -> Path:
    """The folder that is published: the artifact's files and the card's beside them."""
    folder = run.folder / "release"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.adapter, folder)
    shutil.copytree(run.card, folder / "card")
    shutil.copyfile(run.card / "card.md", folder / "README.md")
    shutil.copyfile(run.evaluation / "results.jsonl", folder / "card" / "results.jsonl")
    return folder


def _build_manifest(run: Run, prepared: Prepared, *, folder: Path) -> Manifest:
    record, verdict = run.read("prepare"), run.read("judge")["verdict"]
    files = [(n, folder / n) for n in list_files(folder)]
    return Manifest(
        schema=1,
        name=prepared.recipe.name,
        kind="model" if isinstance(prepared.recipe.method, FullMethod) else "adapter",
        run_key=run.key,
        created_at=record["time"],
        git_commit=record["commit"],
        files=tuple(FileEntry(path=n, size=p.stat().st_size, sha256=digest_file(p)) for n, p in files),
        recipe=prepared.recipe.model_dump(mode="json"),
        recipe_digest=prepared.recipe.digest,
        data_digest=prepared.dataset.digest,
        split_digest=prepared.splits.digest,
        base=prepared.base.to_json(),
        verdict=verdict["outcome"],
        metrics={"metric": verdict["metric"], "n": verdict["n"], "arms": {a: v["score"] for a, v in verdict["arms"].items()}},
        training=run.read("train")["summary"],
        versions=_read_versions(),
        parent=run.read("evaluate")["champion"],
    )


def _promote(recipe: Recipe, version: str, manifest: Manifest, *, store: Store, origin: Origin) -> None:
    """Move the recipe's alias to a version that ships and has never been behind it.

    A version that was there and is not any more was rolled back by a person: it stays so.
    """
    alias = recipe.publish.alias
    seen = {entry.version for entry in registry.read_reflog(store, recipe.name) if entry.alias == alias}
    if manifest.verdict == "ship" and version not in seen:
        registry.promote(
            store,
            name=recipe.name,
            version=version,
            alias=alias,
            actor=origin.actor,
            reason="verdict ship",
            at=origin.time,
        )


def _finish_published(recipe: Recipe, key: str, version: str, *, store: Store, origin: Origin) -> Finished:
    """The version is there; make sure that its promotion was not lost between two steps."""
    manifest = registry.load_manifest(store, recipe.name, version)
    _promote(recipe, version, manifest, store=store, origin=origin)
    return Finished(
        name=recipe.name,
        key=key,
        folder=None,
        outcome=manifest.verdict,
        reasons=(),
        version=version,
        alias=recipe.publish.alias if manifest.verdict == "ship" else "",
        was_done=True,
    )


def _describe(run: Run, recipe: Recipe, *, version: str) -> Finished:
    verdict = run.read("judge")["verdict"] if run.is_done("judge") else {"outcome": "", "reasons": []}
    ships = verdict["outcome"] == "ship" and version
    return Finished(
        name=recipe.name,
        key=run.key,
        folder=run.folder,
        outcome=verdict["outcome"],
        reasons=tuple(verdict["reasons"]),
        version=version,
        alias=recipe.publish.alias if ships else "",
        was_done=False,
    )


def _read_versions() -> dict[str, str]:
    """Versions of what makes the weights."""
    found = {"appliance": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found

