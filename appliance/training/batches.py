"""Token rows to model inputs: flat batches without padding, and the LM head on trained positions only.

With `logits_to_keep` the head scores only the positions whose next token carries loss, which for
short chats with a long vocabulary is a third of the work. What rows begin with alike, a system
prompt or a whole conversation, is in a shared batch once: under a causal mask a position depends on
what is before it and on nothing else, so its activations are the same in every row, and its
gradient is the sum over the rows. On a CPU the flat batches have few sizes, see `round_up`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from appliance.model import TokenRow
from appliance.training.levers import Prefix

_IGNORED = -100
_BITS = 5
LEAST_SHARED = 0.1  # on a GPU: every layer copies rows of a shared batch together and apart again
Sizes = Literal["exact", "rounded"]


def build_records(rows: Sequence[TokenRow]) -> list[dict[str, Any]]:
    """What the sampler draws: ids and spans of each row."""
    return [{"input_ids": r.input_ids, "spans": [list(s) for s in r.spans]} for r in rows]


def collate_packed(
    records: Sequence[dict[str, Any]], *, prefix: Prefix = "standard", sizes: Sizes = "exact", least: float = 0.0
) -> dict[str, Any]:
    """One flat batch: input_ids (1, T), position_ids (1, T), labels and kept positions (K).

    `shift_labels[k]` is the token that follows position `logits_to_keep[k]`; `cu_seq_lens_q` are the
    cumulative lengths of the rows. With a shared prefix or a rounded size T is not their sum R, and two
    more tensors say who holds what: `row_places` (R) is the flat position of every token of every row,
    and `row_origins` (T) the first of those R that holds a flat position, 0 where none does.
    Nothing is shared where that would spare less than the share `least` of R.
    """
    import torch

    ids: list[int] = []
    positions: list[int] = []
    kept: list[int] = []
    targets: list[int] = []
    places: list[int] = []
    origins: list[int] = []
    lengths = [0]
    known: dict[tuple[int, int], int] = {}
    for record in records:
        row = record["input_ids"]
        shared = _find_prefix(record, known)
        flat = [*shared, *range(len(ids), len(ids) + len(row) - len(shared))]
        if prefix == "shared":
            known |= _name_prefix(record, flat)
        ids += row[len(shared) :]
        positions += range(len(shared), len(row))
        origins += range(len(places) + len(shared), len(places) + len(row))
        places += flat
        kept += [flat[i - 1] for start, end in record["spans"] for i in range(start, end)]
        targets += [row[i] for start, end in record["spans"] for i in range(start, end)]
        lengths.append(len(places))
    if prefix == "shared" and len(places) - len(ids) < least * len(places):
        return collate_packed(records, sizes=sizes)
    empty = round_up(len(ids)) - len(ids) if sizes == "rounded" else 0
    ids += ids[:1] * empty
    positions += [0] * empty
    origins += [0] * empty
    labels = torch.tensor([targets])
    batch = {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "logits_to_keep": torch.tensor(kept),
        "labels": labels,
        "shift_labels": labels,
        "cu_seq_lens_q": torch.tensor(lengths, dtype=torch.int32),
        "max_length_q": max(b - a for a, b in pairwise(lengths)),
    }
    if empty or len(ids) < len(places):
        batch |= {"row_places": torch.tensor(places), "row_origins": torch.tensor(origins)}
    return batch


def round_up(size: int) -> int:
    """The next size of five significant bits: at most 6% more, 3% on average, and 16 sizes between n and 2n.

    A CPU keeps kernels for each size that it has met, and its allocator pieces that fit no other.
    """
    step = 1 << max(0, size.bit_length() - _BITS)
    return -(-size // step) * step


def _find_prefix(record: dict[str, Any], known: dict[tuple[int, int], int]) -> list[int]:
    """Flat positions of the longest prefix that an earlier row has too.

    `known` is the tree of prefixes: a flat position and the token after it, to that token's place.
    It ends before the first position that is trained to predict: each row keeps its own of those.
    """
    places: list[int] = []
    for token in record["input_ids"][: _measure_prompt(record)]:
        place = known.get((places[-1] if places else -1, token))
        if place is None:
            break
        places.append(place)
    return places


def _name_prefix(record: dict[str, Any], flat: list[int]) -> dict[tuple[int, int], int]:
    """The part of a row at these flat positions that later rows may share, as branches of the tree."""
    before = [-1, *flat]
    return {(before[i], record["input_ids"][i]): flat[i] for i in range(_measure_prompt(record))}


def _measure_prompt(record: dict[str, Any]) -> int:
    """How many tokens come before the first position that is trained to predict."""
    return max(0, int(record["spans"][0][0]) - 1)


def count_row_tokens(batch: dict[str, Any]) -> Any:
    """Real tokens of the rows of a batch, padded or packed; a shared one counts in each of its rows.

    A number, or a tensor of one where the batch's device has to count: nothing here waits for it.
    """
    if "row_places" in batch:
        return int(batch["row_places"].numel())
    return count_computed_tokens(batch)


def count_computed_tokens(batch: dict[str, Any]) -> Any:
    """Real tokens that pass through the model, as `count_row_tokens` counts."""
    if "row_places" in batch:  # what rounds up the size is held by no row
        return batch["row_places"].max() + 1
    mask = batch.get("attention_mask")
    return mask.sum() if mask is not None else int(batch["input_ids"].numel())


def spread_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its labels at every position, (1, T) with -100 where nothing is trained."""
    import torch

    ids = batch["input_ids"]
    labels = torch.full_like(ids, _IGNORED)
    labels[0, batch["logits_to_keep"]] = batch["shift_labels"][0]
    kept = {k: v for k, v in batch.items() if k not in ("logits_to_keep", "labels", "shift_labels")}
    return {**kept, "shift_labels": labels}


def move_batch(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


def drop_places(batch: dict[str, Any]) -> dict[str, Any]:
    """A padded batch as the libraries know it: labels at every position."""
    return {k: v for k, v in batch.items() if k not in ("shift_labels", "label_rows", "label_columns")}


def collate_padded(records: Sequence[dict[str, Any]], *, pad_id: int) -> dict[str, Any]:
    """A right-padded batch (N, longest) with its attention mask and labels.

    `shift_labels` (1, K) are the tokens that carry loss, and `label_rows` and `label_columns` (K) the positions before
    them, which predict them; columns are counted from the end, as virtual tokens may come before all.
    """
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
    rows, columns = (labels[:, 1:] != _IGNORED).nonzero(as_tuple=True)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "shift_labels": labels[rows, columns + 1][None],
        "label_rows": rows,
        "label_columns": columns - longest,
    }
