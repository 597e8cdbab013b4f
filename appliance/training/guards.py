"""Refusals that need the live model: rows that see each other, weights not finite, an adapter without effect."""

from __future__ import annotations

import math
from typing import Any

import torch

from appliance.errors import TrainingError
from appliance.method import FullMethod
from appliance.model import TokenRow
from appliance.model.weights import Precision, compute_as_trained
from appliance.training.batches import build_records, collate_packed
from appliance.training.launch import TrainingJob
from appliance.training.levers import Prefix
from appliance.training.methods import Weights, without_training

_PARITY = {"bf16": 0.05, "fp32": 1e-3}
_LEAK = {"bf16": 1e-2, "fp32": 1e-5}
_LOOKED_AT = 16


def check_base(model: Any, row: TokenRow, *, precision: Precision, device: torch.device) -> None:
    """The base's loss on a row is finite: what starts as NaN can only stay NaN."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.eval()
    loss = _mean_loss(base, build_records([row]), precision, device=device, alone=True)
    base.train()
    if not math.isfinite(loss):
        raise TrainingError(
            f"base model: its loss on row {row.id} is {loss}, with finite weights; set training.precision: fp32, "
            "or use another base model"
        )


def check_packing(
    model: Any, rows: tuple[TokenRow, ...], *, prefix: Prefix, precision: Precision, device: torch.device
) -> None:
    """Packed rows must not see each other: packed loss == loss of each row alone, by standard attention."""
    records = build_records(rows[:4])
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    used = base.config._attn_implementation  # noqa: SLF001 - transformers has a setter and no getter
    model.eval()
    try:
        packed = _mean_loss(model, records, precision, device=device, prefix=prefix)
        base.set_attn_implementation("sdpa")
        losses = [(_mean_loss(model, [r], precision, device=device, alone=True), _count_trained(r)) for r in records]
        base.set_attn_implementation(used)
        leak = _measure_leak(model, records, precision, device=device, prefix=prefix)
    except (ValueError, TypeError, IndexError) as fault:
        raise TrainingError(f"this model cannot train packed rows ({fault}); set training.packing: false") from fault
    finally:
        base.set_attn_implementation(used)
        model.train()
    alone = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    if not abs(packed - alone) <= _PARITY[precision] * max(1.0, alone):
        raise TrainingError(
            f"packed loss {packed:.4f} is not the loss of the rows alone, {alone:.4f}: rows would see each other; "
            "set training.packing: false"
        )
    if leak > _LEAK[precision]:
        raise TrainingError(
            f"the logits of a packed row move by {leak:.1%} of their spread when another row changes: "
            "rows see each other; set training.packing: false"
        )


def _measure_leak(
    model: Any, records: list[dict[str, Any]], precision: Precision, *, device: torch.device, prefix: Prefix
) -> float:
    """How far the last row's logits move when every other row's tokens change, by their standard deviation.

    A loss can hide it: a model that has learnt nothing says the same whatever it sees. The last few
    positions show it; all of them would cost memory with a large vocabulary. They are in the answer,
    which is never shared; the prefix is shared in one of the two batches, and must not matter.
    """
    *others, last = records
    start = min(_LOOKED_AT, len(last["input_ids"]) - last["spans"][0][0] + 1)
    logits = []
    for shift in (0, 1):
        moved = [{**r, "input_ids": r["input_ids"][shift:] + r["input_ids"][:shift]} for r in others]
        batch = collate_packed([*moved, last], prefix=prefix)
        kept = {k: v for k, v in _move(batch, device).items() if k not in ("labels", "shift_labels")}
        kept["logits_to_keep"] = start
        with torch.no_grad(), compute_as_trained(precision, device=device):
            logits.append(model(**kept, use_cache=False).logits[0, -start:].float())
    return float((logits[0] - logits[1]).abs().max() / logits[0].std().clamp(min=1e-9))


def _move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def _mean_loss(
    model: Any,
    records: list[dict[str, Any]],
    precision: Precision,
    *,
    device: torch.device,
    prefix: Prefix = "standard",
    alone: bool = False,
) -> float:
    batch = _move(collate_packed(records, prefix=prefix), device)
    if alone:
        batch = {k: v for k, v in batch.items() if k not in ("cu_seq_lens_q", "max_length_q")}
    with torch.no_grad(), compute_as_trained(precision, device=device):
        return float(model(**batch, use_cache=False).loss)


def _count_trained(record: dict[str, Any]) -> int:
    return sum(end - start for start, end in record["spans"])


def check_trained(model: Any, job: TrainingJob, row: TokenRow, *, start: Weights, device: torch.device) -> None:
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
        with without_training(model, start):
            plain = model(input_ids=ids, logits_to_keep=1).logits
    if torch.equal(tuned, plain):
        raise TrainingError("the adapter changes no logit; raise training.learning_rate or training.epochs")
