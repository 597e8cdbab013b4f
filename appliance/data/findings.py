"""A finding: one fault or doubt about one place of a dataset, with what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from appliance.errors import ApplianceError

Severity = Literal["error", "warning"]
Rule = Literal[
    "missing", "card", "empty", "json", "schema", "encoding", "control", "roles", "contract", "id", "duplicate",
    "shared-prompt", "contradiction", "unreviewed", "category", "length", "volume", "test-size", "coverage",
    "imbalance", "split", "mask", "token", "base", "prompt", "unread", "near-copy",
]  # fmt: skip
_SHOWN = 20


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


def describe_findings(findings: Sequence[Finding]) -> list[str]:
    """The first findings of each rule, a line each, then how many more it has.

    A file of another form has a fault in every row, and the one that is different would be lost among them.
    """
    by_rule: dict[Rule, list[Finding]] = {}
    for finding in findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    lines: list[str] = []
    for rule, found in by_rule.items():
        lines += map(str, found[:_SHOWN])
        if len(found) > _SHOWN:
            lines.append(f"... and {len(found) - _SHOWN:,} more of [{rule}]; `appliance data check --json` has all")
    return lines


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
