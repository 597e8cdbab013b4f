"""`appliance list`."""

from __future__ import annotations

import click

from appliance import registry
from appliance.cli.common import json_option, print_json, say, store_option
from appliance.cli.lines import show_example
from appliance.store import open_store

_DAMAGED = 1


@click.command("list", epilog=show_example("appliance list tickets --store s3://BUCKET/registry"))
@click.argument("name", required=False)
@store_option(required=True)
@json_option
def command(*, name: str | None, store_url: str, as_json: bool) -> int:
    """List the versions of NAME, or of every model, oldest first, with verdicts and aliases.

    Exit code 1 for a NAME that the registry does not know, and where something is damaged: it is named, the rest shown.
    """
    store = open_store(store_url)
    if name is not None:
        registry.check_known(store, name)
    versions, faults = registry.survey_versions(store, name)
    for fault in faults:
        say(f"damaged: {fault}")
    if as_json:
        rows = [
            {"name": v.name, "version": v.version, "verdict": v.verdict, "aliases": list(v.aliases)} for v in versions
        ]
        print_json(rows)
    elif versions:
        for v in versions:
            click.echo(f"{v.name}@{v.version}  {v.verdict:12}  {' '.join(v.aliases)}".rstrip())
    elif not faults:
        click.echo(f"no versions{f' of {name}' if name else ''} in {store.url} yet; `appliance reconcile` makes them")
    return _DAMAGED if faults else 0
