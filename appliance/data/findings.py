"""A finding: one fault or doubt about one place of a dataset, with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]
Rule = Literal[
    "missing", "card", "empty", "json", "schema", "encoding", "control", "roles", "contract", "id", "duplicate",
    "shared-prompt", "contradiction", "unreviewed", "category", "length", "volume", "test-size", "coverage",
    "imbalance",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """`where` is `file:line` or the dataset's folder; `rule` is stable and explained in docs/data.md."""

    severity: Severity
    rule: Rule
    where: str
    message: str
    fix: str
    id: str | None = None

    def __str__(self) -> str:
        """One line: place, rule, row, message, fix."""
        row = f"row {self.id}: " if self.id is not None else ""
        return f"{self.where}: [{self.rule}] {row}{self.message}; {self.fix}"
