"""Options that several verbs share, and what they turn into."""

from __future__ import annotations

import getpass
import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from appliance import desired
from appliance.cli.lines import wrap
from appliance.desired import POINTER
from appliance.pipeline import Finished
from appliance.preparation import Origin, Workspace
from appliance.recipe import Recipe
from appliance.store import Store, find_folder, open_store

F = TypeVar("F", bound=Callable[..., Any])

REFUSED = 3

recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
tensorboard_option = click.option(
    "--tensorboard",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="APPLIANCE_TENSORBOARD",
    show_envvar=True,
    help="Also write TensorBoard event files, one folder per run, into this folder.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def store_option(*, required: bool) -> Callable[[F], F]:
    """`--store`, also read from APPLIANCE_STORE."""
    return click.option(
        "--store",
        "store_url",
        envvar="APPLIANCE_STORE",
        show_envvar=True,
        required=required,
        metavar="URL",
        help="The registry: s3://bucket/prefix (endpoint and credentials by the AWS conventions) or file:///folder.",
    )


def find_root(here: Path) -> Path:
    """The repository that a folder is in, as Git and DVC find theirs; `here` where none is above it.

    A folder with recipes or datasets of its own is never left.
    """
    for folder in (here, *here.resolve().parents):
        found = [n for n in ("recipes", "datasets", POINTER, ".dvc") if os.path.exists(folder / n)]  # noqa: PTH110 - never raises
        if found and found != [".dvc"]:
            is_ours = "recipes" in found and (POINTER in found or ".dvc" in found)
            return folder if is_ours else here
    return here


def _choose_root(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    is_given = context.get_parameter_source(parameter.name or "") is not ParameterSource.DEFAULT
    return value if is_given else find_root(value)


root_option = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False),
    default=".",
    show_default="the one that this folder is in",
    callback=_choose_root,
    help="The repository: dataset and base paths in a recipe start here.",
)
cache_option = click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="APPLIANCE_CACHE",
    show_envvar=True,
    default=lambda: Path.home() / ".cache" / "appliance",
    show_default="~/.cache/appliance",
    help="Folder for base models and token rows.",
)
_runs_option = click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="APPLIANCE_OUT",
    show_envvar=True,
    help="Folder of run folders; ROOT/.appliance/runs when left out.",
)


def workspace_options(function: F) -> F:
    """`--root`, `--cache` and `--runs`."""
    return root_option(cache_option(_runs_option(function)))


mirror_option = click.option(
    "--mirror-checkpoints",
    is_flag=True,
    envvar="APPLIANCE_MIRROR_CHECKPOINTS",
    show_envvar=True,
    help="Keep checkpoints in the store too, and go on from those of a lost host.",
)


def build_workspace(
    *, root: Path, cache: Path, runs: Path | None, tensorboard: Path | None = None, mirror: Store | None = None
) -> Workspace:
    """The folders of one invocation, absolute."""
    home = root.resolve()
    return Workspace(
        root=home,
        cache=cache.expanduser().resolve(),
        runs=runs.expanduser().resolve() if runs else home / ".appliance" / "runs",
        note=say,
        tensorboard=tensorboard.expanduser().resolve() if tensorboard else None,
        mirror=mirror,
        image=os.environ.get("APPLIANCE_IMAGE") or None,
    )


def find_origin(path: Path, recipe: Recipe, *, root: Path) -> Origin:
    """The commit behind the recipe at `path` and its rows; now and no commit where what is on disk is not committed."""
    now = Origin(commit=None, time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), actor=read_actor())
    return desired.find_origin(path, recipe, root=root.resolve(), now=now)


def read_actor() -> str:
    """Who runs this, for the history of an alias."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "unknown"


def open_given_store(url: str | None) -> Store | None:
    """The store, when one was given."""
    return open_store(url) if url else None


def describe_missing_folder(store: Store) -> str:
    """What to say of a store in a folder that is not there, which reads like an empty registry; else nothing."""
    folder = find_folder(store)
    if folder is None or folder.is_dir():
        return ""
    return f"{store.url}: no such folder; look at the spelling (the first publish makes it)"


def choose_mirror(store: Store | None, *, is_asked: bool) -> Store | None:
    """Where checkpoints are kept too: the store, when it is asked for."""
    if is_asked and store is None:
        raise click.UsageError("--mirror-checkpoints: no store to keep them in; give --store")
    return store if is_asked else None


def say(text: str) -> None:
    """One line of what is being done, to standard error."""
    sys.stderr.write(wrap(f"  {text}", indent=4, stream=sys.stderr) + "\n")
    sys.stderr.flush()


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2, sort_keys=True))


def print_finished(finished: Finished) -> int:
    """Say how a run ended and return the exit code: 3 when the verdict refuses, now or when the version was made.

    So the same command says the same again. `reconcile` is another question: whether anything new was refused.
    """
    if finished.outcome:
        click.echo(f"verdict   {finished.outcome}")
    for reason in finished.reasons:
        click.echo(wrap(f"          {reason}", indent=10))
    if finished.folder is not None:
        click.echo(f"run       {finished.folder}")
        made = f"card      {finished.folder / 'card' / 'card.html'}"
        click.echo(made if finished.outcome else f"adapter   {finished.folder / 'adapter'}")
    if finished.version:
        click.echo(f"version   {finished.name}@{finished.version}" + (" (already there)" if finished.was_done else ""))
    if finished.version and finished.was_done:
        click.echo(f"why       appliance show {finished.name}@{finished.version}")
    if finished.alias:
        click.echo(f"alias     {finished.name}@{finished.alias}")
    if finished.note:
        click.echo(f"note      {finished.note}")
    return REFUSED if finished.outcome in ("hold", "reject") else 0
