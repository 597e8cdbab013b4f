"""`appliance list`."""

from __future__ import annotations

import click

from appliance import registry
from appliance.cli.common import json_option, print_json, store_option
from appliance.store import open_store


@click.command("list")
@click.argument("name", required=False)
@store_option(required=True)
@json_option
def command(*, name: str | None, store_url: str, as_json: bool) -> None:
    """List the versions of NAME, or of every model, oldest first, with verdicts and aliases."""
    store = open_store(store_url)
    versions = registry.list_versions(store, name)
    if as_json:
        rows = [
            {"name": v.name, "version": v.version, "verdict": v.verdict, "aliases": list(v.aliases)} for v in versions
        ]
        print_json(rows)
        return
    if not versions:
        names = ", ".join(registry.list_names(store))
        here = f"no versions of {name} in {store.url}; there is {names}" if names else f"no versions in {store.url} yet"
        click.echo(here if names else f"{here}; `appliance reconcile` makes them")
    for v in versions:
        click.echo(f"{v.name}@{v.version}  {v.verdict:12}  {' '.join(v.aliases)}".rstrip())
