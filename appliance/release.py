"""The release: what a run is compared with, its artifact and card as one version, and the alias by the verdict."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from appliance import registry
from appliance.command import run_command
from appliance.digest import digest_file, list_files
from appliance.errors import CommandError, RegistryError
from appliance.manifest import FileEntry, Manifest
from appliance.method import FullMethod
from appliance.preparation import Origin, Prepared, Workspace, read_versions
from appliance.recipe import Recipe
from appliance.run import Run
from appliance.store import Store


def find_champion(prepared: Prepared, workspace: Workspace, store: Store) -> str | None:
    """The version behind the alias, when it was trained on the same base."""
    name, alias = prepared.recipe.name, prepared.recipe.publish.alias
    if registry.read_alias(store, name, alias) is None:
        return None
    version, manifest = registry.resolve(store, f"{name}@{alias}")
    if manifest.base.get("revision") != prepared.base.revision:
        workspace.note(f"the champion {version} has another base model; it is not compared")
        return None
    return version


def fetch_champion(run: Run, reference: str, store: Store) -> None:
    """Into the run's folder, in the place of an earlier one."""
    folder = run.folder / "champion"
    shutil.rmtree(folder, ignore_errors=True)
    registry.pull(store, reference, folder)


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
        versions=name_versions(run),
        parent=run.read("evaluate")["champion"],
    )


def name_versions(run: Run) -> dict[str, str]:
    """The versions and the image that trained; those of now where an earlier release trained, which kept none."""
    trained = run.read("train")
    return trained.get("versions") or read_versions(image=trained.get("image"))


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a recipe's alias should be: `target` is the version that it is to move to, empty where it stays.

    `asked_by` is the commit that wants it there and `reason` what the history says of it.
    `note` says what a person should know: that it goes back, or that it is not at what HEAD asks for, and why.
    """

    current: registry.AliasMove | None
    target: str = ""
    asked_by: str | None = None
    reason: str = ""
    note: str = ""


def promote_by_verdict(
    recipe: Recipe,
    version: str,
    manifest: Manifest,
    *,
    store: Store,
    origin: Origin,
    root: Path,
    is_new: bool = False,
) -> tuple[str, str]:
    """Move the recipe's alias where `judge_alias` wants it; the alias if it is at `version` now, and the note."""
    alias = recipe.publish.alias
    standing = judge_alias(recipe, version, manifest, store=store, origin=origin, root=root, is_new=is_new)
    current = standing.current
    if standing.target:
        current = registry.promote(
            store,
            name=recipe.name,
            version=standing.target,
            alias=alias,
            actor=origin.actor,
            reason=standing.reason,
            at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            expected=current.version if current else "nothing",
            asked_by=standing.asked_by,
        )
    return (alias if current is not None and current.version == version else ""), standing.note


def judge_alias(
    recipe: Recipe,
    version: str,
    manifest: Manifest,
    *,
    store: Store,
    origin: Origin,
    root: Path,
    is_new: bool = False,
) -> Standing:
    """Whether the alias should move, when `version` is what HEAD asks for; never for what no commit holds.

    One that `is_new`, published just now, was never behind the alias, whatever is left of the history.
    """
    standing = _judge_asked(recipe, version, manifest, store=store, origin=origin, root=root, is_new=is_new)
    if not standing.target or not origin.unheld:
        return standing
    alias, command = recipe.publish.alias, f"appliance promote {recipe.name}@{standing.target} {recipe.publish.alias}"
    said = f"{alias} is not moved: {origin.unheld}, then `appliance reconcile`; or as it is: `{command}`"
    return Standing(standing.current, note=said)


def _judge_asked(
    recipe: Recipe, version: str, manifest: Manifest, *, store: Store, origin: Origin, root: Path, is_new: bool
) -> Standing:
    """Where the alias goes by verdict, history and ancestry (docs/decisions/0043).

    A version that ships and has never been behind the alias gets it from the one that it was compared with. One that
    was there gets it back when a verdict moved the alias last and HEAD is newer than the commit that asked for that; a
    person's move stays. A commit older than the one that asked for what is there now moves nothing, however late, nor
    does one in a clone that does not know that commit, which may be newer than the clone.
    """
    name, alias = recipe.name, recipe.publish.alias
    current = registry.read_alias(store, name, alias)
    is_at_it = current is not None and current.version == version
    target = version if is_at_it or manifest.verdict == "ship" else _find_shipped(store, manifest)
    if not target or (current is not None and current.version == target):
        return Standing(current)
    head = origin.head or origin.commit or manifest.git_commit
    reason = f"verdict ship; HEAD {head} asks for it" if head else "verdict ship"
    moves = Standing(current, target, asked_by=head, reason=reason)
    if current is None:
        return moves
    there = registry.load_manifest(store, name, current.version)
    asked = current.asked_by or there.git_commit
    where = f"{alias} is at {current.version}"
    if _is_ancestor(head, asked, root=root):
        return Standing(current, note=f"{where}, which the newer commit {str(asked)[:12]} asked for; it stays")
    move_it = f"to move it: `appliance promote {name}@{target} {alias} --expected {current.version}`"
    try:
        was_there = not (is_new and target == version) and _was_there(current, target, store=store)
    except RegistryError as fault:
        return Standing(
            current, note=f"{where}, and whether {target} was there before is not known: {fault}; {move_it}"
        )
    if not was_there:
        parent = registry.load_manifest(store, name, target).parent
        is_compared = parent == current.version or manifest.base.get("revision") != there.base.get("revision")
        why = "" if is_compared else f"{target} was compared with {parent or 'no version in use'}"
        if asked and not why and _has_commit(head, root=root) and not _has_commit(asked, root=root):
            why = f"this clone lacks the commit {asked[:12]} that asked for it (`git fetch`, then reconcile again)"
        return Standing(current, note=f"{where}, and {why}; {move_it}") if why else moves
    if there.run_key == manifest.run_key:
        return Standing(current)
    if current.asked_by and _is_ancestor(asked, head, root=root):
        note = f"{alias} goes back from {current.version} to {target}, which HEAD asks for again"
        return replace(moves, reason=f"{reason} again", note=note)
    said = f"{where} ({current.actor}: {current.reason}), HEAD asks for {target}; {move_it}"
    return Standing(current, note=said)


def _was_there(current: registry.AliasMove, version: str, *, store: Store) -> bool:
    """Whether the alias was at the version, read back from its move now. Raises `RegistryError` before a broken one."""
    return any(move.version == version for move in registry.follow_alias(store, current.name, current.alias))


def _find_shipped(store: Store, manifest: Manifest) -> str:
    """The newest version of the same recipe, data and base that ships; empty without one."""
    versions = registry.list_versions(store, manifest.name)
    return registry.select_run([v for v in versions if v.verdict == "ship"], manifest.run_key) or ""


def _has_commit(commit: str | None, *, root: Path) -> bool:
    """Whether the repository has the commit: no clone has what was pushed after it was made, or written over."""
    try:
        run_command(["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=root)
    except CommandError:
        return False
    return True


def _is_ancestor(older: str | None, newer: str | None, *, root: Path) -> bool:
    """Whether one commit is a true ancestor of the other; no if history does not tell."""
    if older is None or newer is None or older == newer:
        return False
    try:
        run_command(["git", "merge-base", "--is-ancestor", older, newer], cwd=root)
    except CommandError:
        return False
    return True
