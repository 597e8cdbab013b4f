"""Laws of the main job, on real parts: SeaweedFS, DVC, Git, and a tiny model that really trains.

The repository asks, the registry has, reconcile makes the difference, and nothing half-made is
ever seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import make_recipe, write_base, write_dataset

from appliance import registry
from appliance.demo.storage import Storage
from appliance.desired import read_origin
from appliance.digest import digest_bytes
from appliance.errors import CommandError, DatasetError, RecipeError
from appliance.preparation import Workspace
from appliance.reconcile import Choice, Outcome, reconcile
from appliance.store import Store, open_store

QUIET = {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
AUTHOR = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@localhost",
    "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@localhost",
}  # fmt: skip
TRAINING = {"epochs": 6, "learning_rate": 0.01, "effective_batch": 8, "max_length": 256, "checkpoints": 4}
GATES = {"min_test_rows": 20}


@dataclass(frozen=True)
class Project:
    """A team's repository, its DVC remote and registry on SeaweedFS."""

    root: Path
    store: Store
    environment: dict[str, str]

    def commit_data(self, *, rows: int, shuffle: bool = False) -> str:
        """Write rows, `dvc add`, `dvc push`, `git commit`; the commit."""
        write_dataset(self.root / "datasets" / "colours", rows=rows, shuffle=shuffle)
        self.run(sys.executable, "-m", "dvc", "add", "--quiet", "datasets")
        self.run(sys.executable, "-m", "dvc", "push", "--quiet")
        return self.commit(f"{rows} rows")

    def commit(self, message: str) -> str:
        """Commit everything."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)
        return self.run("git", "rev-parse", "HEAD").strip()

    def write_recipe(self, file: str = "colours", /, **overrides: Any) -> None:
        """Write `recipes/FILE.yaml`."""
        recipe = make_recipe(**{"training": TRAINING, "evaluation": {"gates": GATES}, **overrides})
        text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True))
        (self.root / "recipes" / f"{file}.yaml").write_text(text)

    def run(self, *argv: str) -> str:
        """Run a program in the repository."""
        env = {**os.environ, **QUIET, **AUTHOR, **self.environment}
        done = subprocess.run(argv, cwd=self.root, env=env, capture_output=True, text=True, check=True)
        return done.stdout

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start one `appliance` command in the repository."""
        env = {**os.environ, **QUIET, **self.environment}
        argv = [sys.executable, "-m", "appliance", *arguments]
        return subprocess.Popen(argv, cwd=self.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def reconcile(self, *, dry_run: bool = False, **choice: Any) -> tuple[Outcome, ...]:
        """Reconcile in this process."""
        workspace = Workspace(self.root, self.root / ".cache", self.root / ".appliance" / "runs", note=lambda _: None)
        return reconcile(workspace, store=self.store, actor="tester", choice=Choice(**choice), dry_run=dry_run)

    def versions(self) -> list[str]:
        """The published versions, oldest first."""
        return [v.version for v in registry.list_versions(self.store, "colours")]

    def alias(self) -> str | None:
        """What `production` points at."""
        move = registry.read_alias(self.store, "colours", "production")
        return move.version if move else None


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def make_project(base: Path, storage: Storage, s3: Storage, tmp_path: Path) -> Callable[[], Project]:
    """A builder of fresh projects; `s3` points this process at the server."""

    def build(name: str = "repository") -> Project:
        return build_project(tmp_path / name, base=base, storage=storage)

    return build


def build_project(root: Path, *, base: Path, storage: Storage) -> Project:
    """A team's repository with a recipe, its DVC remote and registry on SeaweedFS; no data yet."""
    (root / "recipes").mkdir(parents=True)
    prefix = digest_bytes(str(root).encode())[:12]
    url = f"s3://registry/{prefix}"
    environment = {**storage.environment, "APPLIANCE_STORE": url, "APPLIANCE_CACHE": str(root / ".cache")}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in storage.environment.items():
            patch.setenv(name, value)
        project = Project(root, open_store(url), environment)
    shutil.copytree(base, root / "base")
    (root / ".gitignore").write_text("/base\n/datasets\n/.appliance\n/.cache\n")
    project.run("git", "init", "--quiet", "--initial-branch", "main")
    project.run(sys.executable, "-m", "dvc", "init", "--quiet")
    project.run(sys.executable, "-m", "dvc", "remote", "add", "--default", "store", f"s3://datasets/{prefix}")
    project.run(sys.executable, "-m", "dvc", "remote", "modify", "store", "endpointurl", storage.endpoint)
    project.write_recipe()
    return project


def test_a_dataset_commit_becomes_a_version_once(make_project: Callable[[], Project]) -> None:
    """The life of a model: trained once, not again, grown, spoilt and held, rolled back and left alone."""
    project = make_project()
    # adapters on frozen random weights learn nothing; training all of them does
    project.write_recipe(method={"type": "full"}, training={**TRAINING, "learning_rate": 0.003})
    commit = project.commit_data(rows=200)

    (planned,) = project.reconcile(dry_run=True)
    assert (planned.action, project.versions()) == ("train", [])

    (first,) = project.reconcile()
    assert first.action == "train", first.reason
    assert first.finished is not None
    assert (first.finished.outcome, first.finished.alias) == ("ship", "production"), first.finished.reasons
    assert project.versions() == [first.finished.version]
    assert project.alias() == first.finished.version
    assert commit[:12] in first.finished.version

    shutil.rmtree(project.root / ".appliance")
    (again,) = project.reconcile()
    assert (again.action, project.versions()) == ("none", [first.finished.version])
    assert not (project.root / ".appliance").exists(), "nothing was even begun"
    shutil.rmtree(project.root / "datasets")
    (unseen,) = project.reconcile()
    assert (unseen.action, unseen.reason) == ("none", again.reason)
    assert not (project.root / "datasets").exists(), "the registry and Git know it without the data"

    project.commit_data(rows=240)
    (second,) = project.reconcile()
    assert second.finished is not None
    assert len(project.versions()) == 2
    assert project.versions()[0] == first.finished.version
    assert second.finished.folder is not None
    verdict = json.loads((second.finished.folder / "evaluation" / "verdict.json").read_bytes())
    assert set(verdict["arms"]) == {"zero_shot", "few_shot", "champion", "candidate"}
    in_use = project.alias()

    project.commit_data(rows=236, shuffle=True)
    (worse,) = project.reconcile()
    assert worse.finished is not None
    assert worse.finished.outcome != "ship"
    assert len(project.versions()) == 3, "what was held is published, for people to look at"
    assert project.alias() == in_use

    registry.promote(
        project.store, name="colours", version=first.finished.version, alias="production",
        actor="tester", reason="rolled back", at="2026-01-01T00:00:00Z", force=True,
    )  # fmt: skip
    project.run("git", "revert", "--no-edit", "HEAD")
    (reverted,) = project.reconcile()
    assert reverted.action == "none"
    assert project.alias() == first.finished.version, "a rollback by a person stays"


def test_what_was_pulled_is_what_was_trained(make_project: Callable[[], Project], tmp_path: Path) -> None:
    """A consumer gets the adapter's bytes, its card and a manifest that tells where all of it is from."""
    project = make_project()
    commit = project.commit_data(rows=120)
    (outcome,) = project.reconcile()
    assert outcome.finished is not None
    assert outcome.finished.folder is not None
    registry.pull(project.store, f"colours@{outcome.finished.version}", tmp_path / "pulled")
    weights = "adapter_model.safetensors"
    ours = (outcome.finished.folder / "adapter" / weights).read_bytes()
    assert (tmp_path / "pulled" / weights).read_bytes() == ours
    manifest = registry.load_manifest(project.store, "colours", outcome.finished.version)
    assert manifest.git_commit == commit
    card = json.loads((tmp_path / "pulled" / "card" / "card.json").read_bytes())
    assert card["git_commit"] == commit
    assert card["verdict"]["outcome"] == manifest.verdict
    assert str(project.root) not in json.dumps(card) + manifest.model_dump_json(), "no path of this machine"


def test_a_killed_run_is_healed_by_the_next_reconcile(make_project: Callable[[], Project]) -> None:
    """SIGKILL of everything in training: nothing is visible, and the next one resumes and publishes."""
    project = make_project()
    project.write_recipe(training={**TRAINING, "epochs": 30})
    project.commit_data(rows=120)
    child = project.start("reconcile")
    wait_for(lambda: list(project.root.glob(".appliance/runs/*/training/checkpoints/checkpoint-*/sealed.json")), child)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    child.kill()
    for worker in workers:
        os.kill(int(worker), signal.SIGKILL)
    child.communicate(timeout=60)
    assert project.versions() == []
    healed = project.start("reconcile")
    _, said = healed.communicate(timeout=250)
    assert healed.returncode in (0, 3), said
    assert "resuming from step" in said
    assert len(project.versions()) == 1


def wait_for(happened: Callable[[], object], child: subprocess.Popen[str]) -> None:
    """Wait until something happened, or the child ended, or two minutes have passed."""
    deadline = time.monotonic() + 120
    while not happened() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


STAGES = ("lock", "training/job.json", "training/metrics.jsonl", "training/summary.json",
          "evaluation/job.json", "evaluation/outputs.jsonl", "card/card.json")  # fmt: skip


@pytest.mark.parametrize("stages", [STAGES[::3], pytest.param(STAGES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_an_interruption_at_any_stage_loses_nothing(make_project: Callable[[], Project], stages: Sequence[str]) -> None:
    """Ctrl-C at each stage in turn: one message, exit 33, and in the end one version, the same as without."""
    project = make_project()
    project.commit_data(rows=120)
    for stage in stages:
        child = project.start("reconcile")
        wait_for(lambda stage=stage: is_written(project, stage), child)
        assert stop(child), f"{stage}: the run ended before it was stopped"
        assert project.versions() == [], "nothing half-made is visible"
    finish_and_compare(project)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # thirty starts of up to 8 s, what they take to stop, and two whole runs
@pytest.mark.parametrize("seed", range(4))
def test_interruptions_at_random_moments_lose_nothing(make_project: Callable[[], Project], seed: int) -> None:
    """Ctrl-C again and again, wherever it hits."""
    project = make_project()
    project.commit_data(rows=120)
    rng, stops = random.Random(seed), 0
    for _ in range(30):
        child = project.start("reconcile")
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=rng.uniform(0.5, 8.0))
        if not stop(child):
            break
        stops += 1
        assert len(project.versions()) <= 1
    assert stops
    finish_and_compare(project)


def is_written(project: Project, name: str) -> bool:
    """Whether a file of the run is there and has content (the lock has none)."""
    return any(f.stat().st_size or name == "lock" for f in project.root.glob(f".appliance/runs/*/{name}"))


def stop(child: subprocess.Popen[str]) -> bool:
    """Ctrl-C; whether it came in time. Either way there is no traceback."""
    child.send_signal(signal.SIGINT)
    output, errors = child.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    if child.returncode == -signal.SIGINT:  # before it had begun
        return True
    if child.returncode != 33:
        assert child.returncode in (0, 3), output + errors
        return False
    assert "run the same command" in errors
    return True


def finish_and_compare(project: Project) -> None:
    """The same command finishes the job; an undisturbed run elsewhere gives the same weights."""
    child = project.start("reconcile")
    output, errors = child.communicate(timeout=250)
    assert child.returncode in (0, 3), output + errors
    (version,) = project.versions()
    kept = registry.load_manifest(project.store, "colours", version)
    shutil.rmtree(project.root / ".appliance")
    fresh = replace(project, store=open_store(f"file://{project.root / 'other'}"))
    (whole,) = fresh.reconcile()
    assert whole.finished is not None
    other = registry.load_manifest(fresh.store, "colours", whole.finished.version)
    weights = {f.path: f.sha256 for f in kept.files if f.path.endswith(".safetensors")}
    assert weights == {f.path: f.sha256 for f in other.files if f.path.endswith(".safetensors")}


def test_one_failing_recipe_does_not_stop_the_others(make_project: Callable[[], Project]) -> None:
    """Each recipe has its own outcome; two recipes with one model name are both refused."""
    project = make_project()
    (project.root / "recipes" / "broken.yaml").write_text("name: x\nbase: {}\n")
    project.write_recipe("lost", name="lost", base={"model": "./nowhere"})
    project.write_recipe("twin-a", name="twin")
    project.write_recipe("twin-b", name="twin")
    project.commit_data(rows=120)
    outcomes = {o.recipe: o for o in project.reconcile(dry_run=True)}
    assert {n: o.action for n, o in outcomes.items()} == {
        "broken": "failed", "colours": "train", "lost": "failed", "twin-a": "failed", "twin-b": "failed",
    }  # fmt: skip
    assert "broken.yaml:2" in outcomes["broken"].reason
    assert "nowhere" in outcomes["lost"].reason
    assert "one model, one recipe" in outcomes["twin-a"].reason
    assert [o.recipe for o in project.reconcile(dry_run=True, only=("colours",))] == ["colours"]
    with pytest.raises(RecipeError, match="--only nobody"):
        project.reconcile(dry_run=True, only=("nobody",))


def test_only_what_is_committed_is_trained(make_project: Callable[[], Project]) -> None:
    """A changed recipe is refused; with --allow-dirty it is planned, and no commit is named as its origin."""
    project = make_project()
    with pytest.raises(CommandError, match="the Git repository has no commit yet; `git add --all && git commit`"):
        project.reconcile()
    project.commit_data(rows=120)
    project.write_recipe(training={**TRAINING, "epochs": 2})
    (refused,) = project.reconcile()
    assert refused.action == "failed"
    assert "recipes/colours.yaml: not what the commit HEAD holds; commit it, or give --allow-dirty" in refused.reason
    assert [o.action for o in project.reconcile(dry_run=True, allow_dirty=True)] == ["train"]
    assert read_origin(project.root, actor="x").commit is None
    (project.root / "datasets.dvc").write_text((project.root / "datasets.dvc").read_text() + "# changed\n")
    with pytest.raises(CommandError, match=r"datasets\.dvc: not what the commit HEAD holds.*--allow-dirty"):
        project.reconcile()


def test_data_that_is_not_there_stops_before_anything_is_spent(make_project: Callable[[], Project]) -> None:
    """A pointer in conflict, rows that were never pushed: one message, nothing trained."""
    project = make_project()
    project.commit_data(rows=120)
    pointer = project.root / "datasets.dvc"
    kept = pointer.read_text()
    pointer.write_text("<<<<<<< HEAD\n" + kept)
    project.commit("conflict")
    with pytest.raises(DatasetError, match="conflict markers"):
        project.reconcile()
    pointer.write_text(kept.replace(yaml.safe_load(kept)["outs"][0]["md5"], "0" * 32 + ".dir"))
    project.commit("lost")
    with pytest.raises(DatasetError, match="dvc push"):
        project.reconcile()


def test_a_row_that_breaks_its_contract_stops_its_recipe(make_project: Callable[[], Project]) -> None:
    """The outcome names file, line and rule."""
    project = make_project()
    rows = write_dataset(project.root / "datasets" / "colours", rows=120) / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"content": "blue"}', '"content": "bleu"}', 1))
    project.run(sys.executable, "-m", "dvc", "add", "--quiet", "datasets")
    project.commit("bad row")
    (outcome,) = project.reconcile()
    assert outcome.action == "failed"
    assert "rows.jsonl:2: [contract]" in outcome.reason
