"""Laws of `appliance reproduce`: a version made again from its commit has the same bytes, or it is said what differs.

Git and DVC are real, the model is tiny and really trains, the registry and the DVC remote are folders.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import make_recipe, write_base, write_dataset

from appliance import pipeline, preparation, registry, reproduction
from appliance.cli import main
from appliance.desired import read_origin
from appliance.digest import digest_file, digest_folder, list_files
from appliance.errors import CommandError, RegistryError
from appliance.manifest import FileEntry, Manifest
from appliance.pipeline import train_alone
from appliance.preparation import Workspace, prepare, read_versions
from appliance.recipe import Recipe
from appliance.reproduction import reproduce
from appliance.store import Store, open_store

QUIET = {
    "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "OMP_NUM_THREADS": "1",
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@localhost",
    "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@localhost",
}  # fmt: skip
pytestmark = pytest.mark.timeout(600)
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Published:
    """A repository that went on after it published `version`."""

    root: Path
    store: Store
    version: str

    @property
    def workspace(self) -> Workspace:
        """The repository's folders."""
        return Workspace(self.root, self.root / ".cache", self.root / ".appliance" / "runs", note=lambda _: None)

    def git(self, *arguments: str) -> str:
        """Run git in the repository."""
        return run(self.root, "git", *arguments)

    @property
    def options(self) -> list[str]:
        """Store and folders, for the command line."""
        return ["--store", self.store.url, "--root", str(self.root), "--cache", str(self.root / ".cache")]

    def describe_tree(self) -> list[str]:
        """All that a person would notice: HEAD, changes, branches, worktrees, and the rows on disk."""
        questions = (["rev-parse", "HEAD"], ["status", "--porcelain"], ["branch", "--all"], ["worktree", "list"])
        return [*(self.git(*q) for q in questions), digest_folder(self.root / "datasets")]

    def publish_variant(self, folder: Path, **changes: Any) -> str:
        """Another version with the same files but for what `changes` says of its manifest."""
        manifest = registry.load_manifest(self.store, "colours", self.version)
        changed = Manifest.model_validate({**manifest.model_dump(mode="json", by_alias=True), **changes})
        return registry.publish(self.store, manifest=changed, folder=folder)


def run(folder: Path, *argv: str) -> str:
    """Run a program that must succeed; its output."""
    env = {**os.environ, **QUIET}
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def quiet() -> Iterator[None]:
    """One core and no user settings: what is trained here and what is reproduced compete for nothing."""
    cores = os.sched_getaffinity(0)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET.items():
            patch.setenv(name, value)
        os.sched_setaffinity(0, {min(cores)})
        yield
        os.sched_setaffinity(0, cores)


@pytest.fixture(scope="module")
def published(quiet: None, tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A version of one commit; since then the data has grown, and there are changes that are not committed."""
    root = tmp_path_factory.mktemp("repository")
    write_base(root / "base")
    write_dataset(root / "datasets" / "colours", rows=60)
    (root / ".gitignore").write_text("/base\n/datasets\n/.appliance\n/.cache\n/remote\n/store\n")
    (root / "recipes").mkdir()
    recipe = make_recipe(training={"epochs": 1})
    file = root / "recipes" / "colours.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    run(root, "git", "init", "--quiet", "--initial-branch", "main")
    dvc = [sys.executable, "-m", "dvc"]
    run(root, *dvc, "init", "--quiet")
    run(root, *dvc, "remote", "add", "--default", "store", str(root / "remote"))
    commit_data(root)
    found = Published(root, open_store((root / "store").as_uri()), "")
    version = train_and_publish(recipe, found)
    write_dataset(root / "datasets" / "colours", rows=80)
    commit_data(root)
    file.write_text(file.read_text() + "# a change\n")
    return replace(found, version=version)


def train_and_publish(recipe: Recipe, project: Published) -> str:
    """Train as a run does and publish the artifact; what the evaluation adds plays no part here."""
    prepared = prepare(recipe, workspace=project.workspace)
    origin = read_origin(project.root, actor="tester")
    done = train_alone(prepared, workspace=project.workspace, origin=origin, choices={})
    files = {n: done.adapter / n for n in list_files(done.adapter)}
    manifest = Manifest(
        schema=1,
        name=recipe.name,
        kind="adapter",
        run_key=prepared.key,
        created_at=origin.time,
        git_commit=origin.commit,
        files=tuple(FileEntry(path=n, size=p.stat().st_size, sha256=digest_file(p)) for n, p in files.items()),
        recipe=recipe.model_dump(mode="json"),
        recipe_digest=recipe.digest,
        data_digest=prepared.dataset.digest,
        split_digest=prepared.splits.digest,
        base=prepared.base.to_json(),
        verdict="hold",
        metrics={},
        training=done.read("train")["summary"],
        versions=read_versions(),
    )
    return registry.publish(project.store, manifest=manifest, folder=done.adapter)


def commit_data(root: Path) -> None:
    """`dvc add`, `dvc push`, `git commit`."""
    dvc = [sys.executable, "-m", "dvc"]
    run(root, *dvc, "add", "--quiet", "datasets")
    run(root, *dvc, "push", "--quiet")
    run(root, "git", "add", "--all")
    run(root, "git", "commit", "--quiet", "--message", "data")


def test_a_version_is_made_again_byte_by_byte(published: Published, capsys: pytest.CaptureFixture[str]) -> None:
    """From its commit, beside a repository that is somewhere else and stays exactly as it is."""
    before = published.describe_tree()
    assert main(["reproduce", f"colours@{published.version}", *published.options]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"identical  {published.version}: 2 of 2 files")
    assert "fact" not in output
    assert published.describe_tree() == before
    assert not list((published.root / ".appliance" / "runs").glob("reproduce-*")), "identical bytes are not kept twice"


def test_what_differs_is_named(published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other bytes under the same facts, or other facts: each is told with both values, and the exit code is 1."""
    folder = tmp_path / "forged"
    manifest = registry.pull(published.store, f"colours@{published.version}", folder)
    (folder / WEIGHTS).write_bytes(b"other weights")
    files = [
        {"path": f.path, "size": (folder / f.path).stat().st_size, "sha256": digest_file(folder / f.path)}
        for f in manifest.files
    ]
    versions = {**manifest.versions, "torch": "1.0.0"}
    forged = published.publish_variant(folder, files=files, versions=versions)
    assert main(["reproduce", f"colours@{forged}", *published.options]) == 1
    output = capsys.readouterr().out
    assert output.startswith(f"different  {forged}: 1 of 2 files are the same")
    assert f"file  {WEIGHTS}: SHA-256 {digest_file(folder / WEIGHTS)[:12]}, made now" in output
    assert "fact  torch: 1.0.0, here 2" in output
    assert output.count("fact") == 1
    made = Path(output.rpartition("made  ")[2].strip())
    original = next(f.sha256 for f in manifest.files if f.path == WEIGHTS)
    assert digest_file(made / WEIGHTS) == original, "what was made is there to be looked at"


def test_what_other_versions_made_is_made_anew(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever installs what the facts name asks again, and is told of what those versions made, in their image."""
    folder, image, notes = tmp_path / "forged", f"registry.example/appliance@sha256:{'a' * 64}", list[str]()
    manifest = registry.pull(published.store, f"colours@{published.version}", folder)
    (folder / WEIGHTS).write_bytes(b"other weights")
    files = [
        {"path": f.path, "size": (folder / f.path).stat().st_size, "sha256": digest_file(folder / f.path)}
        for f in manifest.files
    ]
    versions = {**manifest.versions, "appliance": "99.0.0", "image": image}
    forged = published.publish_variant(folder, files=files, versions=versions)
    workspace = replace(published.workspace, note=notes.append)
    first = reproduce(f"colours@{forged}", workspace=workspace, store=published.store)
    assert [(f.name, f.recorded, f.made) for f in first.facts] == [
        ("appliance", "99.0.0", manifest.versions["appliance"]), ("image", image, "-")
    ]  # fmt: skip
    monkeypatch.setattr(preparation, "__version__", "99.0.0")
    for _ in range(2):
        again = reproduce(f"colours@{forged}", workspace=replace(workspace, image=image), store=published.store)
        assert again.facts == ()
        assert [f.name for f in again.files] == [WEIGHTS]
    assert len([n for n in notes if n.startswith("training ")]) == 2, "once by each"


def test_how_the_model_lay_and_computed_is_taken_over_and_compared(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full training ends in other bytes whole and in parts, and so do other levers: each is a fact."""
    _, manifest = registry.resolve(published.store, f"colours@{published.version}")
    others = {"sharded": True, "levers": {**manifest.training["levers"], "head": "fused"}, "packing": False}
    changed = manifest.model_copy(update={"training": {**manifest.training, **others}})
    compare_facts, made = reproduction._compare_facts, manifest.versions
    assert [f.name for f in compare_facts(changed, manifest.training, versions=made)] == [
        "levers",
        "packing",
        "sharded",
    ]
    assert compare_facts(manifest, json.loads(json.dumps(manifest.training)), versions=made) == ()

    monkeypatch.setattr(pipeline, "_train_stage", lambda *_a, **_k: None)
    prepared = prepare(Recipe.model_validate(manifest.recipe), workspace=published.workspace)
    origin = read_origin(published.root, actor="tester")
    workspace = replace(published.workspace, runs=published.root / ".appliance" / "shared-out")
    made = train_alone(prepared, workspace=workspace, origin=origin, choices=reproduction._read_choices(changed))
    assert made.read("prepare")["plan"]["sharded"] is True


def test_what_cannot_be_made_again_is_refused_before_training(published: Published, tmp_path: Path) -> None:
    """No commit, a commit of another repository, other data than recorded, a recipe of another time."""
    folder = tmp_path / "pulled"
    manifest = registry.pull(published.store, f"colours@{published.version}", folder)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"git_commit": None}, RegistryError, "not committed"),
        ({"git_commit": "1" * 40}, CommandError, "`git fetch` it"),
        ({"data_digest": "1" * 64}, RegistryError, "its data cannot be had here"),
        ({"base": {**manifest.base, "revision": "other"}}, RegistryError, "its base cannot be had here"),
        ({"recipe": {**manifest.recipe, "novelty": 1}}, RegistryError, "not one of this release"),
    ]
    for changes, error, message in cases:
        version = published.publish_variant(folder, **changes)
        with pytest.raises(error, match=message):
            reproduce(f"colours@{version}", workspace=published.workspace, store=published.store)
    shutil.rmtree(published.root / ".appliance" / "runs", ignore_errors=True)
