"""`appliance gc`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import click

from appliance import registry
from appliance.cli.common import json_option, print_json, store_option
from appliance.cli.lines import say_count
from appliance.cli.sections import Section, print_section
from appliance.cli.summary import append_section, told_in
from appliance.registry.marks import Kind
from appliance.store import open_store

_DAY_S = 86_400.0
_EPILOG = """\b
Example, every week by an identity that may delete:
  appliance gc --dry-run --store s3://BUCKET/registry
  appliance gc --store s3://BUCKET/registry
The first run plans and deletes nothing; a run 7 days later deletes what is garbage still."""


@click.command("gc", epilog=_EPILOG)
@store_option(required=True)
@click.option(
    "--keep-versions",
    type=click.IntRange(1),
    metavar="N",
    help="Collect versions too: of each model keep the newest N, those that an alias is at, and those that one was at "
    "in the last 90 days. Without it, versions stay.",
)
@click.option(
    "--grace-days",
    type=click.IntRange(0),
    default=round(registry.GRACE_S / _DAY_S),
    show_default=True,
    metavar="DAYS",
    help="How old garbage must be to be planned, and a plan to be carried out. Below 2 only while nobody publishes.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@click.option(
    "--summary", type=click.Path(path_type=Path, dir_okay=False), help="Append what is done to this file, as Markdown."
)
@json_option
def command(
    *,
    store_url: str,
    keep_versions: int | None,
    grace_days: int,
    dry_run: bool,
    summary: Path | None,
    as_json: bool,
) -> int:
    """Delete what nothing in the registry needs: loose blobs, dead leases, checkpoints of runs that are over, uploads.

    In two steps: what is garbage now is planned (gc/*.json); what a plan older than --grace-days and this run both
    call garbage is deleted. A plan is carried out by a run with the same --keep-versions. A registry with damage is
    left alone.
    """
    work = registry.look_for_garbage if dry_run else registry.collect_garbage
    with told_in(summary, title="Garbage"):
        store = open_store(store_url)
        found = work(store, now=store.clock(), keep_versions=keep_versions, grace_s=grace_days * _DAY_S)
    section = _build_section(found, url=store.url, is_dry=dry_run)
    append_section(summary, section)
    if as_json:
        print_json(_to_json(found, url=store.url, is_dry=dry_run))
    else:
        print_section(section)
    return 0


def _build_section(found: registry.Collection, *, url: str, is_dry: bool) -> Section:
    """A row per kind, then when to come again and what is held back."""
    columns = {"Would delete": found.deleted, "Would plan": found.planned, "Waits": found.waiting}
    if not is_dry:
        columns = {"Deleted": found.deleted, "Planned": found.planned, "Waits": found.waiting, "Spared": found.spared}
    rows = tuple(
        (kind, *(_count(objects, kind) for objects in columns.values()))
        for kind in get_args(Kind)
        if any(g.kind == kind for objects in columns.values() for g in objects)
    )
    lines = [f"{url}: " + ("dry run, nothing was written" if is_dry else "done") + ("" if rows else "; no garbage")]
    if found.due is not None:
        verb = "would be" if is_dry and not found.waiting else "is"
        lines.append(f"the next plan {verb} old enough at {_say_time(found.due)}; run it again after that")
    if found.held_by:
        lines.append(f"somebody works on {', '.join(found.held_by)}: loose blobs, checkpoints and these versions wait")
    return Section("Garbage", ("Kind", *columns), rows, (*lines, *found.notes))


def _count(objects: Sequence[registry.Garbage], kind: str) -> str:
    sizes = [g.size for g in objects if g.kind == kind]
    return f"{len(sizes)} ({say_count(sum(sizes), 'byte')})" if sizes else "0"


def _say_time(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))


def _to_json(found: registry.Collection, *, url: str, is_dry: bool) -> dict[str, object]:
    groups = {"deleted": found.deleted, "planned": found.planned, "waiting": found.waiting, "spared": found.spared}
    return {
        "store": url,
        "dry_run": is_dry,
        "due": _say_time(found.due) if found.due is not None else None,
        "held_by": found.held_by,
        "notes": found.notes,
        "sizes": {
            name: {kind: sum(g.size for g in objects if g.kind == kind) for kind in {g.kind for g in objects}}
            for name, objects in groups.items()
        },
        **{name: [g.model_dump(mode="json") for g in objects] for name, objects in groups.items()},
    }
