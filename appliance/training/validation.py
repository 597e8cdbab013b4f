"""The validation pass: the loss per trained token, and the rows that greedy decoding would get right.

No generation is needed for the second. Under teacher forcing the model sees the reference up to each
position; greedy decoding sees its own answer, which is the reference as long as every token so far
was right. So it reproduces the reference exactly if and only if the largest logit at every labelled
position is the label's. A row counts by its last turn, the one that evaluation asks for. JSON
contracts compare values, not tokens: for them this is a lower bound of the task's exact match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from appliance.training.monitor import measure_sameness

_IGNORED = -100


@dataclass(frozen=True, slots=True)
class RowScore:
    """One row: its summed loss over `tokens` labels, and its last turn, `answer` up to the first wrong token."""

    loss: float
    tokens: int
    answer: tuple[int, ...]
    reference: tuple[int, ...]

    @property
    def is_exact(self) -> bool:
        """Whether greedy decoding would give the reference, stop token included."""
        return self.answer == self.reference


def score_rows(
    model: Any, records: Sequence[dict[str, Any]], *, collate: Callable[..., dict[str, Any]], size: int
) -> list[RowScore]:
    """One score per record (see `batches.build_records`), in batches of `size`; leaves the model in eval mode."""
    model.eval()
    scores = []
    for at in range(0, len(records), size):
        batch = list(records[at : at + size])
        losses, predicted, labels = _predict(model, collate(batch))
        first = 0
        for record in batch:
            lengths = [end - start for start, end in record["spans"]]
            last = first + sum(lengths)
            turn = slice(last - lengths[-1], last)
            scores.append(
                RowScore(
                    loss=sum(losses[first:last]),
                    tokens=last - first,
                    answer=_cut_at_first_fault(predicted[turn], labels[turn]),
                    reference=tuple(labels[turn]),
                )
            )
            first = last
    return scores


def summarise_scores(scores: Sequence[RowScore]) -> dict[str, float]:
    """The trainer's metrics: mean loss per labelled token, whatever the batches, and shares of rows."""
    return {
        "eval_loss": sum(s.loss for s in scores) / sum(s.tokens for s in scores),
        "eval_exact_match": sum(s.is_exact for s in scores) / len(scores),
        "eval_same_answer": measure_sameness([s.answer for s in scores]),
        "eval_same_reference": measure_sameness([s.reference for s in scores]),
        "eval_rows": len(scores),
    }


def _predict(model: Any, batch: dict[str, Any]) -> tuple[list[float], list[int], list[int]]:
    """Loss, most likely token and label at every labelled position, row after row."""
    labels = batch.pop("labels")
    device = next(model.parameters()).device
    is_packed = batch.pop("shift_labels", None) is not None
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, -labels.shape[1] :]
        if not is_packed:  # the logits at a position speak of the next one
            labels, logits = labels[:, 1:], logits[:, :-1]
        kept = labels != _IGNORED
        wanted = labels[kept].to(device)
        chosen = logits[kept.to(device)].float()
        losses = functional.cross_entropy(chosen, wanted, reduction="none")
        return losses.tolist(), chosen.argmax(-1).tolist(), wanted.tolist()


def _cut_at_first_fault(predicted: list[int], labels: list[int]) -> tuple[int, ...]:
    """What greedy decoding is known to say: the reference until it errs, and that first error."""
    fault = next((i for i, (p, w) in enumerate(zip(predicted, labels, strict=True)) if p != w), len(labels) - 1)
    return tuple(predicted[: fault + 1])
