"""A reconcile as a table in Markdown, for a job's summary and a pull request.

Reasons carry text from recipes and datasets: they are shown as code, so that nothing in them is
rendered, linked or mentioned.
"""

from __future__ import annotations

from collections.abc import Sequence

from appliance.errors import ApplianceError
from appliance.reconcile import Outcome

_WORDS = {"none": "nothing to do", "train": "trained", "failed": "failed"}
_SHOWN = 20


def describe_action(outcome: Outcome, *, dry_run: bool) -> str:
    """`nothing to do`, `trained`, `would train` or `failed`."""
    return "would train" if dry_run and outcome.action == "train" else _WORDS[outcome.action]


def render_summary(outcomes: Sequence[Outcome], *, dry_run: bool, unclaimed: Sequence[str]) -> str:
    """The table, one recipe a line, and what the registry has that no recipe asks for."""
    title = "Plan" if dry_run else "Reconcile"
    lines = [f"### {title}", "", "| Recipe | Action | Why | Verdict | Version | Alias |", "|---|---|---|---|---|---|"]
    lines += [_render_row(o, dry_run=dry_run) for o in outcomes]
    for name in unclaimed:
        lines.append(
            f"\n{show_code(name)} has versions but no recipe here (renamed or deleted?); they stay as they are."
        )
    return "\n".join([*lines, "", ""])


def render_failure(fault: ApplianceError) -> str:
    """One failure of the whole reconcile, with its exit code."""
    return f"### Reconcile\n\n**failed** (exit code {fault.exit_code}): {show_code(str(fault))}\n\n"


def _render_row(outcome: Outcome, *, dry_run: bool) -> str:
    finished = outcome.finished
    cells = [show_code(outcome.recipe), describe_action(outcome, dry_run=dry_run), show_code(outcome.reason)]
    if finished is None:
        return f"| {' | '.join([*cells, '', '', ''])} |"
    verdict = "<br>".join([finished.outcome, *(show_code(r) for r in finished.reasons)])
    return f"| {' | '.join([*cells, verdict, show_code(finished.version), show_code(finished.alias)])} |"


def show_code(text: str) -> str:
    """Text as code spans in a table cell, a line each; empty stays empty."""
    lines = [line.replace("`", "'").replace("|", "\\|").strip() for line in text.splitlines() if line.strip()]
    more = [f"... and {len(lines) - _SHOWN} more lines"] if len(lines) > _SHOWN else []
    return "<br>".join(f"`{line}`" for line in [*lines[:_SHOWN], *more])
