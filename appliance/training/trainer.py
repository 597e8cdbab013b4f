"""The training child's work, in order: one page from token rows to a verified adapter.

TRL and PEFT do the training. What is added: the LM head on trained positions only, packing without
padding, checkpoints that are sealed, a stop at the end of a step, and refusals: of a loss that is
not finite, of packed rows that see each other, of an adapter that changes nothing.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, set_seed
from transformers.trainer_utils import align_special_tokens
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from appliance.child import Emit, StopFlag
from appliance.digest import canonical_json, write_atomic
from appliance.errors import DeviceError, InterruptedRunError
from appliance.model import TokenRow
from appliance.model.weights import Precision, select_device, select_precision
from appliance.training.arguments import build_training_arguments, count_steps
from appliance.training.artifact import build_summary, load_kept_weights, save_artifact
from appliance.training.batches import build_records, collate_packed, collate_padded
from appliance.training.checkpoints import count_steps_done, find_checkpoint, is_sound
from appliance.training.guards import check_packing, check_trained
from appliance.training.journal import Journal
from appliance.training.launch import TrainingJob
from appliance.training.methods import build_model
from appliance.training.monitor import Rules, build_rules, select_kept_step, watch_records
from appliance.training.rows import load_rows
from appliance.training.validation import score_rows, summarise_scores
from appliance.training.watch import Watch


def run_job(job: TrainingJob, *, stop: StopFlag, emit: Emit) -> None:
    """Train as `job` says and put the artifact at `job.adapter`. Raises `ApplianceError`s only."""
    with _out_of_memory_as_device_error():
        # 1. The machine: device, precision, threads, seeds.
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        device = select_device()
        precision = select_precision(job.training.precision, device=device)
        if job.threads:
            torch.set_num_threads(job.threads)
        set_seed(job.training.seed)

        # 2. The data: token rows whose masks were checked when they were written.
        train_rows = load_rows(job.folder / "train.rows.jsonl")
        validation_rows = load_rows(job.folder / "validation.rows.jsonl")

        # 3. The model, with the method's trainable weights on it.
        emit(note=f"loading {job.base_name} in {precision} on {device.type}")
        model = build_model(job, precision=precision, device=device)
        if job.training.packing:
            check_packing(model, train_rows, precision=precision, device=device)

        # 4. The trainer, from the newest sound checkpoint of this very job.
        fingerprint = {**job.fingerprint, "precision": precision, "device": device.type, "torch": torch.__version__}
        rules = build_rules(job.training, max_steps=count_steps(job.training, rows=len(train_rows)))
        resume, journal = _find_start(job, rules, fingerprint=fingerprint, emit=emit)
        watch = Watch(stop=stop, emit=emit, fingerprint=fingerprint, journal=journal, rules=rules)
        trainer = _build_trainer(job, model, train_rows, validation_rows, precision=precision, watch=watch)
        watch.trainer = trainer
        if resume:
            emit(note=f"resuming from step {count_steps_done(resume)}")
        if stop.is_set:
            raise InterruptedRunError("before the first step")

        # 5. The steps, unless a run that was killed afterwards had stopped by rule.
        began = time.monotonic()
        if watch.seen.is_stopped:
            align_special_tokens(model, trainer.processing_class)  # as `train` does; the configuration is saved
        else:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if trainer.state.global_step < rules.max_steps and not watch.seen.is_stopped:
            raise InterruptedRunError(f"at step {trainer.state.global_step} of {rules.max_steps}, checkpoint saved")

        # 6. The artifact: the weights of the step that is kept, refused when not finite or without effect.
        last = max(r["step"] for r in journal.records)
        kept_step = select_kept_step(watch.seen, rules, last=last)
        if kept_step != trainer.state.global_step:
            load_kept_weights(model, job.checkpoints, step=kept_step)
        check_trained(model, job, train_rows[0], device=device)
        save_artifact(model, job, precision=precision)
        summary = build_summary(
            job, model, journal, seen=watch.seen, rules=rules, kept_step=kept_step, precision=precision, device=device
        )
        summary["child_seconds"] = round(time.monotonic() - began, 1)
        write_atomic(job.folder / "summary.json", canonical_json(summary))


def _find_start(
    job: TrainingJob, rules: Rules, *, fingerprint: dict[str, str], emit: Emit
) -> tuple[Path | None, Journal]:
    """The newest sound checkpoint and the journal up to it; none when the best one before it is lost."""
    resume = find_checkpoint(job.checkpoints, fingerprint=fingerprint)
    journal = Journal(job.folder / "metrics.jsonl", kept=count_steps_done(resume) if resume else 0)
    if resume is None:
        return None, journal
    seen = watch_records(journal.records, rules)
    kept = select_kept_step(seen, rules, last=count_steps_done(resume))
    if is_sound(job.checkpoints / f"checkpoint-{kept}"):
        return resume, journal
    emit(note=f"the checkpoint of the best step, {kept}, is lost or damaged: training starts over")
    shutil.rmtree(job.checkpoints)
    return None, Journal(journal.file, kept=0)


class _LabelledPositionsTrainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the model's own loss over the positions that the collator kept.

    TRL asks for this override: its fused head scores every position on a CPU.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.model.training:
            mask = inputs.get("attention_mask")
            self.tokens_seen += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def evaluate(self, *_arguments: Any, **_options: Any) -> dict[str, float]:
        """One pass over the validation rows, see `validation`; TRL's averages over batches."""
        size = self.args.per_device_eval_batch_size
        scores = score_rows(self.model, self.eval_dataset.to_list(), collate=self.data_collator, size=size)
        metrics = summarise_scores(scores)
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _build_trainer(
    job: TrainingJob,
    model: Any,
    train_rows: tuple[TokenRow, ...],
    validation_rows: tuple[TokenRow, ...],
    *,
    precision: Precision,
    watch: Watch,
) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(job.base, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: padding is masked by length, not by id
    arguments = build_training_arguments(
        job.training,
        method=job.method,
        rows=len(train_rows),
        has_validation=bool(validation_rows),
        micro_batch=job.micro_batch,
        bf16=precision == "bf16",
        on_cpu=model.device.type == "cpu",
        checkpointing=job.checkpointing,
        output=job.checkpoints,
    )
    trainer = _LabelledPositionsTrainer(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(build_records(train_rows)),
        eval_dataset=Dataset.from_list(build_records(validation_rows)) if validation_rows else None,
        data_collator=collate_packed
        if job.training.packing
        else partial(collate_padded, pad_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is the parent's channel
    trainer.tokens_seen = 0
    return trainer


@contextmanager
def _out_of_memory_as_device_error() -> Iterator[None]:
    """Torch says out of memory in two ways; both mean: try again with a smaller micro-batch."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as fault:
        raise DeviceError(str(fault).splitlines()[0] if str(fault) else "out of memory") from fault
    except RuntimeError as fault:
        if "can't allocate memory" in str(fault) or "not enough memory" in str(fault):
            raise DeviceError(str(fault).splitlines()[0]) from fault
        raise
