"""The changes of a dataset in words, for `data diff` and `review`."""

from __future__ import annotations

from appliance.cli.sections import Section
from appliance.data import DatasetDiff
from appliance.data.diff import KINDS


def describe_diff(diff: DatasetDiff, *, revisions: str, limit: int | None) -> tuple[Section, ...]:
    """Counts, then at most `limit` rows one by one, leaks first; `revisions` as `data diff` takes them."""
    counts = ", ".join(f"{diff.count(k)} {k}" for k in KINDS if diff.count(k)) or "no row changed"
    lines = [*diff.notes, counts]
    lines += [f"{side}: {old} -> {new} rows" for side, (old, new) in diff.sides.items() if old != new]
    lines += [f"category {c}: {old} -> {new} rows" for c, (old, new) in diff.categories.items() if old != new]
    leaks = sum(c.is_leak for c in diff.changes)
    if leaks:
        lines.append(f"{leaks} rows that were trained on are in the test now: it flatters every older version")
    ordered = sorted(diff.changes, key=lambda c: not c.is_leak)
    shown = ordered if limit is None else ordered[:limit]
    if len(ordered) > len(shown):
        lines.append(f"... {len(ordered) - len(shown)} more rows: `appliance data diff {revisions}`")
    rows = tuple((c.kind, c.id, c.where, ", ".join(c.fields), _describe_side(c.before, c.after)) for c in shown)
    return (
        Section(
            title=f"Data: {diff.name}",
            columns=("Change", "Row", "Place", "What", "Side"),
            rows=rows,
            lines=tuple(lines),
        ),
    )


def _describe_side(before: str, after: str) -> str:
    return before if before == after else f"{before or 'new'} -> {after or 'gone'}"
