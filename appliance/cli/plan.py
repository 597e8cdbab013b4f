"""`appliance plan`."""

from __future__ import annotations

from pathlib import Path

import click

from appliance.cli.common import build_workspace, json_option, print_json, recipe_argument, say, workspace_options
from appliance.general import preview_replay
from appliance.model import load_template, render_row
from appliance.plan import Plan, read_machine
from appliance.preparation import plan_run, prepare
from appliance.recipe import load_recipe
from appliance.training import show_mask


@click.command("plan")
@recipe_argument
@workspace_options
@click.option(
    "--show-mask", "masks", type=click.IntRange(0, 100), default=0, help="Print N rows with trained tokens in colour."
)
@json_option
def command(*, recipe: Path, root: Path, cache: Path, runs: Path | None, masks: int, as_json: bool) -> None:
    """Show rows, tokens, steps, micro-batch and memory of RECIPE on this machine; trains nothing."""
    prepared = prepare(load_recipe(recipe), workspace=build_workspace(root=root, cache=cache, runs=runs))
    template = load_template(prepared.base.folder)
    rows = [render_row(e, template) for e in (*prepared.splits.train, *preview_replay(prepared))]
    if prepared.replay is not None and prepared.replay.examples is None:
        say("replay rows are not counted: the base model answers them when the recipe is run")
    plan = plan_run(prepared, rows=rows, machine=read_machine())
    if as_json:
        print_json({**plan.to_json(), "run_key": prepared.key})
        return
    _print_plan(plan, key=prepared.key)
    for row in rows[:masks]:
        pieces = show_mask(row, template)
        click.echo(f"\n{row.id}")
        click.echo("".join(click.style(text, fg="green", bold=True) if trained else text for text, trained in pieces))


def _print_plan(plan: Plan, *, key: str) -> None:
    click.echo(f"run         {key[:12]}")
    click.echo(f"rows        {plan.rows} train, {plan.validation_rows} validation; longest {plan.longest} tokens")
    click.echo(f"tokens      {plan.tokens:,}, of which {plan.trained_tokens:,} are trained on")
    click.echo(f"steps       {plan.steps} of {plan.effective_batch} rows (micro-batch {plan.micro_batch})")
    click.echo(f"parameters  {plan.trainable_parameters:,} trained of {plan.parameters:,}")
    checkpointing = "on" if plan.checkpointing else "off"
    click.echo(
        f"memory      about {plan.peak_bytes / 2**30:.1f} of {plan.budget_bytes / 2**30:.1f} GiB; "
        f"gradient checkpointing {checkpointing}"
    )
    for warning in plan.warnings:
        click.echo(click.style(f"warning: {warning}", fg="yellow"))
