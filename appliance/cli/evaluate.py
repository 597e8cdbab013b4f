"""`appliance evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from appliance.cli.common import (
    build_workspace,
    choose_mirror,
    find_origin,
    mirror_option,
    open_given_store,
    print_finished,
    recipe_argument,
    store_option,
    tensorboard_option,
    workspace_options,
)
from appliance.cli.lines import show_example
from appliance.pipeline import run_recipe
from appliance.recipe import load_recipe


@click.command("evaluate", epilog=show_example("appliance evaluate recipes/tickets.yaml --store s3://BUCKET/registry"))
@recipe_argument
@store_option(required=False)
@workspace_options
@tensorboard_option
@mirror_option
def command(
    *,
    recipe: Path,
    store_url: str | None,
    root: Path,
    cache: Path,
    runs: Path | None,
    tensorboard: Path | None,
    mirror_checkpoints: bool,
) -> int:
    """Compare the adapter of RECIPE with the prompted base (and with the champion, given --store).

    Trains first when there is no finished adapter. Exit code 3 when the verdict is hold or reject, 0 when it
    is inconclusive.
    """
    store = open_given_store(store_url)
    mirror = choose_mirror(store, is_asked=mirror_checkpoints)
    workspace = build_workspace(root=root, cache=cache, runs=runs, tensorboard=tensorboard, mirror=mirror)
    loaded = load_recipe(recipe)
    origin = find_origin(recipe, loaded, root=root)
    finished = run_recipe(loaded, workspace=workspace, store=store, origin=origin, until="evaluate")
    return print_finished(finished)
