"""A published version made again from its own record, and compared byte by byte.

Nothing of the user's is touched: the commit is checked out in a clone of its own, which shares the
repository's objects and DVC cache, and the run has its own folder. What a machine would choose by
itself (micro-batch, threads, dtype) is taken from the manifest, so that what is left to differ is
software and hardware, and those are named.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from appliance import registry
from appliance.command import run_command
from appliance.data import load_pointer, pull_data, run_dvc
from appliance.desired import POINTER
from appliance.digest import digest_file, list_files
from appliance.errors import CommandError, RegistryError
from appliance.manifest import Manifest
from appliance.pipeline import train_alone
from appliance.preparation import Origin, Prepared, Workspace, prepare
from appliance.recipe import Recipe
from appliance.store import Store

_COMPARED = (
    "device",
    "device_kind",
    "dtype",
    "threads",
    "micro_batch",
    "micro_batches",
    "devices",
    "sharded",
    "checkpointing",
    "checkpointing_since",
    "attention",
    "packing",
    "levers",
)


@dataclass(frozen=True, slots=True)
class Difference:
    """One file or recorded fact: what the version has, and what was made now (`-`: nothing)."""

    name: str
    recorded: str
    made: str


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What came of it: no file differs, or which do, and which facts might be the cause."""

    version: str
    files: tuple[Difference, ...]
    facts: tuple[Difference, ...]
    compared: int
    folder: Path | None

    @property
    def is_identical(self) -> bool:
        """Whether every file of the artifact has the recorded bytes."""
        return not self.files


def reproduce(reference: str, *, workspace: Workspace, store: Store) -> Reproduction:
    """Train a version again and compare its artifact's files with the manifest's.

    The run folder stays until the bytes are found identical, so that an interrupted one goes on and a
    different one can be looked at; with other versions, or in another image, it is made anew. Raises
    `RegistryError` when the version cannot be made again (no commit, another recipe format), and
    `ApplianceError`s of the stages.
    """
    version, manifest = registry.resolve(store, reference)
    recipe = _load_recipe(manifest, version)
    runs = workspace.runs / f"reproduce-{version}"
    with _check_out(manifest, version, workspace=workspace) as tree:
        _lend_base(recipe, tree, workspace.root)
        there = replace(workspace, root=tree, runs=runs, mirror=None)
        prepared = prepare(recipe, workspace=there)
        _check_inputs(manifest, prepared, version)
        origin = Origin(commit=manifest.git_commit, time=manifest.created_at, actor="")
        run = train_alone(prepared, workspace=there, origin=origin, choices=_read_choices(manifest))
    files, compared = _compare_files(manifest, run.adapter)
    trained = run.read("train")
    facts = _compare_facts(manifest, trained["summary"], versions=trained["versions"])
    if not files:
        shutil.rmtree(runs)
    return Reproduction(version, files, facts, compared, run.adapter if files else None)


def _load_recipe(manifest: Manifest, version: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(manifest.recipe)
    except ValidationError as fault:
        raise RegistryError(
            f"{manifest.name}@{version}: its recipe is not one of this release ({fault.errors()[0]['msg']}); "
            f"reproduce it with appliance {manifest.versions.get('appliance', 'of its time')}"
        ) from fault
    return recipe


@contextlib.contextmanager
def _check_out(manifest: Manifest, version: str, *, workspace: Workspace) -> Iterator[Path]:
    """The repository at the version's commit with its data, in a temporary clone."""
    commit, root = manifest.git_commit, workspace.root
    if commit is None:
        raise RegistryError(
            f"{manifest.name}@{version}: was made from files that were not committed; nothing says what they were"
        )
    workspace.note(f"checking out {commit[:12]} beside {root}")
    with tempfile.TemporaryDirectory(prefix="appliance-reproduce-") as folder:
        tree = Path(folder) / "tree"
        try:
            run_command(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=root)
        except CommandError as fault:
            raise CommandError(
                f"{root}: commit {commit[:12]} of {manifest.name}@{version} is not here; `git fetch` it, or give the "
                "repository with --root"
            ) from fault
        # A clone, not a worktree: nothing is written into the user's .git, and none of its hooks run.
        top = run_command(["git", "rev-parse", "--show-toplevel"], cwd=root).strip()
        prefix = run_command(["git", "rev-parse", "--show-prefix"], cwd=root).strip()
        run_command(["git", "clone", "--quiet", "--no-checkout", "--shared", top, str(tree)])
        run_command(["git", "-c", "advice.detachedHead=false", "checkout", "--quiet", "--detach", commit], cwd=tree)
        _pull(tree / prefix, root)
        yield tree / prefix


def _pull(tree: Path, root: Path) -> None:
    """The data of the clone's commit, through the settings and the cache that this machine has already."""
    settings = root / ".dvc" / "config.local"
    if settings.is_file():
        shutil.copyfile(settings, tree / ".dvc" / settings.name)
    cache = root / ".dvc" / "cache"
    if cache.is_dir():
        run_dvc("cache", "dir", "--local", str(cache), subject=root / POINTER, cwd=tree)
    pull_data(load_pointer(tree / POINTER), root=tree)


def _lend_base(recipe: Recipe, tree: Path, root: Path) -> None:
    """A base model that lies in the repository's folder without being committed is seen by the clone too.

    Its digest is compared with the manifest's like any other.
    """
    model = Path(recipe.base.model)
    if not recipe.base.is_hub and not model.is_absolute() and (root / model).exists() and not (tree / model).exists():
        (tree / model).parent.mkdir(parents=True, exist_ok=True)
        (tree / model).symlink_to((root / model).resolve())


def _check_inputs(manifest: Manifest, prepared: Prepared, version: str) -> None:
    """Refuse to train on anything but what the manifest records."""
    pairs = {
        "recipe": (manifest.recipe_digest, prepared.recipe.digest),
        "data": (manifest.data_digest, prepared.dataset.digest),
        "split": (manifest.split_digest, prepared.splits.digest),
        "base": (manifest.base, prepared.base.to_json()),
    }
    differ = [name for name, (recorded, found) in pairs.items() if recorded != found]
    if differ or manifest.run_key != prepared.key:
        subject = " and ".join(differ) or "base"
        raise RegistryError(
            f"{manifest.name}@{version}: its {subject} cannot be had here as recorded (other digests); "
            f"give the repository it was made in with --root, or use appliance {manifest.versions.get('appliance')}"
        )


def _read_choices(manifest: Manifest) -> dict[str, Any]:
    """What the plan chose on the machine of that time; what it began with where memory ran out later."""
    training = manifest.training
    history = training.get("micro_batches") or [[0, training.get("micro_batch")]]
    checkpointing = training.get("checkpointing")
    if "checkpointing_since" in training:
        checkpointing = training["checkpointing_since"] == 0
    chosen = {
        "micro_batch": history[0][1],
        "devices": training.get("devices"),
        "sharded": training.get("sharded"),
        "checkpointing": checkpointing,
        "threads": training.get("threads"),
        "precision": training.get("dtype"),
    }
    return {k: v for k, v in chosen.items() if v is not None}


def _compare_files(manifest: Manifest, folder: Path) -> tuple[tuple[Difference, ...], int]:
    """The artifact's files that differ, and how many there are; card and README are of the evaluation."""
    recorded = {f.path: f.sha256 for f in manifest.files if not f.path.startswith("card/") and f.path != "README.md"}
    made = {name: digest_file(folder / name) for name in list_files(folder)}
    return _compare(recorded, made), len(recorded)


def _compare_facts(
    manifest: Manifest, summary: Mapping[str, Any], *, versions: Mapping[str, str]
) -> tuple[Difference, ...]:
    """Versions, device and choices that are not those of the manifest."""
    known = [k for k in _COMPARED if k in manifest.training]
    recorded = {**manifest.versions, **{k: str(_plain(manifest.training[k])) for k in known}}
    made = {**versions, **{k: str(_plain(summary.get(k))) for k in known}}
    return _compare(recorded, made)


def _plain(value: Any) -> Any:
    """Pairs as lists and keys in one order, whether they come from JSON or not."""
    if isinstance(value, Mapping):
        return {k: _plain(value[k]) for k in sorted(value)}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _compare(recorded: Mapping[str, str], made: Mapping[str, str]) -> tuple[Difference, ...]:
    names = sorted(n for n in recorded.keys() | made.keys() if recorded.get(n) != made.get(n))
    return tuple(Difference(n, recorded.get(n, "-"), made.get(n, "-")) for n in names)
