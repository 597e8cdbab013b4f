"""Laws of desired state against actual state: why a recipe trains, one at a time, from what may be trained."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from test_reconcile import TRAINING, Project, base, build_project, wait_for  # noqa: F401 - one is a fixture
from test_registry import publish_new
from tiny import make_recipe, write_dataset

from appliance import registry
from appliance.cli.init import command as init_command
from appliance.cli.reconcile import command as reconcile_command
from appliance.cli.review import review
from appliance.data import load_pointer
from appliance.demo.storage import Storage
from appliance.digest import digest_bytes
from appliance.errors import CommandError, DatasetError, DeviceError, RegistryError
from appliance.plan import Machine, check_device
from appliance.preparation import Origin, Workspace
from appliance.recipe import Recipe, load_recipe
from appliance.reconcile import find_touched, find_unclaimed, plan_from_git, read_origin, reconcile
from appliance.release import promote_by_verdict
from appliance.starter import check_files
from appliance.store import Store, open_store

ROOT = Path(__file__).parent.parent
CHECKOUT = "actions/checkout@11bd71901bbe5b1630ceea73d27597364c9af683"
ATTEST = "actions/attest-build-provenance@e8998f949152b193b063cb0ec769d69d929409be"


@pytest.fixture(scope="module")
def template(base: Path, storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Project:  # noqa: F811
    """A project with 120 rows, committed and pushed; made once, copied by each test."""
    project = build_project(tmp_path_factory.mktemp("template") / "repository", base=base, storage=storage)
    project.write_recipe(training={**TRAINING, "epochs": 1})
    project.commit_data(rows=120)
    return project


@pytest.fixture
def project(template: Project, s3: Storage, tmp_path: Path) -> Project:
    """A copy of the template with a registry of its own; the DVC remote is shared."""
    root = tmp_path / "repository"
    shutil.copytree(template.root, root)
    url = f"s3://registry/{digest_bytes(str(root).encode())[:12]}"
    environment = {**template.environment, "APPLIANCE_STORE": url, "APPLIANCE_CACHE": str(root / ".cache")}
    return Project(root, open_store(url), environment)


def hold(store: Store, folder: Path, **options: Any) -> Any:
    """A claim on the model `colours` with this folder of runs."""
    return registry.hold_model(store, "colours", folder=folder, actor="a", **options)


def test_one_holder_at_a_time_and_the_next_one_after_it(store: Store, tmp_path: Path) -> None:
    """On two machines and on one, the second is told who is at work; when the first is done it may."""
    with hold(store, tmp_path / "one"):
        with pytest.raises(RegistryError, match=r"leases/model-colours\.json: a is training colours elsewhere"):
            hold(store, tmp_path / "two").__enter__()
        with pytest.raises(RegistryError, match="another process on this machine"):
            hold(store, tmp_path / "one").__enter__()
    with hold(store, tmp_path / "two"):
        found = registry.read_lease(store, "colours")
        assert found is not None
        assert found[0].until > time.time() + registry.LEASE_S / 2


def test_a_lease_lives_as_long_as_its_holder_and_no_longer(store: Store, tmp_path: Path) -> None:
    """It is renewed while work goes on; a dead holder's is over by itself, and at once on its own machine."""
    with hold(store, tmp_path / "one", ttl_s=0.6):
        time.sleep(1.2)
        with pytest.raises(RegistryError, match="elsewhere"):
            hold(store, tmp_path / "two").__enter__()
    left = registry.Lease(name="colours", holder="x", actor="b", place="gone", until=time.time() + 1.0)
    store.put("leases/model-colours.json", left.encode())
    with pytest.raises(RegistryError, match="b is training"):
        hold(store, tmp_path / "two").__enter__()
    with hold(store, tmp_path / "two", wait_s=30):
        assert time.time() >= left.until
    mine = left.model_copy(update={"place": (tmp_path / "one" / "place").read_text(), "until": time.time() + 900})
    store.put("leases/model-colours.json", mine.encode())
    with hold(store, tmp_path / "one"):
        pass


def test_a_lost_lease_is_not_fought_for(store: Store, tmp_path: Path) -> None:
    """Who was declared dead and is not leaves the new holder's lease alone."""
    with hold(store, tmp_path / "one", ttl_s=0.6):
        other = registry.Lease(name="colours", holder="x", actor="b", place="other", until=time.time() + 900)
        store.put("leases/model-colours.json", other.encode())
        time.sleep(0.5)
    assert store.get("leases/model-colours.json")[0] == other.encode()


def test_a_damaged_lease_is_named(store: Store, tmp_path: Path) -> None:
    """One message with the key and what to do."""
    store.put("leases/model-colours.json", b"{")
    with pytest.raises(RegistryError, match=r"model-colours\.json: damaged.*delete it"):
        hold(store, tmp_path / "one").__enter__()


def test_two_reconciles_at_once_make_one_version(project: Project) -> None:
    """The one that waits looks again and finds nothing left to do; one that does not wait says who is at work."""
    first = project.start("reconcile")
    wait_for(lambda: list(project.root.glob(".appliance/runs/*/training/job.json")), first)
    second = project.start("reconcile")
    elsewhere = project.start("reconcile", "--wait", "5", "--runs", str(project.root / ".cache" / "elsewhere"))
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 1
    assert "another process on this machine is training colours" in output
    output, errors = elsewhere.communicate(timeout=250)
    assert elsewhere.returncode == 0, output + errors
    assert "was made meanwhile by another reconcile" in output
    assert first.wait(timeout=10) in (0, 3)
    assert len(project.versions()) == 1
    say_why(project)


def say_why(project: Project) -> None:
    """The plan names what differs from the newest version, down to the recipe's key, and `--since` what Git knows."""
    before = project.run("git", "rev-parse", "HEAD").strip()
    (version,) = project.versions()
    (same,) = project.reconcile(dry_run=True)
    assert (same.action, same.reason) == ("none", f"{version} was made from this recipe, data and base")
    (forced,) = project.reconcile(dry_run=True, force=True)
    assert (forced.action, forced.reason) == ("train", "has a version, is made again because of --force")
    project.write_recipe(training={**TRAINING, "epochs": 3})
    project.commit("three epochs")
    (changed,) = project.reconcile(dry_run=True)
    assert changed.reason == f"the recipe (training.epochs) changed since {version}"
    project.commit_data(rows=124)
    (both,) = project.reconcile(dry_run=True)
    assert both.reason == f"the data and the recipe (training.epochs) changed since {version}"
    (untouched,) = project.reconcile(dry_run=True, since="HEAD")
    assert untouched.action == "none"
    assert "changed since HEAD" in untouched.reason
    (planned,) = plan_from_git(project.root, since=before)
    assert planned.reason.startswith("the recipe changed since")
    assert [o.action for o in plan_from_git(project.root, since="0" * 40)] == ["train"]
    with pytest.raises(CommandError, match="--since nowhere: no such commit"):
        find_touched(project.root, [], since="nowhere")
    with pytest.raises(CommandError, match="--since --output=x: no such commit"):
        find_touched(project.root, [], since="--output=x")
    project.run("git", "mv", "recipes/colours.yaml", "recipes/tints.yaml")
    project.commit("another file, the same model")
    assert find_unclaimed(project.root, project.store) == ()
    (renamed,) = project.reconcile(dry_run=True)
    assert (renamed.recipe, renamed.reason) == ("tints", both.reason), "the file's name means nothing"
    project.write_recipe("tints", name="tints")
    project.commit("another model")
    assert [o.reason for o in project.reconcile(dry_run=True)] == ["has no version yet"]
    assert find_unclaimed(project.root, project.store) == ("colours",)
    tell(project)


def tell(project: Project) -> None:
    """Markdown for people, JSON for machines; text from the repository is shown as code and never rendered."""
    (project.root / "recipes" / "bad.yaml").write_text("na|me: '<b>`@all`'\n")
    project.commit("bad")
    summary = project.root / ".cache" / "summary.md"
    summary.write_text("before\n")
    child = project.start("reconcile", "--dry-run", "--json", "--summary", str(summary))
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 1, errors
    told = {o["recipe"]: o for o in json.loads(output)}
    assert {n: (o["action"], o["exit_code"]) for n, o in told.items()} == {"bad": ("failed", 1), "tints": ("train", 0)}
    text = summary.read_text()
    assert text.startswith("before\n### Plan\n")
    assert "| `tints` | `would train` | `has no version yet` |" in text
    assert "na\\|me" in text
    assert "has versions but no recipe" not in text, "with an unreadable recipe nobody knows what is claimed"


def test_data_that_others_cannot_pull_is_not_trained_on(project: Project) -> None:
    """Never pushed, lost since, or cut short on the remote: DVC's index says all is well, the remote is asked."""
    remote = open_store(project.run(sys.executable, "-m", "dvc", "remote", "list").split()[1])
    md5 = load_pointer(project.root / "datasets.dvc").md5
    key = f"files/md5/{md5[:2]}/{md5[2:]}"
    content, _ = remote.get(key)
    remote.delete(key)
    (lost,) = project.reconcile()
    assert lost.action == "failed"
    assert "run `dvc push`" in lost.reason
    remote.put(key, content[:-1])
    (cut,) = project.reconcile()
    assert "not whole there" in cut.reason
    remote.put(key, content)
    assert project.versions() == []
    assert registry.read_lease(project.store, "colours") is None, "nobody was kept from working"
    (project.root / "datasets" / "colours" / "rows.jsonl").open("a").write("\n")
    with pytest.raises(DatasetError, match="uncommitted changes"):
        project.reconcile(dry_run=True)
    assert [o.action for o in project.reconcile(dry_run=True, allow_dirty=True)] == ["train"]


def test_a_cache_that_claims_to_be_up_to_date_is_not_believed(project: Project) -> None:
    """DVC links a damaged cache into place without a word; the bytes are hashed before anything is spent."""
    (file,) = [f for f in project.root.glob(".dvc/cache/files/md5/*/*") if b"messages" in f.read_bytes()]
    file.chmod(0o644)
    file.write_bytes(file.read_bytes().replace(b"thing 0", b"thing 1"))
    file.chmod(0o444)  # DVC takes a read-only object at its word
    shutil.rmtree(project.root / "datasets")
    with pytest.raises(DatasetError, match="the DVC cache is corrupt: delete"):
        project.reconcile(dry_run=True)


def test_a_review_reports_what_can_be_known(project: Project) -> None:
    """Rows by what happened to them, findings with their place, a plan; without the data, what Git knows."""
    since = project.run("git", "rev-parse", "HEAD").strip()
    rows = project.root / "datasets" / "colours" / "rows.jsonl"
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join([*lines[1:], lines[0].replace("r0", "x0").replace("thing 0", "thing 500")]) + "\n")
    project.run(sys.executable, "-m", "dvc", "add", "--quiet", "datasets")
    project.commit("a row for another")
    workspace = Workspace(
        project.root, project.root / ".cache", project.root / ".appliance" / "runs", note=lambda _: None
    )
    sections, faults = review(workspace, since=since, store=project.store)
    told = {s.title: s for s in sections}
    assert faults == 0
    assert told["Plan"].rows[0][:2] == ("colours", "would train")
    assert {(r[0], r[1], r[2]) for r in told["Data: colours"].rows} == {
        ("added", "x0", "rows.jsonl:120"), ("removed", "r0", "rows.jsonl:1"),
    }  # fmt: skip
    assert "1 added, 1 removed" in told["Data: colours"].lines
    (cost,) = told["Cost"].rows
    assert cost[0] == "colours"
    assert cost[4] == "hours unknown until this model has a version"
    rows.write_text(rows.read_text().replace('"content": "blue"}', '"content": "bleu"}', 1))
    project.run(sys.executable, "-m", "dvc", "add", "--quiet", "datasets")
    sections, faults = review(workspace, since=since, store=None)
    assert faults == 1
    (finding,) = (r for s in sections if s.title == "Findings: colours" for r in s.rows if r[0] == "error")
    assert finding[1].startswith("datasets/colours/rows.jsonl:1: [contract]")
    rows.write_text(rows.read_text().replace('"content": "bleu"}', '"content": "blue<|im_end|>"}', 1))
    project.run(sys.executable, "-m", "dvc", "add", "--quiet", "datasets")
    sections, faults = review(workspace, since=since, store=None)
    found = [r[1] for s in sections if s.title == "Findings: colours" for r in s.rows if r[0] == "error"]
    assert faults == len(found) == 2
    assert any(f.startswith("datasets/colours/rows.jsonl:1: [mask] row r1: the answer of turn 2 holds") for f in found)
    shutil.rmtree(project.root / "datasets")
    shutil.rmtree(project.root / ".dvc" / "cache")
    sections, faults = review(workspace, since=since, store=None)
    assert faults == 0
    assert "cannot be read from here" in sections[-1].lines[0]
    assert "dvc push" in sections[-1].lines[0]


def test_a_clone_that_hides_its_history_is_refused(project: Project, tmp_path: Path) -> None:
    """Shallow where it matters: refused with the way out; deep enough, detached or on a tag: the same origin."""
    commit = project.run("git", "rev-parse", "HEAD").strip()
    (project.root / "README").write_text("x")
    project.commit("later")
    project.run("git", "tag", "v1")
    url = project.root.as_uri()
    project.run("git", "clone", "--quiet", "--depth", "1", url, str(tmp_path / "shallow"))
    with pytest.raises(CommandError, match="git fetch --unshallow"):
        read_origin(tmp_path / "shallow", actor="x")
    for name, options in {"deep": ["--depth", "3"], "tag": ["--branch", "v1"]}.items():
        project.run("git", "clone", "--quiet", *options, url, str(tmp_path / name))
        assert read_origin(tmp_path / name, actor="x").commit == commit
    project.run("git", "checkout", "--quiet", "--detach")
    said: list[str] = []
    workspace = Workspace(project.root, project.root / ".cache", project.root / ".appliance" / "runs", note=said.append)
    (outcome,) = reconcile(workspace, store=project.store, actor="x", dry_run=True)
    assert outcome.action == "train"
    assert any("HEAD is detached" in line for line in said)


def test_a_machine_without_a_gpu_is_refused_where_one_is_needed(project: Project) -> None:
    """The exit code is 34, so that an engine tries another machine; the need takes no part in the run key."""
    needy = Recipe.model_validate({**make_recipe().model_dump(), "needs": {"gpu": "required"}})
    assert needy.digest == make_recipe().digest
    check_device(needy, Machine(cores=1, memory_bytes=1, gpu="a GPU", gpu_memory_bytes=1, gpus=1))
    with pytest.raises(DeviceError, match=r"colours: needs\.gpu is required, found no GPU"):
        check_device(needy, Machine(cores=1, memory_bytes=1))
    recipe = project.root / "recipes" / "colours.yaml"
    recipe.write_text(recipe.read_text().replace("gpu: optional", "gpu: required"))
    project.commit("needs a GPU")
    (outcome,) = project.reconcile()
    assert outcome.error is not None
    assert outcome.error.exit_code == 34


def test_an_older_commit_never_replaces_a_newer_one(tmp_path: Path, store: Store) -> None:
    """However late it is done: by ancestry, not by clocks, which differ between machines."""
    project = Project(tmp_path / "repository", store, {})
    project.root.mkdir()
    project.run("git", "init", "--quiet", "--initial-branch", "main")
    commits = []
    for text in "abc":
        (project.root / "file").write_text(text)
        commits.append(project.commit(text))
    older, middle, newest = (
        publish_new(store, tmp_path / c, c, git_commit=c, name="colours", created_at=f"2026-01-0{9 - i}T00:00:00Z")
        for i, c in enumerate(commits)
    )
    recipe = make_recipe(publish={"alias": "staging"})

    def promote(version: str) -> str:
        origin = Origin(commit=None, time="2026-01-01T00:00:00Z", actor="x")
        manifest = registry.load_manifest(store, "colours", version)
        return promote_by_verdict(recipe, version, manifest, store=store, origin=origin, root=project.root)[0]

    assert promote(middle) == "staging"
    assert promote(older) == ""
    assert promote(newest) == "staging"
    assert promote(middle) == "", "it was there before"
    move = registry.read_alias(store, "colours", "staging")
    assert move is not None
    assert move.version == newest


def test_without_a_store_only_a_plan_can_be_had(tmp_path: Path) -> None:
    """A usage error, not a failure half-way."""
    done = CliRunner().invoke(reconcile_command, ["--root", str(tmp_path)], standalone_mode=True)
    assert done.exit_code == 2
    assert "give --store" in done.output


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """An empty folder after `appliance init`."""
    root = tmp_path / "Our Tickets"
    done = invoke_init(root, "--store", "s3://adapters/registry")
    assert "wrote recipes/our-tickets.yaml" in done
    return root


def invoke_init(root: Path, *options: str, code: int = 0) -> str:
    """Run `appliance init` in this process; what it said."""
    done = CliRunner().invoke(init_command, ["--root", str(root), *options], standalone_mode=False)
    assert done.exception is None, done.output
    assert done.return_value == code, done.output
    return done.output


def read_all(root: Path) -> dict[str, bytes]:
    """Every file but Git's own."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file() and ".git" not in p.parts}


def test_an_empty_folder_becomes_a_working_repository(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC takes it for its own, the recipe is valid, Git leaves data and runs out; again, nothing is done."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    before = read_all(started)
    assert load_recipe(started / "recipes" / "our-tickets.yaml").dataset.path == "datasets/our-tickets"
    write_dataset(started / "datasets" / "our-tickets")
    project = Project(started, open_store(f"file://{started}/store"), {})
    assert "s3://adapters/dvc" in project.run(sys.executable, "-m", "dvc", "remote", "list")
    project.run(sys.executable, "-m", "dvc", "add", "--quiet", "datasets")
    (started / ".appliance").mkdir()
    (started / ".appliance" / "x").write_text("x")
    left_out = project.run("git", "status", "--short", "--untracked-files=all", "--ignored")
    assert "!! datasets/" in left_out
    assert "!! .appliance/" in left_out
    assert "?? datasets.dvc" in left_out
    assert invoke_init(started).startswith("nothing to do")
    assert {n: c for n, c in read_all(started).items() if n in before and "datasets" not in n} == {
        n: c for n, c in before.items() if "datasets" not in n
    }
    assert (started / ".github" / "scripts" / "appliance").stat().st_mode & 0o111


def test_what_somebody_changed_is_never_overwritten(started: Path) -> None:
    """A changed workflow stays and is shown by --check; one of an older release is replaced; a lost one comes back."""
    changed, older, lost = (started / ".github" / "workflows" / f"{n}.yml" for n in ("retrain", "report", "promote"))
    changed.write_text(changed.read_text().replace("--wait 720", "--wait 5"))
    older.write_text("name: report of an older release\n")
    record = started / ".github" / "appliance-files.json"
    digests = json.loads(record.read_text()) | {".github/workflows/report.yml": digest_bytes(older.read_bytes())}
    record.write_text(json.dumps(digests))
    lost.unlink()
    (started / "prices.yaml").write_text("# ours\n")
    drift = invoke_init(started, "--check", code=1)
    for line in ("retrain.yml: changed", "report.yml: outdated", "promote.yml: missing"):
        assert line in drift
    assert "-          options=(--wait 720" in drift
    assert "+          options=(--wait 5 " in drift
    said = invoke_init(started)
    assert "left .github/workflows/retrain.yml: somebody changed it" in said
    assert "--wait 5" in changed.read_text()
    assert "older release" not in older.read_text()
    assert (started / "prices.yaml").read_text() == "# ours\n"
    assert "1 kept files differ" in invoke_init(started, "--check", code=1)
    record.write_text("{")
    assert "left .github/workflows/retrain.yml" in invoke_init(started), "a broken record makes it more careful"


def test_an_existing_repository_is_added_to(tmp_path: Path) -> None:
    """Its recipe, ignores, owners and DVC config stay; the owner is found out from the remote's address."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "ours.yaml").write_text("ours")
    (tmp_path / ".gitignore").write_text("datasets/\n*.log")
    project = Project(tmp_path, open_store(f"file://{tmp_path}/store"), {})
    project.run("git", "init", "--quiet")
    project.run("git", "remote", "add", "origin", "git@github.com:some-team/models.git")
    said = invoke_init(tmp_path)
    assert "has no remote yet; `dvc remote add --default store" in said
    assert (tmp_path / ".gitignore").read_text() == "datasets/\n*.log\n/.appliance\n/.env\n"
    assert [p.name for p in (tmp_path / "recipes").iterdir()] == ["ours.yaml"]
    assert "\n/datasets.dvc @some-team\n" in (tmp_path / ".github" / "CODEOWNERS").read_text()


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read_triggers(workflow: dict[Any, Any]) -> set[str]:
    """The events that start it; YAML 1.1 reads the key `on` as true."""
    return set(workflow[True])


def test_this_repository_has_the_files_that_it_ships() -> None:
    """One source: workflows and scripts here are byte for byte those that `init` writes."""
    assert [c.path for c in check_files(ROOT) if c.state != "same"] == []
    assert invoke_init(ROOT, "--check").startswith("0 kept files")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_no_event_of_a_stranger_reaches_a_runner_of_ours(path: Path) -> None:
    """What a fork can start runs on hosted machines, read-only, without secrets; every job is hardened."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {}
    assert workflow["concurrency"]["cancel-in-progress"] is (path.stem == "validate")
    triggers = read_triggers(workflow)
    assert not triggers & {"pull_request_target", "issue_comment", "issues", "fork", "watch", "discussion"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        runner = job["runs-on"]
        if runner != "ubuntu-24.04":
            assert triggers <= {"push", "schedule", "workflow_dispatch"}, "started by people with write access only"
            assert workflow[True].get("push", {"branches": ["main"]})["branches"] == ["main"]
            assert job["environment"] in ("training", "production")
        for step in job["steps"]:
            assert step.get("uses", CHECKOUT) in ({CHECKOUT, ATTEST} if path.stem == "image" else {CHECKOUT})
            assert "${{" not in step.get("run", ""), "values come in through the environment"
            if step.get("uses") == CHECKOUT:
                assert step["with"]["persist-credentials"] is False
        assert "environment" in job or "secrets." not in json.dumps(job), "secrets only in environments"
    if triggers & {"pull_request"}:
        (job,) = workflow["jobs"].values()
        assert job["permissions"] == {"contents": "read"}


def test_the_report_never_checks_out_the_pull_request() -> None:
    """The job with the token that writes has the default branch's script and nothing of the pull request's code."""
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "report.yml").read_text())["jobs"].values()
    (checkout,) = (s for s in job["steps"] if "uses" in s)
    assert checkout["with"]["ref"] == "${{ github.event.repository.default_branch }}"


def test_the_night_looks_for_damage_and_garbage_whatever_became_of_the_reconcile() -> None:
    """Its last steps have the reconcile's store and credentials, run after a failure too, and not after a cancel."""
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "reconcile.yml").read_text())["jobs"].values()
    *_, made, checked, looked = job["steps"]
    for step in (checked, looked):
        assert step["if"] == "${{ !cancelled() }}"
        assert step["env"] == {k: v for k, v in made["env"].items() if k != "SCHEDULE"}
    assert checked["run"] == '.github/scripts/appliance check --sample 20 --summary "$GITHUB_STEP_SUMMARY"'
    assert looked["run"] == '.github/scripts/appliance gc --dry-run --summary "$GITHUB_STEP_SUMMARY"'
