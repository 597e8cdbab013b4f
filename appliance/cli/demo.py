"""`appliance demo`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from appliance.cli.common import say
from appliance.cli.lines import show_example
from appliance.command import run_visible
from appliance.demo import DEMO_ROWS, GROWTH_ROWS, QUICK_ROWS, commit_dataset, prepare_repository, start_storage
from appliance.digest import write_atomic
from appliance.errors import ApplianceError, InterruptedRunError

_NAME, _ALIAS = "workplace-requests", "production"
_BUCKETS = ("datasets", "adapters")
_UNSEEN = (
    "Hello, the heater in room B 204 has gone cold again and people are freezing. It cannot wait, please hurry!",
    "need 3 keyboards for the new starters in D-118, no hurry",
    "Could you book me a train ticket for next week? It is not urgent.",
)


@dataclass(frozen=True, slots=True)
class _Stage:
    """Where the demo's commands run, and with which environment."""

    repository: Path
    workspace: Path
    environment: Mapping[str, str]

    def run(self, *arguments: str) -> None:
        """Show and run one `appliance` command. Raises with its exit code when it fails."""
        click.echo(click.style(f"\n$ {shlex.join(('appliance', *arguments))}", bold=True))
        sys.stdout.flush()
        argv = [sys.executable, "-m", "appliance", *arguments]
        code = run_visible(argv, cwd=self.repository, env=self.environment)
        if code == InterruptedRunError.exit_code:
            raise InterruptedRunError("the demo was stopped; what was finished is kept: run the same command to go on")
        if code not in (0, 3):
            raise _failed(arguments[0], code)


def _failed(verb: str, code: int) -> ApplianceError:
    fault = ApplianceError(
        f"demo: `appliance {verb}` ended with exit code {code}; mend what it said and run the demo again"
    )
    fault.exit_code = code
    return fault


@click.command("demo", epilog=show_example("appliance demo --quick"))
@click.option(
    "--workspace",
    type=click.Path(path_type=Path, file_okay=False),
    default="appliance-demo",
    show_default=True,
    help="Folder for everything the demo makes; run again in it, only what is missing is done.",
)
@click.option("--quick", is_flag=True, help="A tenth of the rows, one epoch: shows the way, not the gain.")
@click.option(
    "--full", is_flag=True, help="Then commit new rows and reconcile again: a second version appears, the first stays."
)
def command(*, workspace: Path, quick: bool, full: bool) -> None:
    """Run the main job end to end on this machine: S3 server, Git and DVC repository, training, verdict, registry.

    Everything is real and stays in the workspace; nothing outside this machine is needed.
    """
    began = time.monotonic()
    home = workspace.resolve()
    rows = QUICK_ROWS if quick else DEMO_ROWS
    _title(1, "start the object store (SeaweedFS, S3) and a Git repository with DVC")
    with start_storage(home / "storage", buckets=_BUCKETS) as storage:
        environment = {**storage.environment, "APPLIANCE_STORE": "s3://adapters/registry"}
        say(f"S3 at {storage.endpoint}, data in {home / 'storage'}")
        repository = prepare_repository(
            home / "repository", remote="s3://datasets/dvc", endpoint=storage.endpoint, quick=quick
        )
        stage = _Stage(repository=repository, workspace=home, environment=environment)
        _title(2, "write the dataset and commit it: dvc add, dvc push, git commit")
        say(commit_dataset(repository, rows=rows, message="Add workplace requests", env=environment))
        _title(3, "reconcile: check, split, train, evaluate, judge, publish, promote by the verdict")
        stage.run("reconcile")
        _title(4, "pull the adapter back by name, verify every byte, use it on unseen requests")
        _use_adapter(stage)
        _title(5, "reconcile again: nothing changed, so nothing is trained")
        stage.run("reconcile")
        if full:
            _title(6, f"commit {GROWTH_ROWS} new rows and reconcile: a second version, the first stays")
            message = f"Add {GROWTH_ROWS} workplace requests"
            say(commit_dataset(repository, rows=rows + GROWTH_ROWS, message=message, env=environment))
            stage.run("reconcile")
        stage.run("list")
        _close(home, repository, seconds=time.monotonic() - began)


def _use_adapter(stage: _Stage) -> None:
    """By alias when the verdict shipped it, else by version: the demo hides neither."""
    from appliance import registry
    from appliance.store import open_store

    os.environ.update(stage.environment)  # this process speaks to the same embedded store
    store = open_store(stage.environment["APPLIANCE_STORE"])
    alias = registry.read_alias(store, _NAME, _ALIAS)
    version = alias.version if alias else registry.list_versions(store, _NAME)[-1].version
    folder, shown = stage.workspace / "pulled", stage.workspace / "shown"
    is_shown = shown.is_file() and shown.read_text("utf-8") == version
    if not is_shown:
        shutil.rmtree(folder, ignore_errors=True)  # a fresh folder, so that every byte comes from the store
    stage.run("pull", f"{_NAME}@{_ALIAS if alias else version}", str(folder))
    if is_shown:
        say(f"every byte verified again; {version} was used on the unseen requests before")
        return
    asked = [word for text in _UNSEEN for word in ("--prompt", text)]
    stage.run("generate", str(folder), "--compare", "--max-new-tokens", "64", *asked)
    write_atomic(shown, version.encode())


def _close(home: Path, repository: Path, *, seconds: float) -> None:
    cards = sorted((repository / ".appliance" / "runs").glob("*/card/card.html"), key=lambda p: p.stat().st_mtime)
    click.echo()
    click.echo(f"card        {cards[-1]}" if cards else "card        none")
    click.echo(f"adapter     {home / 'pulled'}")
    click.echo(f"store       {home / 'storage'} (bucket adapters, prefix registry)")
    click.echo(f"repository  {repository}")
    click.echo(f"done in {seconds:.0f} s; the object store is stopped")


def _title(number: int, text: str) -> None:
    click.echo(click.style(f"\n[{number}] {text}", fg="cyan", bold=True))
    sys.stdout.flush()
