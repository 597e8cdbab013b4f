"""The worst step, done once before the first real one: what would run out of memory at night does so now.

Padded or packed, the longest rows together are the largest batch that training can meet, and validation
likewise. One forward, backward and optimizer step on them, computed as the run will be (autocast,
checkpointing), reserves what the run will need; then every effect is taken back, so that a run with the
proof and one without it are the same, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from appliance.model import TokenRow
from appliance.training.batches import build_records
from appliance.training.validation import score_rows


def prove_worst_step(
    trainer: Any, rows: Sequence[TokenRow], validation_rows: Sequence[TokenRow], *, micro_batch: int
) -> None:
    """Run the largest step of `trainer` at rate zero, and the largest batch of a validation.

    Raises what torch raises when memory is short.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            # autocast: accelerate wraps the model in it, but not before `train`
            longest = build_records(_find_longest(validation_rows, micro_batch))
            score_rows(trainer.model, longest, collate=trainer.collate_apart, size=micro_batch)
        trainer.model.train()
        if trainer.args.gradient_checkpointing:
            _recompute_activations(trainer.model)
        records = build_records(_find_longest(rows, micro_batch))
        inputs = trainer._prepare_inputs(trainer.collate_apart(records))  # noqa: SLF001 - moves them
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        trainer.model.zero_grad(set_to_none=False)  # its memory is what is proven, not its values
        optimizer = trainer.create_optimizer()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
    trainer.optimizer = None
    trainer.model.zero_grad(set_to_none=True)
    trainer.tokens_seen = trainer.tokens_computed = 0


def _find_longest(rows: Sequence[TokenRow], count: int) -> list[TokenRow]:
    return sorted(rows, key=lambda r: len(r.input_ids), reverse=True)[:count]


def _recompute_activations(model: Any) -> None:
    """As `train` will, which comes later; the older name is that of transformers without it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
