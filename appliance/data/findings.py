"""A finding: one fault or doubt about one place of a dataset, with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`where` is `file:line` or the dataset's folder; `rule` is stable and can be searched for."""

    severity: Severity
    rule: str
    where: str
    message: str
    fix: str
    id: str | None = None

    def __str__(self) -> str:
        """One line: place, rule, row, message, fix."""
        row = f"row {self.id}: " if self.id is not None else ""
        return f"{self.where}: [{self.rule}] {row}{self.message}; {self.fix}"
