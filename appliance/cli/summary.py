"""A reconcile as a section: for a job's summary, a pull request and a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from appliance.cli.sections import Section
from appliance.errors import ApplianceError
from appliance.reconcile import Outcome

_WORDS = {"none": "nothing to do", "train": "trained", "failed": "failed"}


def describe_action(outcome: Outcome, *, dry_run: bool) -> str:
    """`nothing to do`, `trained`, `would train` or `failed`."""
    return "would train" if dry_run and outcome.action == "train" else _WORDS[outcome.action]


def describe_outcomes(outcomes: Sequence[Outcome], *, dry_run: bool, unclaimed: Sequence[str] = ()) -> Section:
    """One recipe a line, and what the registry has that no recipe asks for."""
    return Section(
        title="Plan" if dry_run else "Reconcile",
        columns=("Recipe", "Action", "Why", "Verdict", "Version", "Alias"),
        rows=tuple(_describe(o, dry_run=dry_run) for o in outcomes),
        lines=tuple(
            f"{name} has versions but no recipe here (renamed or deleted?); they stay as they are" for name in unclaimed
        ),
    )


def describe_failure(fault: ApplianceError) -> Section:
    """One failure of the whole reconcile, with its exit code."""
    return Section(title="Reconcile", lines=(f"failed (exit code {fault.exit_code}): {fault}",))


def _describe(outcome: Outcome, *, dry_run: bool) -> tuple[str, ...]:
    finished = outcome.finished
    cells = (outcome.recipe, describe_action(outcome, dry_run=dry_run), outcome.reason)
    if finished is None:
        return (*cells, "", "", "")
    return (*cells, "\n".join([finished.outcome, *finished.reasons]), finished.version, finished.alias)
