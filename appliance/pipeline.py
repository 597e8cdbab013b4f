"""The main job on one page: check -> plan -> train -> evaluate -> judge -> card -> publish -> promote.

Each stage records that it is done only after its files are durable, so an interrupted run is
finished by the same command and nothing is done twice. A version that the registry already has for
the same recipe, data and base is never made again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from appliance import evaluation, registry, release, report, training
from appliance.data import find_near_copies, summarise_dataset
from appliance.digest import canonical_json, digest_file, digest_folder, write_atomic
from appliance.errors import DatasetError
from appliance.example import decode_examples, encode_examples
from appliance.general import choose_general
from appliance.method import FullMethod
from appliance.model import TokenRow, fit_template, load_template
from appliance.model.shapes import read_weight_shapes
from appliance.plan import check_device, check_room, plan_answering, read_machine
from appliance.preparation import Origin, Prepared, Workspace, note_tokens, plan_run, prepare, read_versions, rehearse
from appliance.recipe import Recipe
from appliance.release import build_manifest, collect_files, fetch_champion, find_champion, promote_by_verdict
from appliance.run import Run, open_run
from appliance.store import Store

Until = Literal["train", "evaluate", "publish"]
_BATCH = 32


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
    note: str = ""  # what is to be known of the alias


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
    return run_prepared(prepared, workspace=workspace, store=store, origin=origin, until=until, force=force)


def run_prepared(
    prepared: Prepared,
    *,
    workspace: Workspace,
    store: Store | None,
    origin: Origin,
    until: Until = "publish",
    force: bool = False,
) -> Finished:
    """`run_recipe` from the point where data and base are checked."""
    recipe = prepared.recipe
    if store is not None and not force:
        version = registry.find_run(store, recipe.name, prepared.key, is_committed=origin.commit is not None)
        if version is not None:
            return finish_published(recipe, version, key=prepared.key, workspace=workspace, store=store, origin=origin)
    check_device(recipe, read_machine())
    if store is not None and until == "publish":  # what takes no version is known before one is made
        registry.create_format(store)
    run = open_run(workspace.runs, name=recipe.name, key=prepared.key)
    with run.lock():
        if force and run.is_done("publish"):
            run.start_over()
        _prepare_stage(run, prepared, workspace=workspace, origin=origin)
        _train_stage(run, prepared, workspace=workspace)
        if until == "train":  # nothing is judged, and what was judged earlier is not what was asked
            return replace(_describe(run, recipe, version=""), outcome="", reasons=())
        _evaluate_stage(run, prepared, workspace=workspace, store=store)
        _judge_stage(run, prepared)
        _card_stage(run, prepared)
        if until == "evaluate" or store is None:
            return _describe(run, recipe, version="")
        return _publish_stage(run, prepared, workspace=workspace, store=store, origin=origin)


def train_alone(prepared: Prepared, *, workspace: Workspace, origin: Origin, choices: Mapping[str, Any]) -> Run:
    """Train in a run folder of its own, with the given `choices` instead of this machine's; the finished run."""
    check_device(prepared.recipe, read_machine())
    run = open_run(workspace.runs, name=prepared.recipe.name, key=prepared.key)
    with run.lock():
        if run.is_done("train") and run.read("train").get("versions") != read_versions(image=workspace.image):
            run.start_over()  # what was asked is what these versions make
        _prepare_stage(run, prepared, workspace=workspace, origin=origin)
        record = run.read("prepare")
        taken = ("micro_batch", "devices", "sharded", "checkpointing")
        plan = {**record["plan"], **{k: choices[k] for k in taken if k in choices}}
        cores = choices["threads"] * plan["devices"] if "threads" in choices else record["cores"]
        run.amend("prepare", plan=plan, cores=cores)
        _train_stage(run, prepared, workspace=workspace, precision=choices.get("precision"))
    return run


def publish_run(prepared: Prepared, *, workspace: Workspace, store: Store, origin: Origin) -> Finished:
    """Publish a run whose card is done. Raises `DatasetError` when it is not."""
    run = open_run(workspace.runs, name=prepared.recipe.name, key=prepared.key)
    with run.lock():
        if not run.is_done("card"):
            raise DatasetError(f"{run.folder}: this run has no card yet; run `appliance evaluate` first")
        compared, champion = run.read("evaluate")["champion"], find_champion(prepared, workspace, store)
        if not run.is_done("publish") and compared != champion:  # once it is, the alias may be at this very version
            raise DatasetError(
                f"{run.folder}: this run was compared with {compared or 'no version in use'}, and "
                f"{prepared.recipe.publish.alias} is {champion or 'nothing to compare with'} now; "
                "run `appliance evaluate` with --store first"
            )
        return _publish_stage(run, prepared, workspace=workspace, store=store, origin=origin)


def _prepare_stage(run: Run, prepared: Prepared, *, workspace: Workspace, origin: Origin) -> None:
    """Split rows and token rows on disk, every mask checked, and the plan."""
    if run.is_done("prepare"):
        if run.read("prepare")["commit"] is None and origin.commit is not None:  # committed after it was tried
            run.amend("prepare", commit=origin.commit, time=origin.time)
        if not _has_new_needs(run, prepared, workspace=workspace):
            return
    workspace.note(
        f"{len(prepared.splits.train)} train, {len(prepared.splits.validation)} validation, "
        f"{len(prepared.splits.test)} test rows; run {prepared.key[:12]}"
    )
    template = fit_template(load_template(prepared.base.folder), prepared.splits.train)
    section = prepared.recipe.training
    became = {}
    machine = read_machine()
    kept = training.TokenCache(workspace.cache / "tokens", note=workspace.note)
    general = choose_general(prepared, run=run, workspace=workspace, threads=machine.cores)
    note_tokens(prepared, (*general.replay, *general.ewc), template=template, workspace=workspace)
    rehearse(prepared, template=template, workspace=workspace)
    for side in ("train", "validation", "test"):
        examples = getattr(prepared.splits, side)
        write_atomic(run.examples / f"{side}.jsonl", encode_examples(examples))
        file = run.training / f"{side}.rows.jsonl"
        limit = None if (side, section.overlong) == ("test", "drop") else section.max_length  # no test row is dropped
        if side == "train":  # general rows are trained on, and are in no file that evaluation reads
            examples = (*examples, *general.replay)
        rows = training.prepare_rows(
            examples, template=template, max_length=limit, overlong=section.overlong, file=file, cache=kept
        )
        became[side] = training.describe_rows(examples, rows)
        if became[side]["dropped"]:
            workspace.note(f"warning: {len(became[side]['dropped'])} {side} rows are too long and were dropped whole")
        if side == "train":
            trained = rows
    protected: tuple[TokenRow, ...] = ()
    if general.ewc:
        protected = training.prepare_rows(
            general.ewc,
            template=template,
            max_length=section.max_length,
            overlong=section.overlong,
            file=run.training / "general.rows.jsonl",
            cache=kept,
        )
    plan = plan_run(prepared, rows=trained, machine=machine, general=protected)
    for warning in plan.warnings:
        workspace.note(f"warning: {warning}")
    run.finish(
        "prepare",
        plan=plan.to_json(),
        rows=became,
        thinking=template.thinking,
        switch=template.switch,
        needs=prepared.recipe.needs.model_dump(mode="json"),
        masks=training.select_masks(trained, template),
        time=origin.time,
        commit=origin.commit,
        cores=machine.cores,
        replayed=len(general.replay),
        recipe=prepared.recipe.model_dump(mode="json"),
        base=prepared.base.to_json(),
        system_prompt=summarise_dataset(prepared.dataset, prepared.splits)["system_prompt"],
    )


def _has_new_needs(run: Run, prepared: Prepared, *, workspace: Workspace) -> bool:
    """Whether to plan again: the run key leaves `needs` out, and from its first checkpoint on a training keeps them."""
    needs = prepared.recipe.needs.model_dump(mode="json")
    if run.is_done("train") or run.read("prepare").get("needs", needs) == needs:
        return False
    if any(run.training.glob("checkpoints/checkpoint-*")):
        workspace.note(f"warning: {run.folder} goes on with the needs that it began with; delete it to change them")
        return False
    return True


def _train_stage(run: Run, prepared: Prepared, *, workspace: Workspace, precision: str | None = None) -> None:
    """The adapter, unless one is there whose bytes are those that training recorded."""
    if run.is_done("train") and _is_intact(run):
        shutil.rmtree(run.training / "checkpoints", ignore_errors=True)
        return
    record = run.read("prepare")
    plan = record["plan"]
    trainable, parameters = plan["trainable_parameters"], plan["parameters"]
    check_room(prepared.recipe, run.training, trainable=trainable, parameters=parameters)
    devices = plan.get("devices", 1)  # a run that an earlier release prepared
    workspace.note(
        f"training {trainable:,} of {parameters:,} parameters: "
        f"{plan['steps']:,} steps of {min(plan['effective_batch'], plan['rows']):,} rows, {plan['tokens']:,} tokens"
        f"{f', on {devices} devices' if devices > 1 else ''}"
    )
    threads, versions = max(1, record["cores"] // devices), read_versions(image=workspace.image)
    job = training.TrainingJob(
        folder=run.training,
        adapter=run.adapter,
        base=prepared.base.folder,
        base_name=prepared.base.model,
        method=prepared.recipe.method,
        training=prepared.recipe.training.model_copy(update={"precision": precision} if precision else {}),
        ewc=prepared.recipe.forgetting.ewc if prepared.recipe.forgetting else None,
        micro_batch=plan["micro_batch"],
        devices=devices,
        sharded=plan.get("sharded", False),
        checkpointing=plan["checkpointing"],
        threads=threads,
        fingerprint={
            "run_key": run.key,
            "train_rows": digest_file(run.training / "train.rows.jsonl"),
            "validation_rows": digest_file(run.training / "validation.rows.jsonl"),
            **_digest_general(run),
            **read_versions(),
        },
    )
    board = workspace.tensorboard / run.folder.name if workspace.tensorboard else None
    mirror = training.Mirror(workspace.mirror, run.key) if workspace.mirror else None
    env = {"OMP_NUM_THREADS": str(threads)}
    summary = training.train(job, note=workspace.note, env=env, board=board, mirror=mirror)
    predicted = {"peak_memory_bytes": plan["peak_bytes"], "micro_batch": plan["micro_batch"]}
    run.finish("train", summary={**summary, "predicted": predicted}, versions=versions)
    shutil.rmtree(job.checkpoints, ignore_errors=True)


def _digest_general(run: Run) -> dict[str, str]:
    """What a checkpoint is bound to beside its rows: the rows of the Fisher, where there are any."""
    file = run.training / "general.rows.jsonl"
    return {"general_rows": digest_file(file)} if file.is_file() else {}


def _is_intact(run: Run) -> bool:
    recorded = run.read("train")["summary"]["adapter_sha256"]
    return run.adapter.is_dir() and digest_folder(run.adapter) == recorded


def _evaluate_stage(run: Run, prepared: Prepared, *, workspace: Workspace, store: Store | None) -> None:
    """One scored result per test row and arm; again where the alias has moved since, for that is what is replaced."""
    champion = find_champion(prepared, workspace, store) if store is not None else None
    if run.is_done("evaluate") and (store is None or run.read("evaluate")["champion"] == champion):
        return
    recipe, section = prepared.recipe, prepared.recipe.evaluation
    if store is not None and champion is not None:
        fetch_champion(run, f"{recipe.name}@{champion}", store)
    train = decode_examples((run.examples / "train.jsonl").read_bytes())
    template = fit_template(load_template(prepared.base.folder), train)
    arms = evaluation.build_arms(
        section,
        base=prepared.base.folder,
        artifact=run.adapter,
        is_adapter=not isinstance(recipe.method, FullMethod),
        champion=run.folder / "champion" if champion else None,
    )
    test = decode_examples((run.examples / "test.jsonl").read_bytes())
    prompts = [
        p for arm in arms for p in evaluation.build_prompts(arm, test, section=section, train=train, template=template)
    ]
    how = plan_answering(recipe, weights=read_weight_shapes(prepared.base.folder), machine=read_machine())
    held = "; the base in 4 bits, as trained" if how.four_bit else ""
    workspace.note(f"evaluating {', '.join(a.name for a in arms)} on {len(test)} held-out rows{held}")
    job = evaluation.GenerationJob(
        folder=run.evaluation,
        arms=arms,
        stop_ids=tuple(sorted(template.stop_ids)),
        max_new_tokens=section.max_new_tokens,
        batch=_BATCH,
        precision=recipe.training.precision,
        four_bit=how.four_bit,
        devices=how.devices,
        threads=run.read("prepare")["cores"],
        weights=(prepared.base.digest, run.read("train")["summary"]["adapter_sha256"], champion),
    )
    outputs = evaluation.generate(job, prompts, note=workspace.note)
    results = evaluation.score_outputs(outputs, test, prepared.dataset.card.contract, template=template)
    write_atomic(run.evaluation / "results.jsonl", evaluation.encode_results(results))
    run.finish("evaluate", champion=champion, four_bit=how.four_bit)


def _judge_stage(run: Run, prepared: Prepared) -> None:
    if run.is_done("judge"):
        return
    results = evaluation.decode_results((run.evaluation / "results.jsonl").read_bytes())
    section, splits = prepared.recipe.evaluation, prepared.splits
    copies = {splits.test[place].id for place in find_near_copies(splits.test, splits.train)}
    verdict = evaluation.judge(results, metric=section.metric, gates=section.gates, copies=copies)
    write_atomic(run.evaluation / "verdict.json", canonical_json(verdict.to_json()))
    run.finish("judge", verdict=verdict.to_json())


def _card_stage(run: Run, prepared: Prepared) -> None:
    record, recipe = run.read("prepare"), prepared.recipe
    if run.is_done("card") and run.read("card")["commit"] == record["commit"]:
        return
    metrics = [json.loads(line) for line in (run.training / "metrics.jsonl").read_bytes().splitlines()]
    card = report.build_card(
        recipe=recipe,
        run_key=run.key,
        git_commit=record["commit"],
        created_at=record["time"],
        base=prepared.base.to_json(),
        data=_describe_data(prepared, replayed=record.get("replayed", 0)),
        training={
            **run.read("train")["summary"],
            "trained_tokens": record["plan"]["trained_tokens"],
            **{k: record[k] for k in ("rows", "thinking", "masks")},
            "switch": record.get("switch", ""),
        },
        metrics=metrics,
        evaluation={"four_bit": run.read("evaluate").get("four_bit", False)},
        verdict=run.read("judge")["verdict"],
        versions=release.name_versions(run),
    )
    report.write_card(card, run.card)
    run.finish("card", commit=record["commit"])


def _describe_data(prepared: Prepared, *, replayed: int) -> dict[str, Any]:
    """The dataset as the card tells it, with replayed general rows as a provenance of their own."""
    data = summarise_dataset(prepared.dataset, prepared.splits)
    return data | ({"provenance": {**data["provenance"], "general": replayed}} if replayed else {})


def _publish_stage(run: Run, prepared: Prepared, *, workspace: Workspace, store: Store, origin: Origin) -> Finished:
    """Artifact and card as one immutable version; the alias moves only on `ship`."""
    folder = collect_files(run)
    manifest = build_manifest(run, prepared, folder=folder)
    workspace.note(f"publishing {manifest.name} {manifest.version} to {store.url}")
    version = registry.publish(store, manifest=manifest, folder=folder)
    is_new = not run.is_done("publish")
    run.finish("publish", version=version)
    if workspace.mirror is not None:
        training.delete_checkpoints(training.Mirror(workspace.mirror, run.key), note=workspace.note)
    alias, note = promote_by_verdict(
        prepared.recipe, version, manifest, store=store, origin=origin, root=workspace.root, is_new=is_new
    )
    return _describe(run, prepared.recipe, version=version, alias=alias, note=note)


def finish_published(
    recipe: Recipe, version: str, *, key: str, workspace: Workspace, store: Store, origin: Origin
) -> Finished:
    """The version is there; make sure that its promotion was not lost between two steps."""
    manifest = registry.load_manifest(store, recipe.name, version)
    alias, note = promote_by_verdict(recipe, version, manifest, store=store, origin=origin, root=workspace.root)
    return Finished(
        name=recipe.name,
        key=key,
        folder=None,
        outcome=manifest.verdict,
        reasons=(),
        version=version,
        alias=alias,
        was_done=True,
        note=note,
    )


def _describe(run: Run, recipe: Recipe, *, version: str, alias: str = "", note: str = "") -> Finished:
    verdict: dict[str, Any] = run.read("judge")["verdict"] if run.is_done("judge") else {"outcome": "", "reasons": []}
    return Finished(
        name=recipe.name,
        key=run.key,
        folder=run.folder,
        outcome=verdict["outcome"],
        reasons=report.say_reasons(verdict["reasons"]),
        version=version,
        alias=alias,
        was_done=False,
        note=note,
    )
