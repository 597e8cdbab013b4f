"""Examples to token rows, with every mask check on, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from appliance.digest import write_atomic
from appliance.errors import TrainingError
from appliance.example import Example
from appliance.model import ChatTemplate, TokenRow, render_row


def prepare_rows(
    examples: Sequence[Example], *, template: ChatTemplate, max_length: int, file: Path
) -> tuple[TokenRow, ...]:
    """Render, mask, check and write the token rows of one split as JSONL.

    Raises `TrainingError` that lists every row that breaks a mask rule or is longer than
    `max_length` tokens: nothing is cut and nothing is dropped without a word.
    """
    rows, faults = [], []
    for example in examples:
        try:
            row = render_row(example, template)
        except TrainingError as fault:
            faults.append(str(fault))
            continue
        if len(row.input_ids) > max_length:
            faults.append(f"row {row.id}: {len(row.input_ids)} tokens, training.max_length is {max_length}")
        rows.append(row)
    if faults:
        more = f"\n... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise TrainingError("\n".join(faults[:20]) + more)
    write_atomic(file, b"".join(msgspec.json.encode(r) + b"\n" for r in rows))
    return tuple(rows)


def load_rows(file: Path) -> tuple[TokenRow, ...]:
    """The token rows that `prepare_rows` wrote."""
    return tuple(msgspec.json.decode(line, type=TokenRow) for line in file.read_bytes().splitlines())


def show_mask(row: TokenRow, template: ChatTemplate) -> list[tuple[str, bool]]:
    """The row as alternating pieces of text, each with whether it is trained."""
    pieces, at = [], 0
    for start, end in row.spans:
        pieces += [(template.decode(row.input_ids[at:start]), False), (template.decode(row.input_ids[start:end]), True)]
        at = end
    pieces.append((template.decode(row.input_ids[at:]), False))
    return [(text, trained) for text, trained in pieces if text]
