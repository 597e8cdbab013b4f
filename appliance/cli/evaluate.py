"""`appliance evaluate`."""

from __future__ import annotations

from pathlib import Path

import click

from appliance.cli.common import (
    build_workspace,
    find_origin,
    open_given_store,
    print_finished,
    recipe_argument,
    store_option,
    workspace_options,
)
from appliance.pipeline import run_recipe
from appliance.recipe import load_recipe


@click.command("evaluate")
@recipe_argument
@store_option(required=False)
@workspace_options
def command(*, recipe: Path, store_url: str | None, root: Path, cache: Path, runs: Path | None) -> int:
    """Compare the adapter of RECIPE with the prompted base (and with the champion, given --store).

    Trains first when there is no finished adapter. Exit code 3 when the verdict is hold or reject, 0 when it
    is inconclusive.
    """
    finished = run_recipe(
        load_recipe(recipe),
        workspace=build_workspace(root=root, cache=cache, runs=runs),
        store=open_given_store(store_url),
        origin=find_origin(root),
        until="evaluate",
    )
    return print_finished(finished)
