"""The training child's work, in order: one page from token rows to a verified adapter.

TRL and PEFT do the training. What is added: the LM head on trained positions only, packing without
padding, checkpoints that are sealed, a stop at the end of a step, and refusals: of a loss that is
not finite, of packed rows that see each other, of an adapter that changes nothing.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from appliance.child import Emit, StopFlag
from appliance.digest import canonical_json, digest_folder, fsync_folder, write_atomic
from appliance.errors import DeviceError, InterruptedRunError, TrainingError
from appliance.model import TokenRow
from appliance.model.weights import Precision, load_model, select_device, select_precision
from appliance.recipe import FullMethod, QloraMethod
from appliance.training import attention
from appliance.training.arguments import build_adapter_arguments, build_training_arguments, select_learning_rate
from appliance.training.batches import build_records, collate_packed, collate_padded
from appliance.training.checkpoints import count_steps_done, find_checkpoint, seal_checkpoint
from appliance.training.launch import TrainingJob
from appliance.training.rows import load_rows

_PARITY = {"bf16": 0.05, "fp32": 1e-3}
_DIVERGED = 3.0
_PATIENCE = 5


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
        model = _build_model(job, precision=precision, device=device)
        if job.training.packing:
            _check_packing(model, train_rows, precision=precision, device=device)

        # 4. The trainer, from the newest sound checkpoint of this very job.
        fingerprint = {**job.fingerprint, "precision": precision, "device": device.type, "torch": torch.__version__}
        resume = find_checkpoint(job.checkpoints, fingerprint=fingerprint)
        journal = _Journal(job.folder / "metrics.jsonl", kept=count_steps_done(resume) if resume else 0)
        watch = _Watch(stop=stop, emit=emit, fingerprint=fingerprint, journal=journal)
        trainer = _build_trainer(job, model, train_rows, validation_rows, precision=precision, watch=watch)
        watch.trainer = trainer
        if resume:
            emit(note=f"resuming from step {count_steps_done(resume)}")
        if stop.is_set:
            raise InterruptedRunError("before the first step")

        # 5. The steps.
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if trainer.state.global_step < trainer.args.max_steps:
            raise InterruptedRunError(
                f"at step {trainer.state.global_step} of {trainer.args.max_steps}, checkpoint saved"
            )

        # 6. The artifact, refused when it is not finite or changes nothing.
        _check_trained(model, job, train_rows[0], device=device)
        _save_artifact(model, job, precision=precision)
        summary = _summarise(job, model, journal, trainer, precision=precision, device=device)
        summary["child_seconds"] = round(time.monotonic() - began, 1)
        write_atomic(job.folder / "summary.json", canonical_json(summary))


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


class _Journal:
    """`metrics.jsonl`: one line per logged step; steps after a resumed checkpoint are forgotten."""

    def __init__(self, file: Path, *, kept: int) -> None:
        self.file = file
        lines = file.read_bytes().splitlines() if file.is_file() else []
        self.records = [r for r in map(_parse, lines) if r and r["step"] <= kept]
        write_atomic(file, b"".join(canonical_json(r) + b"\n" for r in self.records))
        self.seconds_before = max((r.get("seconds", 0.0) for r in self.records), default=0.0)
        self.tokens_before = max((r.get("tokens", 0) for r in self.records), default=0)

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.file.open("ab") as stream:
            stream.write(canonical_json(record) + b"\n")


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Journals every step, seals every checkpoint, stops on a signal, refuses a loss gone wrong."""

    def __init__(self, *, stop: StopFlag, emit: Emit, fingerprint: dict[str, str], journal: _Journal) -> None:
        self.stop, self.emit, self.fingerprint, self.journal = stop, emit, fingerprint, journal
        self.trainer: Any = None
        self._began = time.monotonic()
        self._first: float | None = next((r["loss"] for r in journal.records if "loss" in r), None)
        self._bad = 0
        self._validation: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        if self.stop.is_set:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", fingerprint=self.fingerprint)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_rest: Any) -> None:
        if "eval_loss" in logs:
            self._validation = float(logs["eval_loss"])
            self.journal.add(
                {"step": state.global_step, "epoch": round(state.epoch, 4), "validation_loss": self._validation}
            )
        elif "loss" in logs:
            self._log_step(state, logs)

    def _log_step(self, state: Any, logs: dict[str, Any]) -> None:
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        self._refuse_divergence(state.global_step, loss=loss, norm=norm)
        spent = time.monotonic() - self._began
        record = {
            "step": state.global_step,
            "epoch": round(state.epoch, 4),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": float(logs["learning_rate"]),
            "tokens": self.journal.tokens_before + self.trainer.tokens_seen,
            "tokens_per_second": round(self.trainer.tokens_seen / max(spent, 1e-9), 1),
            "seconds": round(self.journal.seconds_before + spent, 2),
        }
        self.journal.add(record)
        self.emit(**record, max_steps=state.max_steps, validation_loss=self._validation)

    def _refuse_divergence(self, step: int, *, loss: float, norm: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm}: not finite; lower training.learning_rate"
            )
        self._first = loss if self._first is None else self._first
        self._bad = self._bad + 1 if loss > max(_DIVERGED * self._first, self._first + 2.0) else 0
        if self._bad >= _PATIENCE:
            raise TrainingError(
                f"step {step}: loss {loss:.2f} stays above {_DIVERGED:.0f} times its first value {self._first:.2f}: "
                "training diverged; lower training.learning_rate"
            )


def _build_model(job: TrainingJob, *, precision: Precision, device: torch.device) -> Any:
    attention.register()
    method = job.method
    model = load_model(
        job.base,
        precision="fp32" if isinstance(method, FullMethod) else precision,  # master weights, computed under autocast
        device=device,
        four_bit=isinstance(method, QloraMethod),
        attention=attention.NAME if job.training.packing else "sdpa",
    )
    if isinstance(method, FullMethod):
        return model
    try:
        return get_peft_model(model, LoraConfig(**build_adapter_arguments(method)))
    except ValueError as fault:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise TrainingError(f"method.targets: {fault}; linear layers of this model: {', '.join(names)}") from fault


def _check_packing(model: Any, rows: tuple[TokenRow, ...], *, precision: Precision, device: torch.device) -> None:
    """Packed rows must not see each other: packed loss == loss of each row alone, by standard attention."""
    records = build_records(rows[:4])
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    model.eval()
    try:
        packed = _mean_loss(model, records, device=device)
        base.set_attn_implementation("sdpa")
        losses = [(_mean_loss(model, [r], device=device, alone=True), _count_trained(r)) for r in records]
    except (ValueError, TypeError) as fault:
        raise TrainingError(f"this model cannot train packed rows ({fault}); set training.packing: false") from fault
    finally:
        base.set_attn_implementation(attention.NAME)
        model.train()
    alone = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    if not abs(packed - alone) <= _PARITY[precision] * max(1.0, alone):
        raise TrainingError(
            f"packed loss {packed:.4f} is not the loss of the rows alone, {alone:.4f}: rows would see each other; "
            "set training.packing: false"
        )


def _mean_loss(model: Any, records: list[dict[str, Any]], *, device: torch.device, alone: bool = False) -> float:
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in collate_packed(records).items()}
    if alone:
        batch = {k: v for k, v in batch.items() if k not in ("cu_seq_lens_q", "max_length_q")}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        return float(model(**batch, use_cache=False).loss)


def _count_trained(record: dict[str, Any]) -> int:
    return sum(end - start for start, end in record["spans"])


def _build_trainer(
    job: TrainingJob,
    model: Any,
    train_rows: tuple[TokenRow, ...],
    validation_rows: tuple[TokenRow, ...],
    *,
    precision: Precision,
    watch: _Watch,
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


def _check_trained(model: Any, job: TrainingJob, row: TokenRow, *, device: torch.device) -> None:
    """Every trained tensor is finite, and the adapter changes the logits."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(weight).all()):
            raise TrainingError(f"{name}: not finite after training; lower training.learning_rate")
    if isinstance(job.method, FullMethod):
        return
    model.eval()
    ids = torch.tensor([row.input_ids], device=device)
    with torch.no_grad():
        tuned = model(input_ids=ids, logits_to_keep=1).logits
        with model.disable_adapter():
            plain = model(input_ids=ids, logits_to_keep=1).logits
    if torch.equal(tuned, plain):
        raise TrainingError("the adapter changes no logit; raise training.learning_rate or training.epochs")


def _save_artifact(model: Any, job: TrainingJob, *, precision: Precision) -> None:
    """Write the adapter (or the full model) beside its place, then rename: equal weights, equal bytes."""
    staged = job.adapter.with_name(f".{job.adapter.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    if isinstance(job.method, FullMethod):
        model.to(torch.bfloat16 if precision == "bf16" else torch.float32).save_pretrained(staged)
        AutoTokenizer.from_pretrained(job.base, local_files_only=True).save_pretrained(staged)
    else:
        model.save_pretrained(staged)
        (staged / "README.md").unlink(missing_ok=True)  # the card takes its place
        _normalise_config(staged / "adapter_config.json", base_name=job.base_name)
    for file in staged.iterdir():
        file.chmod(0o644)  # safetensors writes 0600
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    shutil.rmtree(job.adapter, ignore_errors=True)
    staged.rename(job.adapter)
    fsync_folder(job.adapter.parent)


def _normalise_config(file: Path, *, base_name: str) -> None:
    """No path of this machine, and sets in one order, so that equal adapters have equal digests."""
    config = json.loads(file.read_text("utf-8"))
    config["base_model_name_or_path"] = base_name
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            config[key] = sorted(value)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _summarise(
    job: TrainingJob, model: Any, journal: _Journal, trainer: Any, *, precision: Precision, device: torch.device
) -> dict[str, Any]:
    """What the manifest and the card record of the training."""
    losses = [r["loss"] for r in journal.records if "loss" in r]
    validations = [r["validation_loss"] for r in journal.records if "validation_loss" in r]
    last = max((r for r in journal.records if "loss" in r), key=lambda r: r["step"])
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    gc.collect()
    return {
        "steps": trainer.state.global_step,
        "max_steps": trainer.args.max_steps,
        "epochs": job.training.epochs,
        "seconds": last["seconds"],
        "tokens": last["tokens"],
        "tokens_per_second": round(last["tokens"] / max(last["seconds"], 1e-9), 1),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "best_validation_loss": min(validations, default=None),
        "last_validation_loss": validations[-1] if validations else None,
        "trainable_parameters": sum(n for n, trained in counts if trained),
        "total_parameters": sum(n for n, _ in counts),
        "micro_batch": job.micro_batch,
        "effective_batch": job.training.effective_batch,
        "learning_rate": select_learning_rate(job.training, job.method),
        "dtype": precision,
        "device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "attention": attention.NAME if job.training.packing else "sdpa",
        "packing": job.training.packing,
        "peak_memory_bytes": _peak_memory(device),
        "adapter_sha256": digest_folder(job.adapter),
    }


def _peak_memory(device: torch.device) -> int:
    """Device bytes on CUDA, else the largest resident set of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def _parse(line: bytes) -> dict[str, Any] | None:
    """One journal line, or `None` for a torn one."""
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return record
