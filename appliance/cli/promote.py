"""`appliance promote`."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from appliance import registry
from appliance.cli.common import read_actor, store_option
from appliance.cli.lines import show_example
from appliance.errors import RegistryError
from appliance.store import open_store


@click.command(
    "promote", epilog=show_example("appliance promote tickets@staging production --store s3://BUCKET/registry")
)
@click.argument("reference", metavar="NAME@VERSION")
@click.argument("alias")
@store_option(required=True)
@click.option("--reason", default="by hand", show_default=True, help="Why, for the alias's history (`appliance show`).")
@click.option(
    "--expected", metavar="VERSION", help="Refuse unless ALIAS points at this version now (`nothing`: at none)."
)
@click.option("--force", is_flag=True, help="Also a version whose verdict is not `ship`.")
def command(*, reference: str, alias: str, store_url: str, reason: str, expected: str | None, force: bool) -> None:
    """Point ALIAS at a version; going back to an older version is the same command.

    An alias that is not there yet is made, and none is ever removed: one that reads like another takes
    `--expected nothing`.
    """
    store = open_store(store_url)
    version, manifest = registry.resolve(store, reference)
    given = reference.partition("@")[2]
    if given[:1].isdigit() and given != version:  # an alias begins with a letter
        message = f"{reference}: the beginning of a version is enough to read it; give the whole version, {version}"
        raise RegistryError(message)
    others = registry.list_aliases(store, manifest.name)
    registry.promote(
        store,
        name=manifest.name,
        version=version,
        alias=alias,
        actor=read_actor(),
        reason=reason,
        at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        force=force,
        expected=expected,
    )
    click.echo(f"{manifest.name}@{alias} is now {version}")
    if others and alias not in others:
        click.echo(f"{alias} is a new alias; not moved: {', '.join(others)}")
