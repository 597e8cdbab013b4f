"""`appliance review`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from appliance import registry
from appliance.changes import diff_revisions
from appliance.cli.changes import describe_diff
from appliance.cli.common import build_workspace, json_option, print_json, say, store_option, workspace_options
from appliance.cli.lines import show_example
from appliance.cli.prices import Prices, describe_cost, describe_guess, describe_unknown, guess_hours, load_prices
from appliance.cli.sections import Section, print_section
from appliance.cli.summary import append_section, describe_outcomes
from appliance.data import check_pushed, load_pointer, pull_data
from appliance.desired import POINTER, find_ignored
from appliance.errors import ApplianceError, RegistryError, StoreError, UnreachableDataError
from appliance.general import preview_rows
from appliance.model import fit_template, load_template
from appliance.plan import read_machine
from appliance.preparation import Workspace, check_data, check_recipe, plan_run, prepare
from appliance.recipe import Recipe, load_recipe
from appliance.reconcile import UNASKED, Outcome, plan_from_git
from appliance.store import Store, open_store
from appliance.training import TokenCache

_ROWS, _FINDINGS = 50, 50
_ASKED = "what the registry has is told under Cost"
_UNKNOWN = "cannot be known from here; the same checks stop a training before anything is spent: "


@click.command("review", epilog=show_example("appliance review --since origin/main"))
@click.option("--since", metavar="REV", help="The commit to compare with; everything counts as new when left out.")
@store_option(required=False)
@workspace_options
@click.option(
    "--summary", type=click.Path(path_type=Path, dir_okay=False), help="Append the report to this file, as Markdown."
)
@json_option
def command(
    *,
    since: str | None,
    store_url: str | None,
    root: Path,
    cache: Path,
    runs: Path | None,
    summary: Path | None,
    as_json: bool,
) -> int:
    """Report what a change means before it is merged: recipes, rows, findings, plan and cost.

    Trains nothing and writes nothing to a store. Exit code 1 when a recipe or a row has an error, or the
    DVC remote lacks the data. Where the remote cannot be asked (a pull request has no credentials), it says so
    and reports the rest.
    """
    workspace = build_workspace(root=root, cache=cache, runs=runs)
    store = open_store(store_url) if store_url else None
    sections, faults = review(workspace, since=since if since and since.strip("0") else None, store=store)
    for section in sections:
        append_section(summary, section)
    if as_json:
        print_json({"sections": [s.to_json() for s in sections], "faults": faults})
    else:
        for section in sections:
            print_section(section)
    return 1 if faults else 0


def review(workspace: Workspace, *, since: str | None, store: Store | None) -> tuple[list[Section], int]:
    """The sections of the report and the number of errors."""
    try:
        outcomes = plan_from_git(workspace.root, since=since, unasked=_ASKED if store else UNASKED)
    except ApplianceError as fault:
        return [Section(title="Recipes", lines=(str(fault),))], 1
    told = describe_outcomes(outcomes, dry_run=True, ignored=find_ignored(workspace.root))
    sections, faults = [told], sum(o.action == "failed" for o in outcomes)
    wrong, is_here = _bring_data(workspace.root, is_trained=any(o.action == "train" for o in outcomes))
    if wrong is not None:
        is_unknown = isinstance(wrong, UnreachableDataError)
        sections.append(Section(title="Data", lines=((_UNKNOWN if is_unknown else "") + str(wrong),)))
        faults += not is_unknown
    if not is_here:
        return sections, faults
    sections += _describe_changes(workspace.root, since)
    valid = [o for o in outcomes if o.action != "failed"]
    for outcome in valid:
        found, errors = _check(outcome, workspace=workspace)
        faults += errors
        sections += found
    try:
        prices = load_prices(workspace.root)
    except ApplianceError as fault:
        return [*sections, Section(title="Cost", lines=(str(fault),))], faults + 1
    rows = tuple(_estimate(o, workspace=workspace, store=store, prices=prices) for o in valid if o.action == "train")
    columns = ("Recipe", "Rows", "Steps", "Tokens", "GPU time")
    return [*sections, *([Section(title="Cost", columns=columns, rows=rows)] if rows else [])], faults


def _bring_data(root: Path, *, is_trained: bool) -> tuple[ApplianceError | None, bool]:
    """What is wrong with the data or with asking for it, and whether it is on this disk all the same."""
    try:
        pointer = load_pointer(root / POINTER)
        pull_data(pointer, root=root)
    except ApplianceError as fault:
        return fault, False
    try:
        if is_trained:
            check_pushed(pointer, root=root)
    except ApplianceError as fault:
        return fault, True
    return None, True


def _describe_changes(root: Path, since: str | None) -> list[Section]:
    if since is None:
        return []
    try:
        return [
            s for d in diff_revisions(root, since, None) for s in describe_diff(d, revisions=f"{since}..", limit=_ROWS)
        ]
    except ApplianceError as fault:  # the older data is gone; the newer is checked all the same
        return [Section(title="Data", lines=(f"no comparison: {fault}",))]


def _check(outcome: Outcome, *, workspace: Workspace) -> tuple[list[Section], int]:
    """The findings for one recipe's dataset, each with its place."""
    recipe = _load(outcome, workspace)
    is_trained = outcome.action == "train"  # the others' rows have been through training, or will not go there
    report = check_recipe(recipe, workspace=workspace) if is_trained else check_data(recipe, root=workspace.root)
    rows = [(f.severity, str(f)) for f in (*report.errors, *report.warnings)]
    more = (f"... and {len(rows) - _FINDINGS} more: `appliance data check`",) if len(rows) > _FINDINGS else ()
    section = Section(f"Findings: {outcome.recipe}", ("Severity", "Finding"), tuple(rows[:_FINDINGS]), more)
    return [section] if rows else [], len(report.errors)


def _load(outcome: Outcome, workspace: Workspace) -> Recipe:
    return load_recipe(workspace.root / "recipes" / f"{outcome.recipe}.yaml")


def _estimate(outcome: Outcome, *, workspace: Workspace, store: Store | None, prices: Prices | None) -> tuple[str, ...]:
    """Rows, steps, tokens, and the time by the speed of the newest version, or else by arithmetic (`guess_hours`)."""
    recipe = _load(outcome, workspace)
    try:
        prepared = prepare(recipe, workspace=workspace)
        template = fit_template(load_template(prepared.base.folder), prepared.splits.train)
        rows, general = preview_rows(
            prepared, template=template, cache=TokenCache(workspace.cache / "tokens", note=say)
        )
        plan = plan_run(prepared, rows=rows, machine=read_machine(), general=general)
    except ApplianceError as fault:
        return (outcome.recipe, "", "", "", f"no plan from here: {str(fault).splitlines()[0]}")
    versions = _list_versions(store, recipe.name)
    made = registry.select_run(versions, prepared.key, is_committed=True)
    if made is not None:
        return (outcome.recipe, str(plan.rows), "", "", f"none: {made} was made from this recipe, data and base")
    speed, gpu = _read_speed(versions), prices.gpu if prices else ""
    guessed = guess_hours(recipe, base=prepared.base.folder, tokens=plan.tokens, gpu=gpu)
    if speed:
        cost = describe_cost(plan.tokens / speed / 3600, devices=plan.devices, prices=prices)
    elif guessed:
        cost = describe_guess(guessed, devices=plan.devices, gpu=gpu, prices=prices)
    else:
        cost = describe_unknown(prices)
    return (outcome.recipe, str(plan.rows), str(plan.steps), f"{plan.tokens:,}", cost)


def _list_versions(store: Store | None, name: str) -> tuple[registry.VersionInfo, ...]:
    """The model's versions, where the registry can be read."""
    if store is None:
        return ()
    try:
        return registry.list_versions(store, name)
    except (StoreError, RegistryError):
        return ()


def _read_speed(versions: Sequence[registry.VersionInfo]) -> float | None:
    """Tokens a second of the newest version that tells them."""
    speeds = [v.manifest.training.get("tokens_per_second") for v in versions]
    return next((float(s) for s in reversed(speeds) if s), None)
