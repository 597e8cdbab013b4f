"""`appliance data`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from appliance.changes import diff_revisions, find_fork
from appliance.cli.changes import describe_diff
from appliance.cli.common import build_workspace, cache_option, json_option, print_json, root_option
from appliance.cli.lines import say_count, show_example, wrap
from appliance.cli.sections import print_section
from appliance.data import Report, check_dataset, describe_findings
from appliance.preparation import check_recipe
from appliance.recipe import load_recipe


@click.group("data")
def command() -> None:
    """Check datasets before anything is spent on them."""


@command.command(
    "check",
    short_help="Check a dataset, or all rows of a recipe.",
    epilog=show_example("appliance data check datasets/tickets", "appliance data check --recipe recipes/tickets.yaml"),
)
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(path_type=Path),
    help="Check this recipe's dataset, splits and general rows, and by its base's template every mask and length.",
)
@root_option
@cache_option
@json_option
def check(*, folder: Path | None, recipe_path: Path | None, root: Path, cache: Path, as_json: bool) -> int:
    """Check a dataset FOLDER, or all rows of a recipe as training would; every fault with its file and line.

    Which rows are tested on, and whether they are enough for the gate, is told with --recipe.

    Of one kind of fault the first 20 are shown; --json has all. Exit code 1 when there are errors;
    warnings are listed. A base model that is not at hand is a warning.
    """
    if folder is not None and recipe_path is None:
        report = check_dataset(folder)
    elif recipe_path is not None and folder is None:
        workspace = build_workspace(root=root, cache=cache, runs=None)
        report = check_recipe(load_recipe(recipe_path), workspace=workspace)
    else:
        raise click.UsageError("give either a dataset folder or --recipe")
    if as_json:
        print_json(
            {
                "counts": report.counts,
                "errors": [asdict(f) for f in report.errors],
                "warnings": [asdict(f) for f in report.warnings],
            }
        )
    else:
        _print_report(report)
    return 1 if report.errors else 0


@command.command(
    "diff",
    short_help="Show by row what changed between two commits.",
    epilog=show_example("appliance data diff origin/main..HEAD"),
)
@click.argument("revisions", metavar="[REV..REV]", required=False, default="..")
@root_option
@json_option
def diff(*, revisions: str, root: Path, as_json: bool) -> int:
    """Show by row what changed between two commits: added, edited, removed, renamed, moved, and the splits.

    Left out, the first revision is HEAD~1 and the second what is on this disk. A...B compares B with the commit
    at which it left A, as Git does. Exit code 0 whatever changed.
    """
    home = root.resolve()
    before, dots, after = revisions.partition("..." if "..." in revisions else "..")
    first = find_fork(home, before or "HEAD", after or "HEAD") if dots == "..." else before or "HEAD~1"
    diffs = diff_revisions(home, first, after or None)
    if as_json:
        print_json([d.to_json() for d in diffs])
        return 0
    for each in diffs:
        for section in describe_diff(each, revisions=revisions, limit=None):
            print_section(section)
    return 0


def _print_report(report: Report) -> None:
    for word, color, findings in (("error", "red", report.errors), ("warning", "yellow", report.warnings)):
        for line in describe_findings(findings):
            text = wrap(f"{word:<9}{line}", indent=9)
            click.echo(click.style(text[:9], fg=color) + text[9:])
    for name, value in report.counts.items():
        counted = ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,}"
        if counted:
            click.echo(wrap(f"{name:12} {counted}", indent=13))
    click.echo(f"{say_count(len(report.errors), 'error')}, {say_count(len(report.warnings), 'warning')}")
