"""Examples to token rows, with every mask check on, before any weight is loaded.

A row is trained whole or not at all: nothing is ever cut. What is too long is refused, or, where
the recipe says so, dropped whole and told by id.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from appliance.digest import write_atomic
from appliance.errors import TrainingError
from appliance.example import Example
from appliance.model import ChatTemplate, TokenRow, render_rows
from appliance.training.tokens import TokenCache, build_key, read_entry, write_entry

_SHOWN = 20
_MASKS = 3
Overlong = Literal["refuse", "drop"]


class Piece(NamedTuple):
    """A stretch of a token row: its text, whether it carries loss, and whether it is a control token."""

    text: str
    is_trained: bool
    is_token: bool


def build_rows(
    examples: Sequence[Example],
    *,
    template: ChatTemplate,
    max_length: int | None,
    overlong: Overlong = "refuse",
    cache: TokenCache | None = None,
) -> tuple[TokenRow, ...]:
    """The token rows of one split: rendered, masked, checked; with a `cache`, once for equal inputs.

    Raises `TrainingError` that lists every row that breaks a mask rule, every row longer than
    `max_length` tokens unless they are to be dropped, and a split whose rows are all too long. Only
    rows that are evaluated and not trained may go without a `max_length`.
    """
    if cache is None:
        return _render(examples, template=template, max_length=max_length, overlong=overlong)
    key = build_key(examples, template=template, max_length=max_length, overlong=overlong)
    rows = read_entry(cache, key)
    if rows is None:
        rows = _render(examples, template=template, max_length=max_length, overlong=overlong)
        write_entry(cache, key, rows)
    return rows


def _render(
    examples: Sequence[Example], *, template: ChatTemplate, max_length: int | None, overlong: Overlong
) -> tuple[TokenRow, ...]:
    kept: list[TokenRow] = []
    broken, long = [], []
    for example in examples:
        try:
            rows = render_rows(example, template)
        except TrainingError as fault:
            broken.append(str(fault))
            continue
        longest = max(len(r.input_ids) for r in rows)
        if max_length is not None and longest > max_length:
            long.append(f"row {example.id}: {longest} tokens, training.max_length is {max_length}")
        else:
            kept += rows
    if broken or (long and (overlong == "refuse" or not kept)):
        faults = [*broken, *long]
        more = f"\n... and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise TrainingError("\n".join(faults[:_SHOWN]) + more + (_advise(kept, overlong) if long else ""))
    return tuple(kept)


def _advise(kept: Sequence[TokenRow], overlong: Overlong) -> str:
    """What to do about rows that are too long."""
    if overlong == "drop" and not kept:
        return "; every row is too long, none would be left: raise training.max_length or shorten the rows"
    return (
        "; nothing is cut: raise training.max_length, shorten the rows, or drop them whole with training.overlong: drop"
    )


def prepare_rows(
    examples: Sequence[Example],
    *,
    template: ChatTemplate,
    max_length: int | None,
    file: Path,
    overlong: Overlong = "refuse",
    cache: TokenCache | None = None,
) -> tuple[TokenRow, ...]:
    """`build_rows`, written to `file` as JSONL for the training child."""
    rows = build_rows(examples, template=template, max_length=max_length, overlong=overlong, cache=cache)
    write_atomic(file, b"".join(msgspec.json.encode(r) + b"\n" for r in rows))
    return rows


def load_rows(file: Path) -> tuple[TokenRow, ...]:
    """The token rows that `prepare_rows` wrote. Raises `TrainingError` for a row whose mask cannot be right."""
    rows = tuple(msgspec.json.decode(line, type=TokenRow) for line in file.read_bytes().splitlines())
    for row in rows:
        edges = [0, *(edge for span in row.spans for edge in span)]
        if not row.spans or edges[1] < 1 or edges != sorted(edges) or edges[-1] > len(row.input_ids) or not row.trained:
            raise TrainingError(
                f"{file}: row {row.id}: {row.trained} of {len(row.input_ids)} tokens would be trained, in {row.spans}; "
                "expected answers after a prompt; delete the run folder and run again"
            )
    return rows


def describe_rows(examples: Sequence[Example], rows: Sequence[TokenRow]) -> dict[str, Any]:
    """What became of the examples of one split: the ids that were dropped, and those that became several token rows."""
    parts = Counter(r.id for r in rows)
    return {
        "rows": len(examples),
        "token_rows": len(rows),
        "dropped": [e.id for e in examples if e.id not in parts],
        "split": [i for i, n in parts.items() if n > 1],
    }


def show_mask(row: TokenRow, template: ChatTemplate) -> list[Piece]:
    """The row as pieces of text in order; control tokens stand alone, so that text can never pass for one."""
    trained = {i for start, end in row.spans for i in range(start, end)}
    kinds = [(i in trained, token in template.added_ids) for i, token in enumerate(row.input_ids)]
    pieces = []
    for (is_trained, is_token), group in itertools.groupby(range(len(kinds)), key=kinds.__getitem__):
        places = list(group)
        runs = [[p] for p in places] if is_token else [places]
        pieces += [Piece(template.decode([row.input_ids[p] for p in run]), is_trained, is_token) for run in runs]
    return pieces


def select_masks(rows: Sequence[TokenRow], template: ChatTemplate) -> list[dict[str, Any]]:
    """A few rows for the card: the first, the one with the most answers, and all of a conversation that was split."""
    parts = Counter(r.id for r in rows)
    most = max(rows, key=lambda r: len(r.spans))
    split = [r for r in rows if parts[r.id] > 1]
    picked = [rows[0], *([most] if len(most.spans) > 1 else []), *(r for r in split if r.id == split[0].id), *rows[1:]]
    chosen = list({id(r): r for r in picked}.values())[:_MASKS]
    return [
        {
            "id": r.id,
            "part": _name_part(r, rows) if parts[r.id] > 1 else "",
            "tokens": len(r.input_ids),
            "trained": r.trained,
            "pieces": show_mask(r, template),
        }
        for r in chosen
    ]


def _name_part(row: TokenRow, rows: Sequence[TokenRow]) -> str:
    """Which part of its conversation a token row is: `1 of 2`."""
    parts = [r for r in rows if r.id == row.id]
    return f"{next(i for i, r in enumerate(parts, start=1) if r is row)} of {len(parts)}"
