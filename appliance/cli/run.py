"""`appliance run`."""

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
    say,
    store_option,
    tensorboard_option,
    workspace_options,
)
from appliance.cli.lines import show_example
from appliance.pipeline import run_recipe
from appliance.recipe import load_recipe


@click.command("run", epilog=show_example("appliance run recipes/tickets.yaml --store s3://BUCKET/registry"))
@recipe_argument
@store_option(required=False)
@workspace_options
@tensorboard_option
@mirror_option
@click.option(
    "--force", is_flag=True, help="Make a new version even if the registry has one for this recipe, data and base."
)
def command(
    *,
    recipe: Path,
    store_url: str | None,
    root: Path,
    cache: Path,
    runs: Path | None,
    tensorboard: Path | None,
    mirror_checkpoints: bool,
    force: bool,
) -> int:
    """Check, train, evaluate, judge and publish one RECIPE; without --store it stops at the card.

    Interrupted, the same command goes on where it stopped. Exit code 3 when the verdict is hold or reject,
    also of a version that was there already; 0 when it is inconclusive.
    """
    store = open_given_store(store_url)
    mirror = choose_mirror(store, is_asked=mirror_checkpoints)
    workspace = build_workspace(root=root, cache=cache, runs=runs, tensorboard=tensorboard, mirror=mirror)
    loaded = load_recipe(recipe)
    origin = find_origin(recipe, loaded, root=root)
    if store is not None and origin.unheld:
        say(f"warning: {origin.unheld}; as it is, the version gets no commit and no alias, and nobody can reproduce it")
    finished = run_recipe(loaded, workspace=workspace, store=store, origin=origin, force=force)
    return print_finished(finished)
