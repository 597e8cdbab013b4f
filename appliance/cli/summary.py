"""A reconcile as a section, for a job's summary, a pull request and a terminal; and the summary's file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from appliance.cli.sections import Section, render_sections
from appliance.errors import ApplianceError, InterruptedRunError
from appliance.reconcile import Outcome

_LISTED = 5
_WORDS = {"none": "nothing to do", "train": "trained", "failed": "failed"}


def describe_action(outcome: Outcome, *, dry_run: bool) -> str:
    """`nothing to do`, `trained`, `would train` or `failed`."""
    return "would train" if dry_run and outcome.action == "train" else _WORDS[outcome.action]


def describe_outcomes(
    outcomes: Sequence[Outcome], *, dry_run: bool, unclaimed: Sequence[str] = (), ignored: Sequence[str] = ()
) -> Section:
    """One recipe a line, what the registry has that no recipe asks for, and files that are no recipes."""
    return Section(
        title="Plan" if dry_run else "Reconcile",
        columns=("Recipe", "Action", "Why", "Verdict", "Version", "Alias"),
        rows=tuple(_describe(o, dry_run=dry_run) for o in outcomes),
        lines=(
            *(f"{n} has versions but no recipe here (renamed or deleted?); they stay as they are" for n in unclaimed),
            *describe_ignored(ignored),
        ),
    )


def describe_ignored(ignored: Sequence[str]) -> tuple[str, ...]:
    """One line about files that look like recipes and are not read, or none."""
    if not ignored:
        return ()
    more = f" and {len(ignored) - _LISTED} more" if len(ignored) > _LISTED else ""
    return (f"not read: {', '.join(ignored[:_LISTED])}{more}; a recipe is recipes/NAME.yaml",)


@contextlib.contextmanager
def told_in(summary: Path | None, *, title: str) -> Iterator[None]:
    """A failure of the whole verb is told in the summary too."""
    try:
        yield
    except (ApplianceError, InterruptedRunError) as fault:
        append_section(summary, describe_failure(fault, title=title))
        raise


def append_section(summary: Path | None, section: Section) -> None:
    """Append a section to the summary as Markdown, where there is one."""
    if summary is not None:
        summary.parent.mkdir(parents=True, exist_ok=True)
        with summary.open("a", encoding="utf-8") as stream:
            stream.write(render_sections([section]))


def describe_failure(fault: ApplianceError | InterruptedRunError, *, title: str) -> Section:
    """One failure of the whole verb, with its exit code."""
    return Section(title=title, lines=(f"failed (exit code {fault.exit_code}): {fault}",))


def _describe(outcome: Outcome, *, dry_run: bool) -> tuple[str, ...]:
    finished = outcome.finished
    cells = (outcome.recipe, describe_action(outcome, dry_run=dry_run), outcome.reason)
    if finished is None:
        return (*cells, "", "", "")
    return (*cells, "\n".join([finished.outcome, *finished.reasons]), finished.version, finished.alias)
