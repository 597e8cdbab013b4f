"""`appliance publish`."""

from __future__ import annotations

from pathlib import Path

import click

from appliance.cli.common import (
    build_workspace,
    find_origin,
    print_finished,
    recipe_argument,
    store_option,
    workspace_options,
)
from appliance.cli.lines import show_example
from appliance.pipeline import publish_run
from appliance.preparation import prepare
from appliance.recipe import load_recipe
from appliance.store import open_store


@click.command("publish", epilog=show_example("appliance publish recipes/tickets.yaml --store s3://BUCKET/registry"))
@recipe_argument
@store_option(required=True)
@workspace_options
def command(*, recipe: Path, store_url: str, root: Path, cache: Path, runs: Path | None) -> int:
    """Publish the evaluated run of RECIPE: files first, manifest last; the alias moves only on `ship`.

    Exit code 3 when the verdict is hold or reject, 0 when it is inconclusive.
    """
    workspace = build_workspace(root=root, cache=cache, runs=runs)
    loaded = load_recipe(recipe)
    prepared, origin = prepare(loaded, workspace=workspace), find_origin(recipe, loaded, root=root)
    finished = publish_run(prepared, workspace=workspace, store=open_store(store_url), origin=origin)
    return print_finished(finished)
