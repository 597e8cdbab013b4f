"""The release: a finished run's artifact and card as one immutable version, and its alias by the verdict."""

from __future__ import annotations

import shutil
from pathlib import Path

from appliance import registry
from appliance.command import run_command
from appliance.digest import digest_file, list_files
from appliance.errors import CommandError
from appliance.manifest import FileEntry, Manifest
from appliance.method import FullMethod
from appliance.preparation import Origin, Prepared, read_versions
from appliance.recipe import Recipe
from appliance.run import Run
from appliance.store import Store


def collect_files(run: Run) -> Path:
    """The folder that is published: the artifact's files and the card's beside them."""
    folder = run.folder / "release"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run.adapter, folder)
    shutil.copytree(run.card, folder / "card")
    shutil.copyfile(run.card / "card.md", folder / "README.md")
    shutil.copyfile(run.evaluation / "results.jsonl", folder / "card" / "results.jsonl")
    return folder


def build_manifest(run: Run, prepared: Prepared, *, folder: Path) -> Manifest:
    """The manifest of the files in `folder`, from what the run's stages recorded."""
    record, trained, verdict = run.read("prepare"), run.read("train"), run.read("judge")["verdict"]
    files = [(n, folder / n) for n in list_files(folder)]
    return Manifest(
        schema=1,
        name=prepared.recipe.name,
        kind="model" if isinstance(prepared.recipe.method, FullMethod) else "adapter",
        run_key=run.key,
        created_at=record["time"],
        git_commit=record["commit"],
        files=tuple(FileEntry(path=n, size=p.stat().st_size, sha256=digest_file(p)) for n, p in files),
        recipe=prepared.recipe.model_dump(mode="json"),
        recipe_digest=prepared.recipe.digest,
        data_digest=prepared.dataset.digest,
        split_digest=prepared.splits.digest,
        base=prepared.base.to_json(),
        verdict=verdict["outcome"],
        metrics={
            "metric": verdict["metric"],
            "n": verdict["n"],
            "arms": {a: v["score"] for a, v in verdict["arms"].items()},
        },
        training=trained["summary"],
        versions=read_versions(image=trained.get("image")),
        parent=run.read("evaluate")["champion"],
    )


def promote_by_verdict(
    recipe: Recipe, version: str, manifest: Manifest, *, store: Store, origin: Origin, root: Path
) -> str:
    """Move the recipe's alias to a version that ships and has never been behind it; the alias if it is there now.

    A version that was there and is not any more was rolled back by a person: it stays so. A version
    from an older commit than the one behind the alias does not replace it, however late it is done.
    """
    alias = recipe.publish.alias
    seen = {entry.version for entry in registry.read_reflog(store, recipe.name) if entry.alias == alias}
    current = registry.read_alias(store, recipe.name, alias)
    if manifest.verdict == "ship" and version not in seen and not _is_behind(manifest, current, store=store, root=root):
        current = registry.promote(
            store,
            name=recipe.name,
            version=version,
            alias=alias,
            actor=origin.actor,
            reason="verdict ship",
            at=origin.time,
            expected=current.version if current else "nothing",
        )
    return alias if current is not None and current.version == version else ""


def _is_behind(manifest: Manifest, current: registry.AliasMove | None, *, store: Store, root: Path) -> bool:
    """Whether the version's commit is a true ancestor of the one behind the alias; no if history does not tell."""
    if current is None or manifest.git_commit is None:
        return False
    newer = registry.load_manifest(store, manifest.name, current.version).git_commit
    if newer in (None, manifest.git_commit):
        return False
    try:
        run_command(["git", "merge-base", "--is-ancestor", manifest.git_commit, str(newer)], cwd=root)
    except CommandError:
        return False
    return True
