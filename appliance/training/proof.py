"""The worst step, done once before the first real one: what would run out of memory at night does so now.

Padded or packed, the longest rows together are the largest batch that training can meet, and validation
likewise. One forward and backward pass on them, computed as the run will be (autocast, checkpointing) and
beside the moments that the run will have by then, reserves what it will need; then every effect is taken
back, so that a run with the proof and one without it are the same, byte for byte. Layers that are compiled
must have the gradients that they have by themselves: a compiler can lose some without a word, as that of
torch 2.11 did.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from appliance.errors import TrainingError
from appliance.model import TokenRow
from appliance.training.batches import build_records
from appliance.training.levers import draws_noise
from appliance.training.sharding import get_local
from appliance.training.validation import score_rows

_COMPILED = 0.2  # of the norms of all gradients; bf16 rounds at other places and moves them by some hundredths


def prove_worst_step(
    trainer: Any, rows: Sequence[TokenRow], validation_rows: Sequence[TokenRow], *, micro_batch: int
) -> None:
    """Run the largest step of `trainer` at rate zero, and the largest batch of a validation.

    Raises what torch raises when memory is short, and `TrainingError` for layers that are compiled wrongly.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            # autocast: accelerate wraps the model in it, but not before `train`
            validated = build_records(_sort_rows(validation_rows)[-micro_batch:])
            score_rows(trainer.model, validated, collate=trainer.collate_apart, size=micro_batch)
        trainer.model.train()
        if trainer.args.gradient_checkpointing:
            _recompute_activations(trainer.model)
        ordered = _sort_rows(rows)
        shortest, longest = build_records(ordered[:micro_batch]), build_records(ordered[-micro_batch:])
        if trainer.is_compiled:
            _check_compiled(trainer, shortest)
        _make_moments(trainer, shortest)
        _compute_gradients(trainer, longest)
    trainer.optimizer = None
    trainer.model.zero_grad(set_to_none=True)
    trainer.tokens_seen = trainer.tokens_computed = 0


def _make_moments(trainer: Any, records: Sequence[dict[str, Any]]) -> None:
    """What every step but the first finds: moments of all that has a gradient, and gradients that are added to."""
    _compute_gradients(trainer, records)
    trainer.model.zero_grad(set_to_none=False)  # their memory is what is proven, not their values
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    if trainer.args.gradient_accumulation_steps == 1:
        trainer.model.zero_grad(set_to_none=True)


def _compute_gradients(trainer: Any, records: Sequence[dict[str, Any]]) -> None:
    """One forward and backward pass over a micro-batch."""
    inputs = trainer._prepare_inputs(trainer.collate_apart(records))  # noqa: SLF001 - moves them
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()


def _check_compiled(trainer: Any, records: Sequence[dict[str, Any]]) -> None:
    """On this micro-batch the trained weights have gradients as large as without the compiler.

    Where a layer draws noise, each way draws its own: then only lost ones are told.
    """
    with torch.compiler.set_stance("force_eager"):
        wanted = _measure_gradients(trainer, records)
    found = _measure_gradients(trainer, records)
    distance = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not distance < (0.9 if draws_noise(trainer.model) else _COMPILED):
        raise TrainingError(
            f"training.speed.compile: torch {torch.__version__} compiles layers of this class to other gradients "
            f"(off by {distance:.0%}); set it to off"
        )


def _measure_gradients(trainer: Any, records: Sequence[dict[str, Any]]) -> torch.Tensor:
    """The norm of each trained weight's gradient."""
    trainer.model.zero_grad(set_to_none=True)
    _compute_gradients(trainer, records)
    gradients = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    norm = partial(torch.linalg.vector_norm, dtype=torch.float32)
    return torch.stack([torch.zeros(()) if g is None else norm(get_local(g)).cpu() for g in gradients])


def _sort_rows(rows: Sequence[TokenRow]) -> list[TokenRow]:
    return sorted(rows, key=lambda r: len(r.input_ids))


def _recompute_activations(model: Any) -> None:
    """As `train` will, which comes later; the older name is that of transformers without it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
