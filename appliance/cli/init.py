"""`appliance init`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import click

from appliance.cli.lines import show_example
from appliance.starter import check_files, start_repository


@click.command("init", epilog=show_example("appliance init --remote s3://BUCKET/dvc"))
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    show_default=True,
    help="The repository; made where there is none.",
)
@click.option(
    "--remote",
    metavar="URL",
    help="S3 URL (or folder) for DVC's data; s3://BUCKET/dvc of APPLIANCE_STORE's bucket when left out.",
)
@click.option(
    "--store", "store_url", envvar="APPLIANCE_STORE", metavar="URL", help="The registry. [env: APPLIANCE_STORE]"
)
@click.option("--check", is_flag=True, help="Write nothing; show where kept files differ from the release (exit 1).")
def command(*, root: Path, remote: str | None, store_url: str | None, check: bool) -> int:
    """Turn a repository, empty or not, into one that is retrained by its commits.

    Repeatable: writes what is missing, replaces workflows that an older release wrote, and leaves
    everything that somebody changed.
    """
    if check:
        return _show_drift(root)
    bucket = urlsplit(store_url).netloc if store_url and store_url.startswith("s3://") else ""
    done = start_repository(root, remote=remote, default_remote=f"s3://{bucket}/dvc" if bucket else None)
    for line in done:
        click.echo(line)
    click.echo("nothing to do" if not done else "next: add rows, `dvc add datasets`, `dvc push`, commit, push")
    return 0


def _show_drift(root: Path) -> int:
    changes = [c for c in check_files(root) if c.state != "same"]
    for change in changes:
        click.echo(f"{change.path}: {change.state}")
        if change.diff:
            click.echo(change.diff)
    click.echo(f"{len(changes)} kept files differ from the release")
    return 1 if changes else 0
