"""What is known before anything is spent: the checked data, its split, the base, the key and the plan."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from appliance import __version__
from appliance.data import (
    OWN_ANSWER_TOKENS,
    Dataset,
    GeneralRows,
    Report,
    Splits,
    check_apart,
    check_dataset,
    digest_general,
    load_general,
    split_dataset,
)
from appliance.errors import DatasetError
from appliance.model import Base, TokenRow, resolve_base
from appliance.plan import Machine, Plan, build_plan
from appliance.recipe import ForgettingSection, Recipe
from appliance.run import build_run_key
from appliance.store import Store

_PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where things are: repository, bases, run folders, TensorBoard files (a folder per run), mirrored checkpoints."""

    root: Path
    cache: Path
    runs: Path
    note: Callable[[str], None]
    tensorboard: Path | None = None
    mirror: Store | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Which commit asked for the run, when (UTC, 2026-01-31T12:00:00Z), and who runs it."""

    commit: str | None
    time: str
    actor: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known before training: the checked data, the base, and the key of the run."""

    recipe: Recipe
    dataset: Dataset
    splits: Splits
    base: Base
    key: str
    replay: GeneralRows | None = None
    ewc: GeneralRows | None = None


def prepare(recipe: Recipe, *, workspace: Workspace) -> Prepared:
    """Check and split the data, bring the base model. Raises `DatasetError` listing every fault."""
    checked = check_data(recipe, root=workspace.root)
    if checked.errors or checked.dataset is None:
        raise DatasetError("\n".join(str(f) for f in checked.errors))
    for finding in checked.warnings:
        workspace.note(f"warning: {finding}")
    splits = split_dataset(checked.dataset, recipe.dataset.split)
    replay, ewc = _load_general(recipe.forgetting, splits=splits, root=workspace.root)
    base = resolve_base(recipe.base, root=workspace.root, cache=workspace.cache, note=workspace.note)
    key = build_run_key(
        recipe,
        data_digest=checked.dataset.digest,
        base_digest=base.digest,
        general_digest=digest_general(recipe.forgetting, replay, ewc),
    )
    return Prepared(recipe, checked.dataset, splits=splits, base=base, key=key, replay=replay, ewc=ewc)


def _load_general(
    section: ForgettingSection | None, *, splits: Splits, root: Path
) -> tuple[GeneralRows | None, GeneralRows | None]:
    """The rows to replay and those for the Fisher, none of which asks what the dataset asks."""
    sections = (section.replay, section.ewc) if section is not None else (None, None)
    replay, ewc = (load_general(s, root=root) if s is not None else None for s in sections)
    for rows in (r for r in (replay, ewc) if r is not None):
        check_apart(rows, splits)
    return replay, ewc


def check_data(recipe: Recipe, *, root: Path) -> Report:
    """The findings for a recipe's dataset; lengths are checked against the base when rows are prepared."""
    return check_dataset(
        root / recipe.dataset.path,
        split=recipe.dataset.split,
        gates_min_test_rows=recipe.evaluation.gates.min_test_rows,
    )


def plan_run(
    prepared: Prepared, *, rows: Sequence[TokenRow], machine: Machine, general: Sequence[TokenRow] = ()
) -> Plan:
    """The plan of a run over the token `rows` of its train split; trains nothing.

    `general` are those of the Fisher, none where the base model is still to write them.
    """
    limit = min(prepared.recipe.training.max_length, 2 * OWN_ANSWER_TOKENS)
    return build_plan(
        prepared.recipe,
        lengths=[len(r.input_ids) for r in rows],
        trained_tokens=sum(r.trained for r in rows),
        validation_rows=len(prepared.splits.validation),
        base=prepared.base.folder,
        machine=machine,
        longest_general=max((len(r.input_ids) for r in general), default=limit),
    )


def read_versions() -> dict[str, str]:
    """Versions of what makes the weights."""
    found = {"appliance": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
