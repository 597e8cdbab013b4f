"""Refusals that need the live model: rows that see each other, weights not finite, an adapter without effect."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch

from appliance.errors import TrainingError
from appliance.method import VIRTUAL_TOKENS, FullMethod, Method
from appliance.model import TokenRow
from appliance.model.faults import MISFITS, name_fault
from appliance.model.weights import Precision, compute_as_trained, read_weights, strip_adapter
from appliance.training import attention
from appliance.training.batches import (
    build_records,
    collate_packed,
    collate_padded,
    drop_places,
    move_batch,
    spread_labels,
)
from appliance.training.head import scoring_only
from appliance.training.launch import TrainingJob
from appliance.training.levers import Levers, Prefix
from appliance.training.methods import Weights, without_training
from appliance.training.sharding import get_local, get_whole

_PARITY = {"bf16": 0.05, "fp32": 1e-3}
# Of logits, as root mean square. Another order of the same sums moved SmolLM2-135M's by 0.05 in bf16 and 0.0000 in
# fp32; a row that saw another one moved them by 0.07 (a word before a long answer) to 0.6.
_DRIFT = {"bf16": 0.2, "fp32": 1e-3}
# Two batches of the same sizes: 0 for every class that keeps rows apart, 0.004 and more for those that do not.
_LEAK = {"bf16": 2e-3, "fp32": 1e-4}
_LOOKED_AT = 8
_COMPARED = 64  # trained positions of a row: all of them would cost memory that nothing proves, see `proof`


def check_start(
    model: Any, row: TokenRow, *, method: Method, levers: Levers, precision: Precision, device: torch.device
) -> None:
    """The base's loss on a row is finite, as what starts as NaN can only stay NaN, and this class takes the method."""
    base = strip_adapter(model)
    records = [_trim_spans(r) for r in build_records([row])]
    padded = move_batch(collate_padded(records, pad_id=0), device)

    def measure(computed: Any) -> float:
        if levers.rows == "packed":
            return _mean_loss(computed, records, precision, device=device, alone=True)
        if levers.head == "standard":
            return _compute_loss(computed, drop_places(padded), precision, device=device)
        with scoring_only(computed, padded) as chosen:
            return _compute_loss(computed, chosen, precision, device=device)

    model.eval()
    loss = measure(base)
    if not math.isfinite(loss):
        raise TrainingError(
            f"base model: its loss on row {row.id} is {loss}, with finite weights; set training.precision: fp32, "
            "or use another base model"
        )
    if isinstance(method, VIRTUAL_TOKENS) and any(hasattr(part, "rope_deltas") for part in base.modules()):
        raise TrainingError(
            f"method: {type(base).__name__} cannot be trained with {method.type} (it keeps positions from one call to "
            "the next, and virtual tokens move them); use lora, or full"
        )
    try:
        measure(model)
    except MISFITS as fault:
        if name_fault(fault) != "other":
            raise
        raise TrainingError(
            f"method: {type(base).__name__} cannot be trained with {method.type} ({_take_first_line(fault)}); "
            "use lora, or full"
        ) from fault
    model.train()


def can_choose(model: Any, rows: Sequence[TokenRow], *, precision: Precision, device: torch.device) -> bool:
    """Whether this class gives padded rows the same loss where its head scores trained positions alone."""
    batch = move_batch(collate_padded([_shorten(r) for r in build_records(rows[:2])], pad_id=0), device)

    def compare() -> tuple[float, float]:
        with scoring_only(model, batch) as chosen:
            loss = _compute_loss(model, chosen, precision, device=device)
        return loss, _compute_loss(model, drop_places(batch), precision, device=device)

    return _are_equal(model, compare, precision)


def can_fuse(model: Any, rows: Sequence[TokenRow], *, precision: Precision, device: torch.device) -> bool:
    """Whether TRL's fused head, which `model` has, gives packed rows the loss of the model's own head.

    It computes logits past the class, and has to know all that the class does to them.
    """
    batch = collate_packed([_trim_spans(r) for r in build_records(rows[:2])])

    def compare() -> tuple[float, float]:
        fused = {**spread_labels(batch), "fused_lm_head": True}
        losses = (_compute_loss(model, b, precision, device=device) for b in (fused, batch))
        return next(losses), next(losses)

    return _are_equal(model, compare, precision)


def _shorten(record: dict[str, Any]) -> dict[str, Any]:
    """A few tokens of a row, the second half of them as if it was trained: all that a comparison of losses needs."""
    ids = record["input_ids"][:_COMPARED]
    return {"input_ids": ids, "spans": [[(len(ids) + 1) // 2, len(ids)]]}


def _are_equal(model: Any, compare: Callable[[], tuple[float, float]], precision: Precision) -> bool:
    """Whether two losses are one, in evaluation mode; not where one of them cannot be computed."""
    model.eval()
    try:
        loss, expected = compare()
    except MISFITS as fault:
        if name_fault(fault) != "other":
            raise
        return False
    finally:
        model.train()
    return abs(loss - expected) <= _PARITY[precision] * max(1.0, expected)


def find_packing_fault(
    model: Any, rows: Sequence[TokenRow], *, prefix: Prefix, precision: Precision, device: torch.device
) -> str:
    """Why these rows must not be packed, empty where they may: packed loss == loss of each alone, standard attention.

    Three rows and the longest of all: what a model does beyond a length of its own (windows, chunks) is seen
    there or nowhere.
    """
    longest = max(rows, key=lambda r: len(r.input_ids))
    records = build_records([*[r for r in rows[:4] if r is not longest][:3], longest])
    base = strip_adapter(model)
    used = attention.name_used(base)
    model.eval()
    try:
        packed = _mean_loss(model, records, precision, device=device, prefix=prefix)
        both = (records, _change_others(records))
        places = _choose_places(records, prefix)
        beside = [_look_at_last(model, r, precision, places=places, device=device, prefix=prefix) for r in both]
        attention.use_standard(base)
        losses = [(_mean_loss(model, [r], precision, device=device, alone=True), _count_trained(r)) for r in records]
        by_itself = _look_at_last(model, records[-1:], precision, places=places, device=device, alone=True)
    except MISFITS as fault:
        if name_fault(fault) != "other":
            raise
        return f"this class of model cannot train packed rows ({_take_first_line(fault)})"
    finally:
        base.set_attn_implementation(used)
        model.train()
    alone = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    if not math.isfinite(alone):
        return ""  # a fault of the base, see `check_start`
    if not abs(packed - alone) <= _PARITY[precision] * max(1.0, alone):
        return f"packed loss {packed:.4f} is not the loss of the rows alone, {alone:.4f}: rows would see each other"
    if (drift := _measure_distance(beside[0], by_itself)) > _DRIFT[precision]:
        return (
            f"the logits of a packed row are {drift:.1%} of their spread from those of the row alone: rows would see "
            "each other, or more than they do alone"
        )
    if (leak := _measure_distance(*beside)) > _LEAK[precision]:
        return (
            f"the logits of a packed row move by {leak:.1%} of their spread when another row changes: "
            "rows see each other"
        )
    return ""


def _take_first_line(fault: BaseException) -> str:
    return (str(fault).strip().splitlines() or [type(fault).__name__])[0]


def _change_others(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records with other tokens in all rows but the last, behind what they begin with as that one does.

    Each token becomes the same other one everywhere, so that the rows share with one another what they shared:
    a batch of another size adds up in another order.
    """
    *others, last = (r["input_ids"] for r in records)
    known = sorted({token for ids in others for token in ids})
    other = dict(zip(known, [*known[1:], *known[:1]], strict=True))

    def change(ids: list[int]) -> list[int]:
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids, last, strict=False)))
        return [*ids[:alike], *(other[t] for t in ids[alike:])]

    return [*({**r, "input_ids": change(i)} for r, i in zip(records, others, strict=False)), records[-1]]


def _choose_places(records: list[dict[str, Any]], prefix: Prefix) -> list[int]:
    """Which positions of the last row to look at, counted from the end: the first and the last few of its own.

    What states carry over from the row before, of a convolution or a recurrence, is seen at once or never.
    """
    together, before = (
        collate_packed(r, prefix=prefix)["input_ids"].shape[1] if r else 0 for r in (records, records[:-1])
    )
    own = range(before - together, 0)
    return sorted({*own[:_LOOKED_AT], *own[-_LOOKED_AT:]})


def _look_at_last(
    model: Any,
    records: list[dict[str, Any]],
    precision: Precision,
    *,
    places: list[int],
    device: torch.device,
    prefix: Prefix = "standard",
    alone: bool = False,
) -> torch.Tensor:
    """The logits at these places of the last row, (places, vocabulary).

    A loss can hide what a row sees: a model that has learnt nothing says the same whatever it sees. All logits would
    cost memory with a large vocabulary.
    """
    batch = move_batch(_build_batch(records, prefix=prefix, alone=alone), device)
    kept = {k: v for k, v in batch.items() if k not in ("labels", "shift_labels")}
    kept["logits_to_keep"] = torch.tensor(places, device=device) + batch["input_ids"].shape[1]
    with torch.no_grad(), compute_as_trained(precision, device=device):
        logits: torch.Tensor = model(**kept, use_cache=False).logits
    return logits[0].float()


def _measure_distance(these: torch.Tensor, those: torch.Tensor) -> float:
    """The root mean square of the difference of two sets of logits, by the standard deviation of the first."""
    return float((these - those).square().mean().sqrt() / these.std().clamp(min=1e-9))


def _build_batch(records: list[dict[str, Any]], *, prefix: Prefix, alone: bool) -> dict[str, Any]:
    """A packed batch; `alone`, without what tells our attention where rows begin."""
    batch = collate_packed(records, prefix=prefix)
    left_out = ("cu_seq_lens_q", "max_length_q") if alone else ()
    return {k: v for k, v in batch.items() if k not in left_out}


def _mean_loss(
    model: Any,
    records: list[dict[str, Any]],
    precision: Precision,
    *,
    device: torch.device,
    prefix: Prefix = "standard",
    alone: bool = False,
) -> float:
    batch = _build_batch([_trim_spans(r) for r in records], prefix=prefix, alone=alone)
    return _compute_loss(model, batch, precision, device=device)


def _compute_loss(model: Any, batch: dict[str, Any], precision: Precision, *, device: torch.device) -> float:
    with torch.no_grad(), compute_as_trained(precision, device=device):
        return float(model(**move_batch(batch, device), use_cache=False).loss)


def _trim_spans(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its first trained positions only."""
    kept, left = [], _COMPARED
    for start, end in record["spans"]:
        kept += [[start, min(end, start + left)]] if left else []
        left -= min(end - start, left)
    return {**record, "spans": kept}


def _count_trained(record: dict[str, Any]) -> int:
    return sum(end - start for start, end in _trim_spans(record)["spans"])


def check_trained(
    model: Any, job: TrainingJob, row: TokenRow, *, start: Weights, precision: Precision, device: torch.device
) -> None:
    """Every trained tensor is finite, and training changed something: the logits, or a weight that is published."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(get_local(weight)).all()):
            raise TrainingError(f"{name}: not finite after training; lower training.learning_rate")
    if isinstance(job.method, FullMethod):
        _check_changed(model, job, precision=precision)
        return
    model.eval()
    ids = torch.tensor([row.input_ids], device=device)
    with torch.no_grad():
        tuned = model(input_ids=ids, logits_to_keep=1).logits
        with without_training(model, start):
            plain = model(input_ids=ids, logits_to_keep=1).logits
    if torch.equal(tuned, plain):
        raise TrainingError("the adapter changes no logit; raise training.learning_rate or training.epochs")


def _check_changed(model: Any, job: TrainingJob, *, precision: Precision) -> None:
    """A weight differs from the base's file, as it is published; the first that does ends the search.

    Where the file has other names for some, these are taken to have changed.
    """
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    left = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, before in read_weights(job.base):
        if (weight := left.pop(name, None)) is None:
            continue
        if weight.shape != before.shape or not torch.equal(
            get_whole(weight).to(kind).cpu(), before.to(torch.float32).to(kind)
        ):
            return
    if not left:
        raise TrainingError(
            f"training changed no weight (all are the base's, in {precision}); "
            "raise training.learning_rate or training.epochs"
        )
