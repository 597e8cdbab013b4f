"""`appliance list`."""

from __future__ import annotations

import click

from appliance import registry
from appliance.cli.common import describe_missing_folder, json_option, print_json, say, store_option
from appliance.cli.lines import show_example
from appliance.manifest import Manifest
from appliance.store import open_store

_DAMAGED = 1


@click.command("list", epilog=show_example("appliance list tickets --store s3://BUCKET/registry"))
@click.argument("name", required=False)
@store_option(required=True)
@json_option
def command(*, name: str | None, store_url: str, as_json: bool) -> int:
    """List the versions of NAME, or of every model, oldest first, with verdicts, scores and aliases.

    Exit code 1 for a NAME that the registry does not know, and where something is damaged: it is named, the rest shown.
    """
    store = open_store(store_url)
    if name is not None:
        registry.check_known(store, name)
    versions, faults = registry.survey_versions(store, name)
    for fault in faults:
        say(f"damaged: {fault}")
    if missing := describe_missing_folder(store):
        say(missing)
    if as_json:
        print_json([_to_json(v) for v in versions])
    elif versions:
        width = max(len(_say_score(v.manifest)) for v in versions)
        for v in versions:
            score = f"{_say_score(v.manifest):{width}}"
            click.echo(f"{v.name}@{v.version}  {v.verdict:12}  {score}  {' '.join(v.aliases)}".rstrip())
    elif not faults:
        click.echo(f"no versions{f' of {name}' if name else ''} in {store.url} yet; `appliance reconcile` makes them")
    return _DAMAGED if faults else 0


def _to_json(found: registry.VersionInfo) -> dict[str, object]:
    manifest = found.manifest
    return {
        "name": found.name,
        "version": found.version,
        "verdict": found.verdict,
        "aliases": list(found.aliases),
        "created_at": manifest.created_at,
        "commit": manifest.git_commit,
        "metrics": manifest.metrics,
    }


def _say_score(manifest: Manifest) -> str:
    """The version's own score and that of the base model with its best prompt; empty where nothing was told."""
    arms = manifest.metrics.get("arms", {})
    base = [score for arm, score in arms.items() if arm not in ("candidate", "champion")]
    if "candidate" not in arms or not base:
        return ""
    return f"{manifest.metrics['metric']} {arms['candidate']:.3f}, base {max(base):.3f}"
