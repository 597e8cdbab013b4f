"""`appliance reconcile`."""

from __future__ import annotations

from pathlib import Path

import click

from appliance.cli.common import (
    REFUSED,
    build_workspace,
    json_option,
    mirror_option,
    print_json,
    read_actor,
    store_option,
    tensorboard_option,
    workspace_options,
)
from appliance.reconcile import Outcome, reconcile
from appliance.store import open_store


@click.command("reconcile")
@store_option(required=True)
@workspace_options
@tensorboard_option
@mirror_option
@click.option("--only", multiple=True, metavar="RECIPE", help="Only this recipe (file name without .yaml); repeatable.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and why; train nothing.")
@click.option("--force", is_flag=True, help="Train even what has a version already.")
@click.option("--allow-dirty", is_flag=True, help="Train on recipes or data that are not committed.")
@json_option
def command(
    *,
    store_url: str,
    root: Path,
    cache: Path,
    runs: Path | None,
    tensorboard: Path | None,
    mirror_checkpoints: bool,
    only: tuple[str, ...],
    dry_run: bool,
    force: bool,
    allow_dirty: bool,
    as_json: bool,
) -> int:
    """Compare the repository's recipes and dataset commit with the registry, and make what is missing.

    A recipe whose recipe, data and base have a version costs nothing. Exit code 1 when a recipe
    failed, 3 when a verdict refused one.
    """
    store = open_store(store_url)
    outcomes = reconcile(
        build_workspace(
            root=root, cache=cache, runs=runs, tensorboard=tensorboard, mirror=store if mirror_checkpoints else None
        ),
        store=store,
        actor=read_actor(),
        only=only,
        dry_run=dry_run,
        force=force,
        allow_dirty=allow_dirty,
    )
    if as_json:
        print_json([_to_json(o) for o in outcomes])
    else:
        for outcome in outcomes:
            _print_outcome(outcome, dry_run=dry_run)
    return _exit_code(outcomes)


def _print_outcome(outcome: Outcome, *, dry_run: bool) -> None:
    words = {"none": "nothing to do", "train": "would train" if dry_run else "trained", "failed": "failed"}
    click.echo(f"{outcome.recipe}: {words[outcome.action]}: {outcome.reason}")
    finished = outcome.finished
    if finished is None or finished.was_done:
        return
    click.echo(f"  verdict  {finished.outcome}")
    for reason in finished.reasons:
        click.echo(f"           {reason}")
    click.echo(f"  version  {finished.name}@{finished.version}")
    if finished.alias:
        click.echo(f"  alias    {finished.name}@{finished.alias}")
    if finished.folder is not None:
        click.echo(f"  card     {finished.folder / 'card' / 'card.html'}")


def _to_json(outcome: Outcome) -> dict[str, object]:
    finished = outcome.finished
    return {
        "recipe": outcome.recipe,
        "action": outcome.action,
        "reason": outcome.reason,
        "version": finished.version if finished else None,
        "verdict": finished.outcome if finished else None,
        "alias": finished.alias if finished else None,
        "run": str(finished.folder) if finished and finished.folder else None,
    }


def _exit_code(outcomes: tuple[Outcome, ...]) -> int:
    failed = [o.error.exit_code for o in outcomes if o.error is not None]
    if failed:
        return max(failed)
    fresh = [o.finished for o in outcomes if o.finished is not None and not o.finished.was_done]
    return REFUSED if any(f.outcome in ("hold", "reject") for f in fresh) else 0
