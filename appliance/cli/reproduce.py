"""`appliance reproduce`."""

from __future__ import annotations

from pathlib import Path

import click

from appliance.cli.common import build_workspace, json_option, print_json, store_option, workspace_options
from appliance.cli.lines import show_example
from appliance.reproduction import Difference, Reproduction, reproduce
from appliance.store import open_store

_DIFFERENT = 1


@click.command("reproduce", epilog=show_example("appliance reproduce tickets@staging --store s3://BUCKET/registry"))
@click.argument("reference", metavar="NAME[@ALIAS|@VERSION]")
@store_option(required=True)
@workspace_options
@json_option
def command(*, reference: str, store_url: str, root: Path, cache: Path, runs: Path | None, as_json: bool) -> int:
    """Train a version again from its commit and compare the artifact with the published one, byte by byte.

    The working tree is left alone: the commit is checked out elsewhere. Exit code 1 when a file differs.
    NAME alone means NAME@production, as for `appliance pull`.
    """
    workspace = build_workspace(root=root, cache=cache, runs=runs)
    found = reproduce(reference, workspace=workspace, store=open_store(store_url))
    if as_json:
        print_json(_to_json(found))
    else:
        _print(found)
    return 0 if found.is_identical else _DIFFERENT


def _print(found: Reproduction) -> None:
    word = "identical" if found.is_identical else "different"
    click.echo(f"{word}  {found.version}: {found.compared - len(found.files)} of {found.compared} files are the same")
    for each in found.files:
        click.echo(f"  file  {each.name}: SHA-256 {each.recorded[:12]}, made now {each.made[:12]}")
    for each in found.facts:
        click.echo(f"  fact  {each.name}: {each.recorded}, here {each.made}")
    if not found.is_identical and not found.facts:
        click.echo("  every recorded version, device and choice is the same: the difference has another cause")
    if found.folder is not None:
        click.echo(f"  made  {found.folder}")


def _to_json(found: Reproduction) -> dict[str, object]:
    def show(each: Difference) -> dict[str, str]:
        return {"name": each.name, "recorded": each.recorded, "made": each.made}

    return {
        "version": found.version,
        "identical": found.is_identical,
        "compared": found.compared,
        "files": [show(f) for f in found.files],
        "facts": [show(f) for f in found.facts],
        "folder": str(found.folder) if found.folder else None,
    }
