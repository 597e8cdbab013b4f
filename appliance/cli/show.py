"""`appliance show`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import click

from appliance import registry
from appliance.cli.against import has_other_rows, list_differences
from appliance.cli.common import json_option, print_json, say, store_option
from appliance.cli.lines import say_count, show_example, wrap
from appliance.errors import RegistryError, StoreError
from appliance.manifest import Manifest
from appliance.report import ARM_NAMES, say_interval, say_reasons
from appliance.store import Store, open_store

_MOVES = 5


@click.command(
    "show",
    epilog=show_example(
        "appliance show tickets@staging --store s3://BUCKET/registry",
        "appliance show tickets@staging --against tickets@production --store s3://BUCKET/registry",
    ),
)
@click.argument("reference", metavar="NAME[@ALIAS|@VERSION]")
@click.option("--against", metavar="NAME[@ALIAS|@VERSION]", help="Show what differs from this older version instead.")
@store_option(required=True)
@json_option
def command(*, reference: str, against: str | None, store_url: str, as_json: bool) -> None:
    """Show what a version was made from, what it proved and why, its aliases and its files.

    With an alias, also how the alias came there: when, from where, by whom and why.

    NAME alone means NAME@production; where a verdict ships, the recipe's publish.alias is moved, which is
    staging when left out.
    """
    store = open_store(store_url)
    version, manifest = registry.resolve(store, reference)
    if against is not None:
        _show_differences(*registry.resolve(store, against), version, manifest, as_json=as_json)
        return
    alias, aliases = _find_alias(reference), _list_aliases(store, manifest.name, version)
    if as_json:
        facts = manifest.model_dump(mode="json", by_alias=True)
        moves = [_to_json(*pair) for pair in _follow(store, manifest.name, alias)]
        print_json({**facts, "version": version, "aliases": aliases, "moves": moves})
        return
    facts = {
        "version": f"{manifest.name}@{version}",
        "aliases": ", ".join(aliases) or "-",
        "verdict": manifest.verdict,
        "base": f"{manifest.base['model']}  {manifest.base['revision']}",
        "commit": manifest.git_commit or "-",
        "data": manifest.data_digest,
        "recipe": manifest.recipe_digest,
        "run key": manifest.run_key,
        "parent": manifest.parent or "-",
    }
    proof = _read_proof(store, manifest)
    for key, value in facts.items():
        click.echo(f"{key:10} {value}")
        if key == "verdict":
            _print_reasons(proof)
    _print_scores(manifest, proof)
    for file in manifest.files:
        click.echo(f"{file.sha256[:12]} {file.size:>12,}  {file.path}")
    _print_moves(store, manifest.name, alias)


def _find_alias(reference: str) -> str:
    """The alias in a reference that was found, empty where it names a version."""
    rest = reference.partition("@")[2] or registry.DEFAULT_ALIAS
    return "" if rest[0].isdigit() else rest


def _list_aliases(store: Store, name: str, version: str) -> list[str]:
    """The aliases that are at a version now; one that is damaged is named and left out."""
    at = []
    for alias in registry.list_aliases(store, name):
        try:
            move = registry.read_alias(store, name, alias)
        except RegistryError as fault:
            say(f"damaged: {fault}")
        else:
            at += [alias] if move and move.version == version else []
    return at


def _follow(store: Store, name: str, alias: str) -> Iterator[tuple[registry.AliasMove, str | None]]:
    """The moves of an alias, newest first, each with the version that it left; as far back as they can be read."""
    if not alias:
        return
    newer = None
    try:
        for move in registry.follow_alias(store, name, alias):
            if newer is not None:
                yield newer, move.version
            newer = move
    except RegistryError as fault:
        say(f"damaged: {fault}")
    if newer is not None:
        yield newer, None


def _to_json(move: registry.AliasMove, before: str | None) -> dict[str, Any]:
    facts = move.model_dump(include={"alias", "seq", "at", "actor", "reason", "forced", "asked_by"})
    return {**facts, "from": before, "to": move.version}


def _print_moves(store: Store, name: str, alias: str) -> None:
    """The last moves of an alias, a line each."""
    shown = list(itertools.islice(_follow(store, name, alias), _MOVES))
    for move, left in shown:
        before = left or ("nothing" if move.prev is None else "?")
        forced = " (--force)" if move.forced else ""
        text = f"{move.at}  {alias}: {before} -> {move.version}  {move.actor}: {' '.join(move.reason.split())}{forced}"
        click.echo(wrap(f"{'moved':10} {text}", indent=11))
    earlier = shown[-1][0].seq - 1 if shown else 0
    if earlier:
        click.echo(f"{'':10} and {say_count(earlier, 'move')} before; --json has all")


def _show_differences(before: str, older: Manifest, after: str, newer: Manifest, *, as_json: bool) -> None:
    """What the older one says, an arrow, what the newer one says."""
    found = list_differences(older, newer)
    names = f"{older.name}@{before}", f"{newer.name}@{after}"
    if as_json:
        print_json({"older": names[0], "newer": names[1], "differences": found})
        return
    click.echo(f"{names[0]} -> {names[1]}")
    width = max(map(len, found), default=0)
    for name, (was, became) in found.items():
        click.echo(f"{name:{width}}  {was} -> {became}")
    if not found:
        click.echo("nothing differs")
    if older.data_digest != newer.data_digest and older.git_commit and newer.git_commit:
        say(f"the rows: `appliance data diff {older.git_commit[:12]}..{newer.git_commit[:12]}`")
    if has_other_rows(older, newer):
        say("scores are of other test rows: only a verdict compares versions on the same ones")


def _read_proof(store: Store, manifest: Manifest) -> dict[str, Any]:
    """The verdict as the version's card tells it; empty, with a word, where it cannot be read."""
    try:
        card = json.loads(registry.read_file(store, manifest, "card/card.json") or b"{}")
    except (RegistryError, StoreError) as fault:
        say(f"no reasons: {fault}")
        return {}
    except ValueError:
        return {}
    proof = card.get("verdict", {}) if isinstance(card, dict) else {}
    return proof if isinstance(proof, dict) else {}


def _print_reasons(proof: dict[str, Any]) -> None:
    for reason in say_reasons(proof.get("reasons", ())):
        click.echo(wrap(f"{'':10} {reason}", indent=11))


def _print_scores(manifest: Manifest, proof: dict[str, Any]) -> None:
    """Each arm, then each category."""
    for arm, score in manifest.metrics.get("arms", {}).items():
        interval = proof.get("arms", {}).get(arm, {}).get("interval")
        sure = f", 95% interval {say_interval(interval)}" if interval else ""
        text = f"{manifest.metrics['metric']} {score:.3f} on {manifest.metrics['n']} rows{sure}"
        click.echo(f"{arm:10} {text}  ({ARM_NAMES.get(arm, arm)})")
    for category, arms in proof.get("slices", {}).items():
        scores = ", ".join(f"{arm} {each['score']:.3f}" for arm, each in arms.items())
        click.echo(f"{'category':10} {category}: {scores} on {max(each['n'] for each in arms.values())} rows")
