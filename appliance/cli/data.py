"""`appliance data`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from appliance.cli.changes import describe_diff, diff_revisions
from appliance.cli.common import json_option, print_json, say
from appliance.cli.sections import print_section
from appliance.data import Report, check_dataset
from appliance.example import Example
from appliance.model import load_template, resolve_base
from appliance.recipe import Recipe, SplitSection, load_recipe


@click.group("data")
def command() -> None:
    """Check datasets before anything is spent on them."""


@command.command("check")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option(
    "--recipe",
    "recipe_path",
    type=click.Path(path_type=Path),
    help="Check this recipe's dataset, splits and token lengths.",
)
@click.option("--root", type=click.Path(path_type=Path), default=".", show_default=True, help="The repository.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    envvar="APPLIANCE_CACHE",
    default=lambda: Path.home() / ".cache" / "appliance",
    show_default="~/.cache/appliance",
    help="Folder for base models. [env: APPLIANCE_CACHE]",
)
@json_option
def check(*, folder: Path | None, recipe_path: Path | None, root: Path, cache: Path, as_json: bool) -> int:
    """Check a dataset FOLDER, or the dataset of a recipe; every fault with its file and line.

    Exit code 1 when there are errors; warnings are listed.
    """
    if (folder is None) == (recipe_path is None):
        raise click.UsageError("give either a dataset folder or --recipe")
    if recipe_path is not None:
        recipe = load_recipe(recipe_path)
        report = check_dataset(
            root / recipe.dataset.path,
            split=recipe.dataset.split,
            gates_min_test_rows=recipe.evaluation.gates.min_test_rows,
            max_length=recipe.training.max_length if recipe.training.overlong == "refuse" else None,
            count_tokens=_build_counter(recipe, root=root, cache=cache),
        )
    else:
        report = check_dataset(folder or root, split=SplitSection())
    if as_json:
        print_json(
            {
                "counts": report.counts,
                "errors": [str(f) for f in report.errors],
                "warnings": [str(f) for f in report.warnings],
            }
        )
    else:
        _print_report(report)
    return 1 if report.errors else 0


@command.command("diff")
@click.argument("revisions", metavar="REV..REV")
@click.option("--root", type=click.Path(path_type=Path), default=".", show_default=True, help="The repository.")
@json_option
def diff(*, revisions: str, root: Path, as_json: bool) -> int:
    """Show by row what changed between two commits: added, edited, removed, and the effect on the splits.

    Left out, the first revision is HEAD~1 and the second what is on this disk. Exit code 0 whatever changed.
    """
    before, _, after = revisions.partition("..")
    diffs = diff_revisions(root.resolve(), before or "HEAD~1", after or None)
    if as_json:
        print_json([d.to_json() for d in diffs])
        return 0
    for each in diffs:
        for section in describe_diff(each, limit=None):
            print_section(section)
    return 0


def _build_counter(recipe: Recipe, *, root: Path, cache: Path) -> Callable[[Example], int]:
    base = resolve_base(recipe.base, root=root.resolve(), cache=cache.expanduser().resolve(), note=say)
    template = load_template(base.folder)
    return lambda e: len(template.encode(template.render(e.messages, prompt=False, tools=e.tools)).ids)


def _print_report(report: Report) -> None:
    for finding in report.errors:
        click.echo(click.style("error    ", fg="red") + str(finding))
    for finding in report.warnings:
        click.echo(click.style("warning  ", fg="yellow") + str(finding))
    for name, value in report.counts.items():
        click.echo(f"{name:12} {value}")
    click.echo(f"{len(report.errors)} errors, {len(report.warnings)} warnings")
