"""`appliance show`."""

from __future__ import annotations

import click

from appliance import registry
from appliance.cli.common import json_option, print_json, store_option
from appliance.cli.lines import show_example
from appliance.store import open_store


@click.command("show", epilog=show_example("appliance show tickets@staging --store s3://BUCKET/registry"))
@click.argument("reference", metavar="NAME[@ALIAS|@VERSION]")
@store_option(required=True)
@json_option
def command(*, reference: str, store_url: str, as_json: bool) -> None:
    """Show what a version was made from, what it proved, and its files.

    NAME alone means NAME@production; where a verdict ships, the recipe's publish.alias is moved, which is
    staging when left out.
    """
    version, manifest = registry.resolve(open_store(store_url), reference)
    if as_json:
        print_json(manifest.model_dump(mode="json", by_alias=True))
        return
    facts = {
        "version": f"{manifest.name}@{version}",
        "verdict": manifest.verdict,
        "base": f"{manifest.base['model']}  {manifest.base['revision']}",
        "commit": manifest.git_commit or "-",
        "data": manifest.data_digest,
        "recipe": manifest.recipe_digest,
        "run key": manifest.run_key,
        "parent": manifest.parent or "-",
    }
    for key, value in facts.items():
        click.echo(f"{key:10} {value}")
    for arm, score in manifest.metrics.get("arms", {}).items():
        click.echo(f"{arm:10} {manifest.metrics['metric']} {score:.3f} on {manifest.metrics['n']} rows")
    for file in manifest.files:
        click.echo(f"{file.sha256[:12]} {file.size:>12,}  {file.path}")
