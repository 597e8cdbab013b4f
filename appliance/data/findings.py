"""A finding: one fault or doubt about one place of a dataset, with what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from appliance.errors import ApplianceError

Severity = Literal["error", "warning"]
Rule = Literal[
    "missing", "card", "empty", "json", "schema", "encoding", "control", "roles", "contract", "id", "duplicate",
    "shared-prompt", "contradiction", "unreviewed", "category", "length", "volume", "test-size", "coverage",
    "imbalance", "split", "mask", "base",
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


def find_in_fault(
    severity: Severity,
    rule: Rule,
    where: str,
    fault: ApplianceError,
    *,
    id: str | None = None,  # noqa: A002
) -> Finding:
    """An error as a finding: errors say what was found, then, after a semicolon, what to do."""
    text = " ".join(str(fault).split())
    if id is not None:
        text = text.removeprefix(f"row {' '.join(id.split())}: ")
    message, _, fix = text.rpartition("; ")
    return Finding(severity, rule, where, message or fix, fix if message else "correct it", id=id)
