"""What a commit does to a dataset, by row: added, edited, removed, and what that does to the splits.

A row is known by its id; a row whose content comes back under another id is told as renamed, one that a new
split puts on another side as moved. Files and
their order mean nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from appliance.data.rows import Row, read_dataset
from appliance.data.split import select_side
from appliance.example import Example
from appliance.recipe import SplitSection

Kind = Literal["added", "edited", "removed", "renamed", "moved"]
KINDS: tuple[Kind, ...] = ("added", "edited", "removed", "renamed", "moved")


@dataclass(frozen=True, slots=True)
class RowChange:
    """One row: what happened, where it is now (or was), and its sides of the split before and after."""

    kind: Kind
    id: str
    where: str
    fields: tuple[str, ...] = ()
    before: str = ""
    after: str = ""

    @property
    def is_leak(self) -> bool:
        """Whether a row that was trained on is in the test now: the new test flatters every older version."""
        return self.before in ("train", "validation") and self.after == "test"


@dataclass(frozen=True, slots=True)
class DatasetDiff:
    """All changes of one dataset, and its rows by side and by category before and after.

    `notes` say which of the two could not be read, and so seems to have no rows, and whose split it is.
    """

    name: str
    changes: tuple[RowChange, ...]
    sides: dict[str, tuple[int, int]]
    categories: dict[str, tuple[int, int]]
    notes: tuple[str, ...] = ()

    def count(self, kind: Kind) -> int:
        """How many rows changed in this way."""
        return sum(c.kind == kind for c in self.changes)

    def to_json(self) -> dict[str, Any]:
        """For `data diff --json`."""
        return {
            "name": self.name,
            "changes": [
                {"kind": c.kind, "id": c.id, "where": c.where, "fields": c.fields, "before": c.before, "after": c.after}
                for c in self.changes
            ],
            "sides": self.sides,
            "categories": self.categories,
            "notes": list(self.notes),
        }


def diff_folders(
    before: Path, after: Path, *, split: SplitSection, earlier_split: SplitSection | None = None
) -> DatasetDiff:
    """The changes from one folder of a dataset to another; rows that cannot be read are left to the checks.

    `earlier_split` is how the rows of `before` were divided, where that was another way.
    """
    (old, old_fault), (new, new_fault) = _read_rows(before), _read_rows(after)
    splits = (earlier_split or split, split)
    gone = {i: r for i, r in old.items() if i not in new}
    by_content = {r.example.content_hash: i for i, r in gone.items()}
    changes = []
    for identity, row in new.items():
        earlier = old.get(identity)
        if earlier is None and row.example.content_hash in by_content:
            earlier = gone.pop(by_content.pop(row.example.content_hash))
            changes.append(_describe("renamed", row, earlier.example, splits))
        elif earlier is None:
            changes.append(_describe("added", row, None, splits))
        elif earlier.example != row.example:
            changes.append(_describe("edited", row, earlier.example, splits))
        elif (change := _describe("moved", row, earlier.example, splits)).before != change.after:
            changes.append(change)
    changes += [
        RowChange("removed", i, _place(r), before=select_side(r.example.group_key, splits[0])) for i, r in gone.items()
    ]
    return DatasetDiff(
        name=after.name,
        changes=tuple(changes),
        sides=_pair(
            *(
                Counter[str](select_side(r.example.group_key, chosen) for r in rows.values())
                for rows, chosen in zip((old, new), splits, strict=True)
            )
        ),
        categories=_pair(*(Counter(r.example.category or "-" for r in rows.values()) for rows in (old, new))),
        notes=tuple(
            f"all rows count as {word}: the {age} ones cannot be read: {fault}"
            for age, word, fault in (("earlier", "added", old_fault), ("later", "removed", new_fault))
            if fault
        ),
    )


def _read_rows(folder: Path) -> tuple[dict[str, Row], str | None]:
    """The rows by id, and why a folder that is there cannot be read at all."""
    dataset, findings = read_dataset(folder)
    if dataset is None:
        found = (f"{Path(f.where).name}: {f.message}" for f in findings if f.severity == "error")
        return {}, next(found) if folder.is_dir() else None
    return {r.example.id: r for r in dataset.rows}, None


def _describe(kind: Kind, row: Row, earlier: Example | None, splits: tuple[SplitSection, SplitSection]) -> RowChange:
    return RowChange(
        kind=kind,
        id=row.example.id,
        where=_place(row),
        fields=_differ(earlier, row.example) if kind == "edited" and earlier else (),
        before=select_side(earlier.group_key, splits[0]) if earlier else "",
        after=select_side(row.example.group_key, splits[1]),
    )


def _differ(before: Example, after: Example) -> tuple[str, ...]:
    """The fields that differ; of `messages`, whether it is the prompt or the answer."""
    names = [n for n in Example.__struct_fields__ if n != "messages" and getattr(before, n) != getattr(after, n)]
    prompt = ["prompt"] if before.prompt != after.prompt else []
    answer = ["answer"] if before.messages[-1] != after.messages[-1] else []
    return (*prompt, *answer, *names)


def _place(row: Row) -> str:
    return f"{Path(row.file).name}:{row.line}"


def _pair(before: Counter[str], after: Counter[str]) -> dict[str, tuple[int, int]]:
    return {name: (before[name], after[name]) for name in sorted(_names(before, after))}


def _names(*counters: Iterable[str]) -> set[str]:
    return {name for counter in counters for name in counter}
