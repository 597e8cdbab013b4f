"""`appliance list`."""

from __future__ import annotations

import click

from appliance import registry
from appliance.cli.common import json_option, print_json, store_option
from appliance.cli.lines import show_example
from appliance.store import open_store


@click.command("list", epilog=show_example("appliance list tickets --store s3://BUCKET/registry"))
@click.argument("name", required=False)
@store_option(required=True)
@json_option
def command(*, name: str | None, store_url: str, as_json: bool) -> None:
    """List the versions of NAME, or of every model, oldest first, with verdicts and aliases.

    Exit code 1 for a NAME that the registry does not know.
    """
    store = open_store(store_url)
    if name is not None:
        registry.check_known(store, name)
    versions = registry.list_versions(store, name)
    if as_json:
        rows = [
            {"name": v.name, "version": v.version, "verdict": v.verdict, "aliases": list(v.aliases)} for v in versions
        ]
        print_json(rows)
        return
    if not versions:
        click.echo(f"no versions{f' of {name}' if name else ''} in {store.url} yet; `appliance reconcile` makes them")
    for v in versions:
        click.echo(f"{v.name}@{v.version}  {v.verdict:12}  {' '.join(v.aliases)}".rstrip())
