"""The training child's work, in order: one page from token rows to a verified adapter.

TRL and PEFT do the training. What is added: the LM head on trained positions only, packing without
padding, checkpoints that are sealed, a stop at the end of a step, and refusals: of a loss that is
not finite, of packed rows that see each other, of an adapter that changes nothing.
"""

from __future__ import annotations

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
from appliance.training.arguments import build_training_arguments
from appliance.training.artifact import build_summary, save_artifact
from appliance.training.batches import build_records, collate_packed, collate_padded
from appliance.training.checkpoints import Facts, count_steps_done, decode_facts, find_checkpoint, read_seal
from appliance.training.fingerprint import (
    build_fingerprint,
    describe_device,
    make_deterministic,
    make_repeatable,
)
from appliance.training.guards import check_packing, check_trained
from appliance.training.journal import Journal
from appliance.training.launch import TrainingJob
from appliance.training.methods import build_model
from appliance.training.rows import load_rows
from appliance.training.watch import Watch

_NO_MEMORY = (
    "can't allocate memory",  # torch's allocator
    "not enough memory",
    "Cannot allocate memory",  # the kernel, ENOMEM
    "failed to map segment",  # the same while a library is loaded
    "bad_alloc",
    "could not create a memory",  # oneDNN
    "could not create a primitive",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


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
        make_deterministic(device)
        set_seed(job.training.seed)

        # 2. The data: token rows whose masks were checked when they were written.
        train_rows = load_rows(job.folder / "train.rows.jsonl")
        validation_rows = load_rows(job.folder / "validation.rows.jsonl")

        # 3. The model, with the method's trainable weights on it.
        emit(note=f"loading {job.base_name} in {precision} on {device.type}")
        model = build_model(job, precision=precision, device=device)
        make_repeatable(model)
        if job.training.packing:
            check_packing(model, train_rows, precision=precision, device=device)

        # 4. The trainer, from the newest sound checkpoint of this very job.
        fingerprint = build_fingerprint(job, precision=precision, device=device)
        resume = find_checkpoint(job.checkpoints, fingerprint=fingerprint)
        journal = Journal(job.folder / "metrics.jsonl", checkpoint=resume)
        facts = _state_facts(job, resume)
        watch = Watch(stop=stop, emit=emit, fingerprint=fingerprint, facts=facts, journal=journal)
        trainer = _build_trainer(job, model, train_rows, validation_rows, precision=precision, watch=watch)
        watch.trainer = trainer
        if resume:
            emit(note=f"resuming from step {count_steps_done(resume)}")
        if stop.is_set:
            raise InterruptedRunError("before the first step")

        # 5. The steps.
        began = time.monotonic()
        _run_steps(trainer, resume)
        if trainer.state.global_step < trainer.args.max_steps:
            raise InterruptedRunError(
                f"at step {trainer.state.global_step} of {trainer.args.max_steps}, checkpoint saved"
            )

        # 6. The artifact, refused when it is not finite or changes nothing.
        check_trained(model, job, train_rows[0], device=device)
        save_artifact(model, job, precision=precision)
        summary = build_summary(job, model, journal, trainer, precision=precision, device=device)
        summary |= {"micro_batches": facts.micro_batches, "checkpointing": job.checkpointing}
        summary["device_kind"] = describe_device(device)
        seconds = trainer.save_seconds + watch.seal_seconds
        summary["checkpoints"] = {"count": trainer.saves, "seconds": round(seconds, 3)}
        summary["child_seconds"] = round(time.monotonic() - began, 1)
        write_atomic(job.folder / "summary.json", canonical_json(summary))


def _state_facts(job: TrainingJob, resume: Path | None) -> Facts:
    seal = read_seal(resume) if resume else None
    if resume is None or seal is None:
        return Facts(threads=torch.get_num_threads(), micro_batches=((0, job.micro_batch),))
    return decode_facts(seal).continue_with(job.micro_batch, step=count_steps_done(resume))


def _run_steps(trainer: Any, resume: Path | None) -> None:
    """The steps that are left: none after the last, where transformers would take one more."""
    if resume is not None and count_steps_done(resume) >= trainer.args.max_steps:
        trainer.load_last(resume)
        return
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)


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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights keep the dtype they are trained in: loading an adapter makes it fp32 (peft#2421)."""
        dtypes = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():  # asked again: loading may replace them
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])

    def load_last(self, checkpoint: Path) -> None:
        """The weights of the last step, for a run that was killed after it."""
        align_special_tokens(self.model, self.processing_class)  # as `train` does; it is in the saved configuration
        self._load_from_checkpoint(str(checkpoint))
        self.state.global_step = count_steps_done(checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.monotonic()
        super()._save_checkpoint(model, trial)
        self.saves += 1
        self.save_seconds += time.monotonic() - began


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
    trainer.tokens_seen, trainer.saves, trainer.save_seconds = 0, 0, 0.0
    return trainer


@contextmanager
def _out_of_memory_as_device_error() -> Iterator[None]:
    """Torch says out of memory in two ways; both mean: try again with a smaller micro-batch."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as fault:
        raise DeviceError(str(fault).splitlines()[0] if str(fault) else "out of memory") from fault
    except (RuntimeError, OSError, ImportError) as fault:
        if any(words in str(fault) for words in _NO_MEMORY):
            raise DeviceError(str(fault).splitlines()[0]) from fault
        raise
