"""The training child's work, in order: one page from token rows to a verified adapter.

TRL and PEFT do the training. What is added: the LM head on trained positions only, packing without
padding, checkpoints that are sealed, a stop at the end of a step, and refusals: of a loss that is
not finite, of packed rows that see each other, of an adapter that changes nothing.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from appliance.child import Emit, StopFlag
from appliance.digest import canonical_json, write_atomic
from appliance.errors import InterruptedRunError, TrainingError
from appliance.method import FullMethod, QloraMethod
from appliance.model import TokenRow
from appliance.model.faults import device_faults_as_errors
from appliance.model.weights import Precision, select_device, select_precision
from appliance.recipe import count_steps
from appliance.training import attention
from appliance.training.artifact import build_summary, finish_weights, load_kept_weights, name_device, save_artifact
from appliance.training.checkpoints import (
    Facts,
    count_steps_done,
    decode_facts,
    find_checkpoint,
    is_sound,
    name_checkpoint,
    read_seal,
    remove_checkpoint,
)
from appliance.training.ewc import Penalty, build_penalty
from appliance.training.fingerprint import (
    build_fingerprint,
    describe_device,
    make_deterministic,
    settle_determinism,
)
from appliance.training.guards import can_choose, can_fuse, check_start, check_trained, find_packing_fault
from appliance.training.head import lighten_loss
from appliance.training.journal import Journal, read_records
from appliance.training.launch import TrainingJob
from appliance.training.levers import Levers, pad_rows, select_levers, settle_levers
from appliance.training.loop import build_trainer, run_steps
from appliance.training.methods import Weights, build_model, copy_start, digest_start
from appliance.training.monitor import Rules, build_rules, select_kept_step, watch_records
from appliance.training.proof import prove_worst_step
from appliance.training.ranks import Ranks, join_ranks
from appliance.training.rows import load_rows
from appliance.training.sharding import shard_base, shard_trained
from appliance.training.utilisation import find_yardstick
from appliance.training.watch import Watch


def run_job(job: TrainingJob, *, stop: StopFlag, emit: Emit, rank: int = 0, meeting: Path | None = None) -> None:
    """Train as `job` says and put the artifact at `job.adapter`. Raises `ApplianceError`s only.

    On several devices this is one `rank` of them, which find each other by the file `meeting`.
    """
    with device_faults_as_errors():
        # 1. The machine: device, precision, threads, seeds, and who else works on this job.
        device = _set_up_machine(job)
        precision = select_precision(job.training.precision, device=device)
        ranks = join_ranks(meeting, rank, job.devices, device)

        # 2. The data: token rows whose masks were checked when they were written.
        train_rows, validation_rows = _load_sides(job, emit)

        # 3. The model, with the method's trainable weights on it.
        shared_out = f", shared out among {ranks.size} devices" if job.sharded else ""
        emit(note=f"loading {job.base_name} in {precision} on {device.type}{shared_out}")
        wanted = select_levers(job.training, method=job.method, on_cuda=device.type == "cuda")
        model = _load(job, ranks, levers=wanted, precision=precision, device=device)
        levers = settle_levers(wanted, model)
        settle_determinism(model, train_rows[0], precision=precision, emit=emit)
        levers = _settle_rows(
            job, ranks, model, rows=(*train_rows, *validation_rows), levers=levers, precision=precision, emit=emit
        )
        check_start(model, train_rows[0], method=job.method, levers=levers, precision=precision, device=device)
        penalty = ranks.take_turns(lambda: build_penalty(job, model, precision=precision, emit=emit))

        # 4. The trainer, from the newest sound checkpoint of this very job.
        start = copy_start(model, job.method)
        fingerprint = build_fingerprint(job, precision=precision, device=device)
        fingerprint |= _name_parts(start, penalty, levers)
        rules = build_rules(job.training, max_steps=count_steps(job.training, rows=len(train_rows)))
        resume = ranks.follow_lead(lambda: _find_start(job, rules, fingerprint=fingerprint, emit=emit))
        journal = Journal(job.folder / ranks.name_file("metrics.jsonl"), checkpoint=resume)
        facts = _state_facts(job, resume)
        watch = Watch(
            stop=stop,
            emit=emit,
            fingerprint=fingerprint,
            facts=facts,
            journal=journal,
            rules=rules,
            ranks=ranks,
            yardstick=find_yardstick(
                job.base, method=job.method, device_name=name_device(device), precision=precision, devices=ranks.size
            ),
        )
        sides = (train_rows, validation_rows)
        trainer = build_trainer(
            job, model, sides, precision=precision, levers=levers, penalty=penalty, watch=watch, ranks=ranks
        )
        levers = _settle_head(job, trainer, train_rows, levers=levers, precision=precision)
        if resume:
            emit(note=f"resuming from step {count_steps_done(resume)}")
        else:
            prove_worst_step(trainer, train_rows, validation_rows, micro_batch=job.micro_batch)
        stop.defer()

        # 5. The steps, unless a run that was killed afterwards had stopped by rule.
        began = time.monotonic()
        if not watch.seen.is_stopped:
            run_steps(trainer, resume)
        if trainer.state.global_step < rules.max_steps and not watch.seen.is_stopped:
            raise InterruptedRunError(f"at step {trainer.state.global_step} of {rules.max_steps}, checkpoint saved")

        # 6. The artifact: the weights of the step that is kept, refused when not finite or without effect.
        last = max(r["step"] for r in journal.records)
        kept_step = select_kept_step(watch.seen, rules, last=last)
        if kept_step != trainer.state.global_step:
            ranks.one_by_one(lambda: load_kept_weights(model, job.checkpoints, step=kept_step))
        check_trained(model, job, train_rows[0], start=start, precision=precision, device=device)
        weights = finish_weights(model, job, precision=precision, keeps=ranks.is_lead)
        ranks.part()
        if not ranks.is_lead:
            return
        save_artifact(model, job, start=start, weights=weights)
        summary = build_summary(
            job,
            model,
            journal,
            seen=watch.seen,
            rules=rules,
            kept_step=kept_step,
            levers=levers,
            precision=precision,
            device=device,
        )
        summary |= {
            "micro_batches": facts.micro_batches,
            "devices": ranks.size,
            "sharded": job.sharded,
            "checkpointing": job.checkpointing,
            "checkpointing_since": facts.checkpointing_since,
            "device_kind": describe_device(device),
            "checkpoints": {"count": trainer.saves, "seconds": round(trainer.save_seconds + watch.seal_seconds, 3)},
            "child_seconds": round(time.monotonic() - began, 1),
            **(watch.yardstick.to_json(summary["tokens_computed"] / summary["seconds"]) if watch.yardstick else {}),
        }
        write_atomic(job.folder / "summary.json", canonical_json(summary))


def _set_up_machine(job: TrainingJob) -> torch.device:
    """The device, after threads, seeds and determinism are as the job says."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device = select_device()
    if job.threads:
        torch.set_num_threads(job.threads)
    make_deterministic(device)
    set_seed(job.training.seed)
    return device


def _load_sides(job: TrainingJob, emit: Emit) -> tuple[tuple[TokenRow, ...], tuple[TokenRow, ...]]:
    """Training and validation rows; said where none of the second can choose what the recipe wants kept."""
    train_rows, validation_rows = (load_rows(job.folder / f"{side}.rows.jsonl") for side in ("train", "validation"))
    if job.training.keep == "best_exact_match" and not validation_rows:
        emit(
            note="training.keep: best_exact_match has no validation row to go by, the last step is kept; "
            "raise dataset.split.validation, or add rows"
        )
    return train_rows, validation_rows


def _load(job: TrainingJob, ranks: Ranks, *, levers: Levers, precision: Precision, device: torch.device) -> Any:
    """The model on the device, or this rank's part of it: then one rank after the other has all of it in memory.

    4-bit weights are made on the device that computes with them, so it has room for them whole.
    """
    if not job.sharded:
        return build_model(job, levers=levers, precision=precision, device=device)
    mesh = ranks.build_mesh()
    place = device if isinstance(job.method, QloraMethod) else torch.device("cpu")

    def load() -> Any:
        model = build_model(job, levers=levers, precision=precision, device=place)
        if isinstance(job.method, FullMethod):
            shard_trained(model, mesh, precision=precision, device=device)
        else:
            shard_base(model, mesh, device=device)
        return model

    return ranks.one_by_one(load)


def _settle_rows(
    job: TrainingJob,
    ranks: Ranks,
    model: Any,
    *,
    rows: tuple[TokenRow, ...],
    levers: Levers,
    precision: Precision,
    emit: Emit,
) -> Levers:
    """The levers as this class of model allows: rows padded where it would mix packed ones up, if the recipe says auto.

    And the library's own head where this one, for padded rows, gives another loss.
    """
    device = model.device
    if levers.rows == "packed":
        fault = find_packing_fault(model, rows, prefix=levers.prefix, precision=precision, device=device)
        if not ranks.is_any(bool(fault)):
            return levers
        fault = fault or "another device found rows that see each other"
        if job.training.packing != "auto":
            raise TrainingError(f"{fault}; set training.packing: auto")
        emit(note=f"rows are padded, which is slower: {fault}")
        attention.use_standard(model)
        levers = pad_rows(levers)
    if levers.head == "labelled" and not can_choose(model, rows, precision=precision, device=device):
        return replace(levers, head="standard")
    return levers


def _settle_head(
    job: TrainingJob, trainer: Any, rows: tuple[TokenRow, ...], *, levers: Levers, precision: Precision
) -> Levers:
    """The levers, without the fused head where it does not know what this class does to its logits."""
    if levers.head != "fused" or can_fuse(trainer.model, rows, precision=precision, device=trainer.model.device):
        return levers
    if job.training.speed.head == "fused":
        raise TrainingError(
            "training.speed.head: the fused head gives another loss than this class of model; set it to auto"
        )
    trainer.head = "labelled"
    lighten_loss(trainer.model)
    return replace(levers, head="labelled")


def _name_parts(start: Weights, penalty: Penalty | None, levers: Levers) -> dict[str, str]:
    """What training starts from beside the job: digests of the adapter's first weights and the Fisher; how rows lie."""
    parts = {"rows": levers.rows, **({"start": digest_start(start)} if start else {})}
    return parts if penalty is None else {**parts, "fisher": penalty.fisher_sha256}


def _find_start(job: TrainingJob, rules: Rules, *, fingerprint: dict[str, str], emit: Emit) -> Path | None:
    """The newest sound checkpoint whose best one is sound too; newer ones are removed, steps will be kept by number."""
    lost = False
    while (resume := find_checkpoint(job.checkpoints, fingerprint=fingerprint)) is not None:
        done = count_steps_done(resume)
        kept = select_kept_step(watch_records(read_records(resume), rules), rules, last=done)
        if is_sound(job.checkpoints / name_checkpoint(kept)):
            return resume
        emit(note=f"the checkpoint of step {done} is no start: that of its best step, {kept}, is lost or damaged")
        remove_checkpoint(resume)
        lost = True
    if lost:
        emit(note="no checkpoint is left to go on from: training starts over")
    return None


def _state_facts(job: TrainingJob, resume: Path | None) -> Facts:
    seal = read_seal(resume) if resume else None
    if resume is None or seal is None:
        since = 0 if job.checkpointing else None
        return Facts(torch.get_num_threads(), ((0, job.micro_batch),), checkpointing_since=since)
    done = count_steps_done(resume)
    return decode_facts(seal).continue_with(job.micro_batch, checkpointing=job.checkpointing, step=done)
