"""`appliance check`."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click

from appliance import registry
from appliance.cli.common import describe_missing_folder, json_option, print_json, store_option
from appliance.cli.lines import say_count, show_example, wrap
from appliance.cli.sections import Section
from appliance.cli.summary import append_section, told_in
from appliance.errors import StoreError
from appliance.store import open_store

_DAMAGED = 1
_LISTED = 200  # GitHub takes a megabyte of summary


@click.command("check", epilog=show_example("appliance check --sample 20 --store s3://BUCKET/registry"))
@click.argument("name", required=False)
@store_option(required=True)
@click.option("--read-data", is_flag=True, help="Read and hash the data of every blob.")
@click.option(
    "--sample",
    type=click.IntRange(1),
    metavar="N",
    help="Read and hash the data of N blobs; which ones depends on the day, and days in a row read all.",
)
@click.option(
    "--date",
    type=click.DateTime(["%Y-%m-%d"]),
    metavar="YYYY-MM-DD",
    default=lambda: datetime.now(UTC).strftime("%Y-%m-%d"),
    show_default="today, UTC",
    help="The day whose sample is read.",
)
@click.option(
    "--summary", type=click.Path(path_type=Path, dir_okay=False), help="Append the findings to this file, as Markdown."
)
@json_option
def command(
    *,
    name: str | None,
    store_url: str,
    read_data: bool,
    sample: int | None,
    date: datetime,
    summary: Path | None,
    as_json: bool,
) -> int:
    """Look at every object of the registry, or of the model NAME, and name all damage at once.

    Without --read-data or --sample, blobs are only asked for their size. Notes (blobs that could be
    collected, moves that were cut off) are no damage. Exit code 1 when there is damage. Changes nothing.
    """
    if read_data and sample is not None:
        raise click.UsageError("give either --read-data (all blobs) or --sample (N of them)")
    with told_in(summary, title="Check"):
        store = open_store(store_url)
        if missing := describe_missing_folder(store):
            raise StoreError(missing)
        report = registry.check_registry(
            store,
            name=name,
            read="all" if read_data else sample or 0,
            day=date.toordinal(),
            now=time.time(),
        )
    total = _describe(report, url=store.url)
    append_section(summary, _build_section(report, total=total))
    if as_json:
        print_json(_to_json(report, url=store.url))
    else:
        for finding in report.findings:
            text = wrap(f"{finding.severity}: {finding}", indent=2)
            click.echo(click.style(text, fg="red" if finding.severity == "damage" else None))
        click.echo(wrap(total, indent=2))
    return 0 if report.is_sound else _DAMAGED


def _describe(report: registry.Report, *, url: str) -> str:
    """The last line: the outcome, what there is, and what of it was read."""
    damage = sum(f.severity == "damage" for f in report.findings)
    outcome = f"{damage} damaged" if damage else "sound" if report.versions else "empty"
    found = ((report.models, "model"), (report.versions, "version"), (report.blobs, "blob"), (report.size, "byte"))
    counts = ", ".join(say_count(number, noun) for number, noun in found)
    loose = f"; {say_count(report.unnamed, 'blob')} that no manifest names yet" if report.unnamed else ""
    empty = "; nothing is published here yet" if not report.versions else ""
    read = f"{say_count(report.read_blobs, 'blob')}, {say_count(report.read_size, 'byte')} read"
    return f"{url}: {outcome}: {counts}; {read}{loose}{empty}"


def _build_section(report: registry.Report, *, total: str) -> Section:
    shown, more = report.findings[:_LISTED], len(report.findings) - _LISTED
    return Section(
        title="Check",
        columns=("", "What", "Key", "Found", "Expected", "Do"),
        rows=tuple((f.severity, f.kind, f.subject, f.found, f.expected, f.action) for f in shown),
        lines=(*([f"and {more} more findings, in the log"] if more > 0 else []), total),
    )


def _to_json(report: registry.Report, *, url: str) -> dict[str, object]:
    return {
        "store": url,
        "sound": report.is_sound,
        **asdict(report),
        "findings": [{"severity": f.severity, **asdict(f)} for f in report.findings],
    }
