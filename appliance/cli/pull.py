"""`appliance pull`."""

from __future__ import annotations

from pathlib import Path

import click

from appliance import registry
from appliance.cli.common import say, store_option
from appliance.cli.lines import say_count, show_example
from appliance.store import open_store


@click.command("pull", epilog=show_example("appliance pull tickets@production ./tickets --store s3://BUCKET/registry"))
@click.argument("reference", metavar="NAME[@ALIAS|@VERSION]")
@click.argument("folder", type=click.Path(path_type=Path))
@store_option(required=True)
def command(*, reference: str, folder: Path, store_url: str) -> None:
    """Fetch REFERENCE into FOLDER; every byte is verified before the folder appears.

    A folder that holds this version already is verified and left as it is; one that holds another version of NAME,
    or this one damaged, is replaced as a whole. NAME alone means NAME@production; where a verdict ships, the
    recipe's publish.alias is moved, which is staging when left out.
    """
    manifest = registry.pull(open_store(store_url), reference, folder, note=say)
    size = sum(f.size for f in manifest.files)
    files = say_count(len(manifest.files), "file")
    click.echo(f"{manifest.name}@{manifest.version}: {files}, {size / 1e6:.1f} MB, verified, in {folder}")
