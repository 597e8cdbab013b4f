"""Token rows to model inputs: flat batches without padding, and the LM head on trained positions only.

With `logits_to_keep` the head scores only the positions whose next token carries loss, which for
short chats with a long vocabulary is a third of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from appliance.model import TokenRow

_IGNORED = -100


def build_records(rows: Sequence[TokenRow]) -> list[dict[str, Any]]:
    """What the sampler draws: ids and spans of each row."""
    return [{"input_ids": r.input_ids, "spans": [list(s) for s in r.spans]} for r in rows]


def collate_packed(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One flat batch: input_ids (1, T), position_ids (1, T), labels and kept positions (K).

    `shift_labels[k]` is the token that follows position `logits_to_keep[k]`.
    """
    import torch

    ids: list[int] = []
    positions: list[int] = []
    kept: list[int] = []
    lengths = [0]
    for record in records:
        offset = len(ids)
        ids += record["input_ids"]
        positions += range(len(record["input_ids"]))
        kept += [offset + i - 1 for start, end in record["spans"] for i in range(start, end)]
        lengths.append(len(ids))
    labels = torch.tensor([[ids[i + 1] for i in kept]])
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "logits_to_keep": torch.tensor(kept),
        "labels": labels,
        "shift_labels": labels,
        "cu_seq_lens_q": torch.tensor(lengths, dtype=torch.int32),
        "max_length_q": max(b - a for a, b in pairwise(lengths)),
    }


def spread_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its labels at every position, (1, T) with -100 where nothing is trained."""
    import torch

    ids = batch["input_ids"]
    labels = torch.full_like(ids, _IGNORED)
    labels[0, batch["logits_to_keep"]] = batch["shift_labels"][0]
    kept = {k: v for k, v in batch.items() if k not in ("logits_to_keep", "labels", "shift_labels")}
    return {**kept, "shift_labels": labels}


def collate_padded(records: Sequence[dict[str, Any]], *, pad_id: int) -> dict[str, Any]:
    """A right-padded batch (N, longest) with its attention mask and labels."""
    import torch

    longest = max(len(r["input_ids"]) for r in records)
    ids = torch.full((len(records), longest), pad_id)
    labels = torch.full((len(records), longest), _IGNORED)
    mask = torch.zeros((len(records), longest), dtype=torch.long)
    for row, record in enumerate(records):
        tokens = torch.tensor(record["input_ids"])
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
        for start, end in record["spans"]:
            labels[row, start:end] = tokens[start:end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
