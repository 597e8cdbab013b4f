"""`appliance doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from appliance.cli.common import (
    build_workspace,
    json_option,
    print_json,
    store_option,
    workspace_options,
)
from appliance.cli.lines import show_example, wrap
from appliance.errors import DeviceError
from appliance.plan import Check, examine_machine, read_machine

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "fault": ("fault", "red")}


@click.command("doctor", epilog=show_example("appliance doctor --gpu --store s3://BUCKET/registry"))
@workspace_options
@store_option(required=False)
@click.option("--gpu", "needs_gpu", is_flag=True, help="Fail with exit code 34 where there is no usable GPU.")
@json_option
def command(
    *, root: Path, cache: Path, runs: Path | None, store_url: str | None, needs_gpu: bool, as_json: bool
) -> int:
    """Look whether this machine can do the work: GPU, driver, torch, memory, disk, git, dvc, store.

    Nothing is trained and nothing is left behind. Exit code 1 when a line is a fault.
    """
    workspace = build_workspace(root=root, cache=cache, runs=runs)
    checks = examine_machine(
        read_machine(),
        folders={"runs": workspace.runs, "cache": workspace.cache},
        store_url=store_url,
    )
    if as_json:
        print_json([asdict(c) for c in checks])
    else:
        _print_checks(checks)
    if needs_gpu and not any(c.is_gpu for c in checks):
        action = "the lines above say what torch and the driver see; a container is given one by --gpus all"
        raise DeviceError(f"doctor: --gpu was given, found no usable GPU; {action}")
    return int(any(c.outcome == "fault" for c in checks))


def _print_checks(checks: list[Check]) -> None:
    for check in checks:
        word, color = _MARKS[check.outcome]
        text = wrap(f"{word:<8} {check.subject:<10} {check.found}", indent=20)
        click.echo(click.style(text[:8], fg=color) + text[8:])
        if check.action:
            click.echo(wrap(f"{'':<20}{check.action}", indent=20))
