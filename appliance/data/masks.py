"""The rules that need the base's chat template: each row's mask is built, as training builds it.

What training would refuse is found here with file and line, all of it at once and before a GPU is
asked for. Nothing is trained and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from appliance.data.findings import Finding, find_in_fault
from appliance.data.rows import Row
from appliance.errors import TrainingError
from appliance.example import Example
from appliance.model import ChatTemplate, render_rows
from appliance.recipe import TrainingSection

_LISTED = 5


def check_masks(
    sides: Mapping[str, Sequence[Row]], *, template: ChatTemplate, training: TrainingSection
) -> tuple[tuple[Finding, ...], tuple[int, ...]]:
    """A finding for every row that training would refuse, doubts about the others, and the tokens of those.

    `sides` are the rows that are rendered together, by what for; those of `test` are evaluated, so none
    of them is dropped.
    """
    findings: list[Finding] = []
    lengths: list[int] = []
    for side, rows in sides.items():
        kept: list[tuple[Row, int]] = []
        for row in rows:
            try:
                kept.append((row, max(len(r.input_ids) for r in render_rows(row.example, template))))
            except TrainingError as fault:
                findings.append(find_in_fault("error", "mask", row.where, fault, id=row.example.id))
        lengths += [length for _, length in kept]
        findings += check_tokens(((row.where, row.example) for row, _ in kept), template)
        findings += _check_lengths(side, kept, training=training)
    return tuple(findings), tuple(lengths)


def check_tokens(rows: Iterable[tuple[str, Example]], template: ChatTemplate) -> Iterator[Finding]:
    """A warning for each control token in the text of a turn; `rows` are examples with their places."""
    for where, example in rows:
        for number, message in enumerate(example.messages, start=1):
            for token in dict.fromkeys(template.find_tokens(message.content)):
                said = f"turn {number} ({message.role}) holds the control token {token!r} in its text"
                fix = "the model reads it as structure, not as text: write it in another way unless that is meant"
                yield Finding("warning", "token", where, said, fix, id=example.id)


def _check_lengths(side: str, rows: Sequence[tuple[Row, int]], *, training: TrainingSection) -> Iterator[Finding]:
    """Rows above `training.max_length`: errors where they are refused, a warning where they are dropped."""
    limit = training.max_length
    long = [(row, length) for row, length in rows if length > limit]
    is_dropped = training.overlong == "drop"
    if not long or (is_dropped and side == "test"):
        return
    if is_dropped and len(long) < len(rows):
        ids = ", ".join(row.example.id for row, _ in long[:_LISTED]) + (", ..." if len(long) > _LISTED else "")
        message = f"{len(long)} of {len(rows)} {side} rows are longer than training.max_length {limit}: {ids}"
        fix = "they are dropped whole, as training.overlong says; raise max_length to keep them"
        yield Finding("warning", "length", long[0][0].where, message, fix)
        return
    fix = "shorten the row or raise max_length; nothing is ever cut"
    if is_dropped:
        fix = f"every {side} row is too long, none would be left: {fix}"
    for row, length in long:
        message = f"{length} tokens, training.max_length is {limit}"
        yield Finding("error", "length", row.where, message, fix, id=row.example.id)
