"""Refusals that need the live model: rows that see each other, weights not finite, an adapter without effect."""

from __future__ import annotations

from typing import Any

import torch

from appliance.errors import TrainingError
from appliance.model import TokenRow
from appliance.model.weights import Precision
from appliance.recipe import FullMethod
from appliance.training.batches import build_records, collate_packed
from appliance.training.launch import TrainingJob
from appliance.training.methods import Weights, without_training

_PARITY = {"bf16": 0.05, "fp32": 1e-3}


def check_packing(model: Any, rows: tuple[TokenRow, ...], *, precision: Precision, device: torch.device) -> None:
    """Packed rows must not see each other: packed loss == loss of each row alone, by standard attention."""
    records = build_records(rows[:4])
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    used = base.config._attn_implementation  # noqa: SLF001 - transformers has a setter and no getter
    model.eval()
    try:
        packed = _mean_loss(model, records, device=device)
        base.set_attn_implementation("sdpa")
        losses = [(_mean_loss(model, [r], device=device, alone=True), _count_trained(r)) for r in records]
    except (ValueError, TypeError) as fault:
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


def _mean_loss(model: Any, records: list[dict[str, Any]], *, device: torch.device, alone: bool = False) -> float:
    batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in collate_packed(records).items()}
    if alone:
        batch = {k: v for k, v in batch.items() if k not in ("cu_seq_lens_q", "max_length_q")}
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
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
