"""The validation pass: the loss per trained token, and the rows that greedy decoding would get right.

No generation is needed for the second. Under teacher forcing the model sees the reference up to each
position; greedy decoding sees its own answer, which is the reference as long as every token so far
was right. So it reproduces the reference exactly if and only if the largest logit at every labelled
position is the label's. A row counts by its last turn, the one that evaluation asks for. JSON
contracts compare values, not tokens: for them this is a lower bound of the task's exact match.

The LM head works on some positions at a time: the logits of a whole batch would be the largest thing in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from appliance.model.weights import strip_adapter
from appliance.training.batches import move_batch
from appliance.training.head import scoring_only
from appliance.training.monitor import measure_sameness
from appliance.training.sharding import gathering_once

_HEAD_BYTES = 1 << 28  # of logits at a time; what `plan` counts for a head that does not hold them
_BYTES_A_LOGIT = 12  # in bf16, in fp32, and as the loss has them


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
    device = next(model.parameters()).device
    inputs = move_batch(batch, device)
    del inputs["labels"]
    wanted = inputs.pop("shift_labels")[0]
    with torch.no_grad():
        losses, chosen = (torch.cat(found).tolist() for found in zip(*_score(model, inputs, wanted), strict=True))
    return losses, chosen, wanted.tolist()


def _score(model: Any, inputs: dict[str, Any], wanted: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Losses and most likely tokens, some positions at a time: the layers are computed once, then the head alone."""
    size = max(1, _HEAD_BYTES // (_BYTES_A_LOGIT * model.config.get_text_config().vocab_size))
    names = [n for n in ("logits_to_keep", "label_rows", "label_columns") if n in inputs]
    with gathering_once(model), _computing_once(_find_body(model)):
        for labels, *places in zip(wanted.split(size), *(inputs[n].split(size) for n in names), strict=True):
            logits = _compute_logits(model, inputs | dict(zip(names, places, strict=True)))
            yield functional.cross_entropy(logits.float(), labels, reduction="none"), logits.argmax(-1)


def _compute_logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """(K, V) at the batch's places, also of a class that makes logits past its head."""
    if "label_rows" not in batch:
        return model(**batch, use_cache=False).logits[0]
    rows, columns = batch["label_rows"], batch["label_columns"]
    with scoring_only(model, batch) as inputs:
        logits = model(**inputs, use_cache=False).logits
    return logits[0] if logits.shape[:2] == (1, len(rows)) else logits[rows, columns]


def _find_body(model: Any) -> Any:
    """What the head is put on: the part with the embeddings. Not every class's `get_decoder` is without its head."""
    base = strip_adapter(model)
    embeddings = base.get_input_embeddings()
    return next(part for part in base.children() if any(m is embeddings for m in part.modules()))


@contextmanager
def _computing_once(body: Any) -> Iterator[None]:
    """What `body` gives for the first call it gives for every other one."""
    given: list[Any] = []
    compute = body.forward

    def recall(*arguments: Any, **options: Any) -> Any:
        if not given:
            given.append(compute(*arguments, **options))
        return given[0]

    body.forward = recall
    try:
        yield
    finally:
        body.forward = compute


def _cut_at_first_fault(predicted: list[int], labels: list[int]) -> tuple[int, ...]:
    """What greedy decoding is known to say: the reference until it errs, and that first error."""
    fault = next((i for i, (p, w) in enumerate(zip(predicted, labels, strict=True)) if p != w), len(labels) - 1)
    return tuple(predicted[: fault + 1])
