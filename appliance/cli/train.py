"""`appliance train`."""

from __future__ import annotations

from pathlib import Path

import click

from appliance.cli.common import (
    build_workspace,
    find_origin,
    print_finished,
    recipe_argument,
    tensorboard_option,
    workspace_options,
)
from appliance.cli.lines import show_example
from appliance.pipeline import run_recipe
from appliance.recipe import load_recipe


@click.command("train", epilog=show_example("appliance train recipes/tickets.yaml --tensorboard boards"))
@recipe_argument
@workspace_options
@tensorboard_option
def command(*, recipe: Path, root: Path, cache: Path, runs: Path | None, tensorboard: Path | None) -> int:
    """Check the data of RECIPE and train; the adapter is in the run folder. Resumes by itself."""
    loaded = load_recipe(recipe)
    finished = run_recipe(
        loaded,
        workspace=build_workspace(root=root, cache=cache, runs=runs, tensorboard=tensorboard),
        store=None,
        origin=find_origin(recipe, loaded, root=root),
        until="train",
    )
    return print_finished(finished)
