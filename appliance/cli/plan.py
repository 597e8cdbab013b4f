"""`appliance plan`."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from appliance.cli.common import build_workspace, json_option, print_json, recipe_argument, say, workspace_options
from appliance.cli.lines import say_count, show_example, wrap
from appliance.cli.prices import describe_guess, guess_hours, load_prices
from appliance.errors import DeviceError
from appliance.general import preview_ewc, preview_replay, preview_rows
from appliance.model import ChatTemplate, TokenRow, fit_template, load_template
from appliance.plan import Machine, Plan, check_device, read_machine
from appliance.preparation import note_tokens, plan_run, prepare, rehearse
from appliance.recipe import Recipe, load_recipe
from appliance.training import TokenCache, describe_rows, show_mask

_BREAK = "⏎"
_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_LISTED = 5


@click.command("plan", epilog=show_example("appliance plan recipes/tickets.yaml --show-mask 3"))
@recipe_argument
@workspace_options
@click.option(
    "--show-mask", "masks", type=click.IntRange(0, 100), default=0, help="Print N rows with trained tokens in colour."
)
@json_option
def command(*, recipe: Path, root: Path, cache: Path, runs: Path | None, masks: int, as_json: bool) -> None:
    """Show rows, tokens, steps, micro-batch and memory of RECIPE on this machine; trains nothing."""
    workspace = build_workspace(root=root, cache=cache, runs=runs)
    prepared = prepare(load_recipe(recipe), workspace=workspace)
    template = fit_template(load_template(prepared.base.folder), prepared.splits.train)
    kept = TokenCache(workspace.cache / "tokens", note=say)
    rows, general = preview_rows(prepared, template=template, cache=kept)
    note_tokens(prepared, (*preview_replay(prepared), *preview_ewc(prepared)), template=template, workspace=workspace)
    rehearse(prepared, template=template, workspace=workspace)
    became = describe_rows(prepared.splits.train, rows)
    if prepared.replay is not None and prepared.replay.examples is None:
        say("replay rows are not counted: the base model answers them when the recipe is run")
    machine = read_machine()
    plan = _doubt_device(plan_run(prepared, rows=rows, machine=machine, general=general), prepared.recipe, machine)
    prices = load_prices(root)
    gpu = machine.gpu or (prices.gpu if prices else "")
    hours = guess_hours(prepared.recipe, base=prepared.base.folder, tokens=plan.tokens, gpu=gpu)
    if as_json:
        shown = [{"id": r.id, "pieces": show_mask(r, template)} for r in rows[:masks]]
        extra = {**({"masks": shown} if masks else {}), **({"hours": hours, "gpu": gpu} if hours else {})}
        print_json({**plan.to_json(), "run_key": prepared.key, "thinking": template.thinking, "train": became, **extra})
        return
    time = describe_guess(hours, devices=plan.devices, gpu=gpu, prices=prices) if hours else ""
    _print_plan(plan, key=prepared.key, time=time)
    _print_rows(became, thinking=template.thinking)
    _print_masks(rows[:masks], parts=Counter(r.id for r in rows), template=template)


def _doubt_device(plan: Plan, recipe: Recipe, machine: Machine) -> Plan:
    """The plan, which says first where a run would be refused by this machine."""
    try:
        check_device(recipe, machine)
    except DeviceError as fault:
        return replace(plan, warnings=(f"a run would be refused here: {fault}", *plan.warnings))
    return plan


def _print_plan(plan: Plan, *, key: str, time: str) -> None:
    click.echo(f"run         {key[:12]}")
    click.echo(f"rows        {plan.rows:,} train, {plan.validation_rows:,} validation; longest {plan.longest:,} tokens")
    epochs = say_count(plan.epochs, "epoch")
    click.echo(f"tokens      {plan.tokens:,} over {epochs}, of which {plan.trained_tokens:,} are trained on")
    on = f" on each of {plan.devices} devices" if plan.devices > 1 else ""
    step = min(plan.effective_batch, plan.rows)  # no batch goes on into the next epoch
    click.echo(f"steps       {plan.steps:,} of {step:,} rows (micro-batch {plan.micro_batch:,}{on})")
    click.echo(f"rate        {plan.learning_rate:g}")
    click.echo(f"parameters  {plan.trainable_parameters:,} trained of {plan.parameters:,}")
    checkpointing = "on" if plan.checkpointing else "off"
    sharded = f"; its layers shared out among {plan.devices} devices" if plan.sharded else ""
    click.echo(
        f"memory      about {plan.peak_bytes / 2**30:.1f} of {plan.budget_bytes / 2**30:.1f} GiB; "
        f"gradient checkpointing {checkpointing}{sharded}"
    )
    if time:
        click.echo(wrap(f"time        {time}", indent=12))
    for warning in plan.warnings:
        click.echo(click.style(wrap(f"warning: {warning}", indent=2), fg="yellow"))


def _print_rows(became: dict[str, Any], *, thinking: str) -> None:
    """What the template made of the rows, where it is not one token row each."""
    if thinking != "fixed":
        click.echo(f"thinking    {thinking}: the rows' answers {'think' if thinking == 'on' else 'do not think'}")
    if became["split"]:
        text = (
            f"split       {len(became['split'])} of {became['rows']} rows became several token rows: "
            f"the chat template rewrites earlier turns ({_list(became['split'])})"
        )
        click.echo(wrap(text, indent=12))
    if became["dropped"]:
        dropped = became["dropped"]
        text = f"warning: {len(dropped)} rows are too long and would be dropped whole ({_list(dropped)})"
        click.echo(click.style(wrap(text, indent=2), fg="yellow"))


def _list(ids: list[str]) -> str:
    return ", ".join(ids[:_LISTED]) + (", ..." if len(ids) > _LISTED else "")


def _print_masks(rows: tuple[TokenRow, ...], *, parts: Counter[str], template: ChatTemplate) -> None:
    """The rows with what is trained marked twice, by `>` and by colour, so that a log shows it too.

    Control tokens are in another colour; a line break of the row is shown as a sign and breaks the line.
    """
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row.id] += 1
        part = f", part {seen[row.id]} of {parts[row.id]}" if parts[row.id] > 1 else ""
        head = f"row {row.id}{part}: {row.trained} of {len(row.input_ids)} tokens are trained (>)"
        click.echo("\n" + click.style(head, bold=True))
        is_open: bool | None = None
        for text, is_trained, is_token in show_mask(row, template):
            for line in _LINES.findall(text.replace("\r", "␍")):
                if is_open is not is_trained:
                    click.echo("" if is_open is None else "\n", nl=False)
                    click.echo("  > " if is_trained else "    ", nl=False)
                is_open = None if line.endswith("\n") else is_trained
                click.echo(_style(line.rstrip("\n"), is_trained=is_trained, is_token=is_token), nl=False)
                if is_open is None:
                    click.echo(click.style(_BREAK, dim=True))
        if is_open is not None:
            click.echo()


def _style(text: str, *, is_trained: bool, is_token: bool) -> str:
    if is_token:
        return click.style(text, fg="magenta", bold=is_trained)
    return click.style(text, fg="green", bold=True) if is_trained else text
