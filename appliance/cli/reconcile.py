"""`appliance reconcile`."""

from __future__ import annotations

import traceback
from pathlib import Path

import click

from appliance.cli.common import (
    REFUSED,
    build_workspace,
    json_option,
    mirror_option,
    print_json,
    read_actor,
    say,
    store_option,
    tensorboard_option,
    workspace_options,
)
from appliance.cli.failures import say_bug
from appliance.cli.lines import show_example, wrap
from appliance.cli.summary import append_section, describe_action, describe_ignored, describe_outcomes, told_in
from appliance.desired import find_ignored
from appliance.errors import UnexpectedError
from appliance.reconcile import Choice, Outcome, find_unclaimed, plan_from_git, reconcile
from appliance.store import open_store


@click.command(
    "reconcile",
    epilog=show_example(
        "appliance reconcile --dry-run --store s3://BUCKET/registry",
        "appliance reconcile --only tickets --store s3://BUCKET/registry",
    ),
)
@store_option(required=False)
@workspace_options
@tensorboard_option
@mirror_option
@click.option("--only", multiple=True, metavar="RECIPE", help="Only this recipe (file name without .yaml); repeatable.")
@click.option("--since", metavar="REV", help="Only recipes that changed after this commit, or whose data did.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and why; train nothing.")
@click.option("--force", is_flag=True, help="Train even what has a version already.")
@click.option("--allow-dirty", is_flag=True, help="Train on recipes or data that are not committed or not pushed.")
@click.option(
    "--wait",
    "wait_minutes",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Minutes to wait for another reconcile that trains the same model.",
)
@click.option(
    "--summary", type=click.Path(path_type=Path, dir_okay=False), help="Append the outcomes to this file, as Markdown."
)
@json_option
def command(
    *,
    store_url: str | None,
    root: Path,
    cache: Path,
    runs: Path | None,
    tensorboard: Path | None,
    mirror_checkpoints: bool,
    only: tuple[str, ...],
    since: str | None,
    dry_run: bool,
    force: bool,
    allow_dirty: bool,
    wait_minutes: float,
    summary: Path | None,
    as_json: bool,
) -> int:
    """Compare the repository's recipes and dataset commit with the registry, and make what is missing.

    A recipe whose recipe, data and base have a version costs nothing. Exit code 1 when a recipe
    failed (70: by a bug), 3 when a verdict refused one. With --dry-run and no --store, Git alone is asked.
    """
    unclaimed: tuple[str, ...] = ()
    with told_in(summary, title="Reconcile"):
        if store_url is None:
            if not dry_run:
                raise click.UsageError("give --store (or APPLIANCE_STORE); only a --dry-run does without")
            outcomes = plan_from_git(root.resolve(), only=only, since=since)
        else:
            store = open_store(store_url)
            mirror = store if mirror_checkpoints else None
            workspace = build_workspace(root=root, cache=cache, runs=runs, tensorboard=tensorboard, mirror=mirror)
            outcomes = reconcile(
                workspace,
                store=store,
                actor=read_actor(),
                choice=Choice(only=only, since=since, force=force, allow_dirty=allow_dirty, wait_s=wait_minutes * 60),
                dry_run=dry_run,
            )
            unclaimed = find_unclaimed(workspace.root, store)
    for outcome in outcomes:
        if isinstance(outcome.error, UnexpectedError):
            say_bug("".join(traceback.format_exception(outcome.error.__cause__)))
    ignored = find_ignored(root.resolve())
    for line in describe_ignored(ignored):
        say(line)
    append_section(summary, describe_outcomes(outcomes, dry_run=dry_run, unclaimed=unclaimed, ignored=ignored))
    if as_json:
        print_json([_to_json(o) for o in outcomes])
    else:
        for outcome in outcomes:
            _print_outcome(outcome, dry_run=dry_run)
        for name in unclaimed:
            click.echo(f"{name}: in the registry, but no recipe here has this name (renamed or deleted?); it stays")
    return _exit_code(outcomes)


def _print_outcome(outcome: Outcome, *, dry_run: bool) -> None:
    text = f"{outcome.recipe}: {describe_action(outcome, dry_run=dry_run)}: {outcome.reason}"
    click.echo(wrap(text, indent=2))
    finished = outcome.finished
    if finished is None:
        return
    if finished.was_done:
        why = f"appliance show {finished.name}@{finished.version}"
        click.echo(wrap(f"  verdict  {finished.outcome}; why: `{why}`", indent=11))
        return
    click.echo(f"  verdict  {finished.outcome}")
    for reason in finished.reasons:
        click.echo(wrap(f"           {reason}", indent=11))
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
        "exit_code": outcome.error.exit_code if outcome.error else 0,
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
