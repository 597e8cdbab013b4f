"""TRL's trainer, with what the product adds to a step: the head, the validation pass, exact saving and loading."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback
from transformers.trainer_utils import align_special_tokens
from trl import SFTConfig, SFTTrainer

from appliance.model import TokenRow, load_template
from appliance.model.weights import Precision, keeping_generation
from appliance.training.arguments import build_training_arguments
from appliance.training.artifact import load_parts
from appliance.training.batches import (
    LEAST_SHARED,
    build_records,
    collate_packed,
    collate_padded,
    count_computed_tokens,
    count_row_tokens,
    drop_places,
    spread_labels,
)
from appliance.training.checkpoints import count_steps_done
from appliance.training.ewc import Penalty
from appliance.training.fused import fuse_lora
from appliance.training.head import lighten_loss, scoring_only
from appliance.training.launch import TrainingJob
from appliance.training.levers import Levers
from appliance.training.methods import compile_layers, keep_dtypes, keep_router, load_encoder, save_encoder
from appliance.training.ranks import Ranks
from appliance.training.sharding import gather_weights, is_trained_in_parts, share_optimizer
from appliance.training.validation import RowScore, score_rows, summarise_scores
from appliance.training.watch import Watch

_UNTRAINED_ROWS = 16  # from all over the data


def build_trainer(
    job: TrainingJob,
    model: Any,
    rows: tuple[tuple[TokenRow, ...], tuple[TokenRow, ...]],
    *,
    precision: Precision,
    levers: Levers,
    penalty: Penalty | None,
    watch: Watch,
    ranks: Ranks,
) -> Any:
    """The trainer of `job` over (train, validation) token rows."""
    train_rows, validation_rows = rows
    tokenizer = AutoTokenizer.from_pretrained(job.base, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or _name_stop(job, tokenizer)  # padding is masked by length, not id
    arguments = build_training_arguments(
        job.training,
        method=job.method,
        rows=len(train_rows),
        has_validation=bool(validation_rows),
        micro_batch=job.micro_batch,
        devices=job.devices,
        bf16=precision == "bf16",
        on_cpu=model.device.type == "cpu",
        checkpointing=job.checkpointing,
        output=job.checkpoints,
    )
    packed = levers.rows == "packed"
    is_rounded = model.device.type == "cpu" and levers.prefix == "shared"  # so nothing counts or draws by position
    pack = partial(collate_packed, sizes="rounded" if is_rounded else "exact")
    least = 0.0 if model.device.type == "cpu" else LEAST_SHARED
    collate_apart = pack if packed else partial(collate_padded, pad_id=tokenizer.pad_token_id)
    if levers.lora == "fused":
        fuse_lora(model)
    if levers.head == "labelled":
        lighten_loss(model)
    if levers.compile:
        compile_layers(model)
    with keep_dtypes(model), keep_router(model):
        trainer = _Trainer(
            model=model,
            args=SFTConfig(**arguments),
            train_dataset=Dataset.from_list(build_records(train_rows)),
            eval_dataset=Dataset.from_list(build_records(validation_rows)) if validation_rows else None,
            data_collator=Share(partial(pack, prefix=levers.prefix, least=least) if packed else collate_apart, ranks),
            processing_class=tokenizer,
            callbacks=[watch],
        )
    align_special_tokens(model, tokenizer)  # as `train` does: it is in the saved configuration, steps or not
    trainer.remove_callback(PrinterCallback)  # standard output is the parent's channel
    trainer.head, trainer.penalty, trainer.ranks, trainer.is_sharded = levers.head, penalty, ranks, job.sharded
    trainer.is_compiled = levers.compile
    trainer.shortest = build_records([min(train_rows, key=lambda r: len(r.input_ids))])[0]
    trainer.collate_apart = collate_apart  # the most that rows can take: nothing shared
    trainer.tokens_seen, trainer.tokens_computed, trainer.saves, trainer.save_seconds = 0, 0, 0, 0.0
    trainer.own_loss, trainer.parts = 0.0, 0
    watch.trainer = trainer
    return trainer


def _name_stop(job: TrainingJob, tokenizer: Any) -> str:
    """What ends generation, for a tokenizer that does not say which token does."""
    token: str = tokenizer.convert_ids_to_tokens(min(load_template(job.base).stop_ids))
    return token


def run_steps(trainer: Any, resume: Path | None) -> None:
    """The steps that are left: none after the last, where transformers would take one more."""
    if resume is not None and count_steps_done(resume) >= trainer.args.max_steps:
        trainer.load_last(resume)
        return
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)


def pick_spread(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the rows, as far apart as they can be."""
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


class Share:
    """Collates a rank's share of each micro-batch; an empty batch where it has none. All ranks draw the same rows."""

    def __init__(self, collate: Callable[..., dict[str, Any]], ranks: Ranks) -> None:
        self.collate, self._ranks = collate, ranks
        self._drawn = 0

    def __call__(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The inputs of this rank's rows among `records`."""
        if self._ranks.size == 1:
            return self.collate(records)
        self._drawn = crc32(repr([r["input_ids"] for r in records]).encode(), self._drawn)
        share = self._ranks.take_even_share(records, length=lambda r: len(r["input_ids"]))
        return self.collate(share) if share else {}

    def require_same_rows(self) -> None:
        """Raises `TrainingError` when the ranks did not draw the same rows up to now."""
        if self._ranks.size > 1:
            self._ranks.require_same(self._drawn, "the rows that they drew")


class _Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the head that the lever `head` names.

    TRL asks for the override of the loss: its fused head scores every position on a CPU.
    """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.model.training:
            seen, computed = count_row_tokens(inputs), count_computed_tokens(inputs)
            self.tokens_seen: Any = self.tokens_seen + seen  # not in place: it may be a tensor
            self.tokens_computed: Any = self.tokens_computed + computed
        if self.head == "fused":
            inputs = {**spread_labels(inputs), "fused_lm_head": True}
        elif self.head == "standard" and "logits_to_keep" in inputs:
            inputs = spread_labels(inputs)
            inputs["labels"] = inputs["shift_labels"]
        with self._choose_positions(inputs) as inputs:
            outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _choose_positions(self, inputs: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        """Of a padded batch the positions that the head scores; a packed one names its own."""
        if "label_rows" not in inputs:
            return nullcontext(inputs)
        return nullcontext(drop_places(inputs)) if self.head == "standard" else scoring_only(self.model, inputs)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """The data's loss; with the last micro-batch of a step the ranks' gradients are added up, then the penalty's.

        A rank without rows in this micro-batch has nothing to do, unless others wait for its part of the layers.
        The step's loss is given with its last part.
        """
        self.parts: int = self.parts + 1
        if inputs:
            with self.ranks.draw_own(self.args.seed, self.state.global_step, self.parts):
                self.own_loss: Any = self.own_loss + super().training_step(model, inputs, num_items_in_batch)
        elif self.is_sharded:
            self._accompany(model)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        self.data_collator.require_same_rows()
        self.ranks.add_up_gradients(list(model.parameters()))
        loss = self.ranks.add_up_loss(torch.as_tensor(self.own_loss, device=self.args.device))
        self.own_loss, self.parts = 0.0, 0
        penalty: Penalty | None = self.penalty
        if penalty is not None:
            self._metrics["train"]["penalty"].append(penalty.add_gradients())
        return loss

    def _accompany(self, model: Any) -> None:
        """Compute the shortest row for nothing, as the other ranks compute theirs: they need this one's layers."""
        seen, computed = self.tokens_seen, self.tokens_computed
        inputs = self._prepare_inputs(self.data_collator.collate([self.shortest]))
        with self.compute_loss_context_manager(), self.ranks.draw_own(self.args.seed, self.state.global_step):
            self.accelerator.backward(0.0 * self.compute_loss(model, inputs))
        self.tokens_seen, self.tokens_computed = seen, computed

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """Trained positions of the whole step, over all ranks: what its loss is divided by."""
        own = super()._get_num_items_in_batch([b for b in batch_samples if b], device)
        if self.ranks.size == 1:
            return own
        return torch.tensor(self.ranks.add_up(0 if own is None else own), device=device)[0]

    def evaluate(self, *_arguments: Any, **_options: Any) -> dict[str, float]:
        """One pass over the validation rows, see `validation`; TRL's averages over batches."""
        with self.compute_loss_context_manager():
            metrics = summarise_scores(self._score(self.eval_dataset.to_list()))
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure_untrained(self) -> dict[str, float]:
        """`untrained_loss` for the journal: the mean loss of some training rows; nothing where none is finite.

        A row counts as one, so that a few long answers do not tell for all.
        """
        rows = self.train_dataset.to_list()
        with self.compute_loss_context_manager():
            losses = [s.loss / s.tokens for s in self._score(pick_spread(rows, _UNTRAINED_ROWS))]
        finite = [loss for loss in losses if math.isfinite(loss)]
        return {"untrained_loss": sum(finite) / len(finite)} if finite else {}

    def _score(self, records: Sequence[dict[str, Any]]) -> list[RowScore]:
        """A score per record, each rank computing its share of them."""
        share, size = self.ranks.take_filled_share(records), self.args.per_device_eval_batch_size
        scores = score_rows(self.model, share, collate=self.data_collator.collate, size=size)
        gathered: list[RowScore] = self.ranks.gather(scores)[: len(records)]
        return gathered

    def load_last(self, checkpoint: Path) -> None:
        """The weights of the last step, for a run that was killed after it."""
        self._load_from_checkpoint(str(checkpoint))
        self.state.global_step = count_steps_done(checkpoint)

    def create_optimizer(self, model: Any = None) -> Any:
        """TRL's; where each rank trains its part, it saves and loads the whole of its state."""
        optimizer = super().create_optimizer(model)
        if is_trained_in_parts(self.model):
            share_optimizer(optimizer, keeps=self.ranks.is_lead)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        with keeping_generation(self.model, folder):
            super()._save(output_dir, gather_weights(self.model, keeps=True) or state_dict)
        save_encoder(self.model, folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The first rank writes; where each trains its part, the others bring theirs in the order it asks for them."""
        if not self.ranks.is_lead:
            if gather_weights(self.model, keeps=False) is not None:
                self.optimizer.state_dict()
            return
        began = time.monotonic()
        super()._save_checkpoint(model, trial)
        self.saves += 1
        self.save_seconds += time.monotonic() - began

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights keep the dtype they are trained in: loading an adapter makes it fp32 (peft#2421)."""
        checkpoint = Path(resume_from_checkpoint)
        if load_encoder(self.model, checkpoint):
            return
        if is_trained_in_parts(self.model):
            self.ranks.one_by_one(lambda: load_parts(self.model, checkpoint))
            return
        dtypes = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():  # asked again: loading may replace them
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """One rank at a time where each keeps its part: the host holds the whole once."""
        load = partial(super()._load_optimizer_and_scheduler, checkpoint)
        if checkpoint is not None and is_trained_in_parts(self.model):
            self.ranks.one_by_one(load)
        else:
            load()
