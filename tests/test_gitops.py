"""Laws of desired state against actual state: why a recipe trains, one at a time, from what may be trained."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from test_reconcile import TRAINING, Project, base, build_project, wait_for  # noqa: F401 - one is a fixture
from test_registry import AT, WatchedStore, promote, publish_new
from tiny import make_recipe, write_dataset

from appliance import registry
from appliance.cli.init import command as init_command
from appliance.cli.reconcile import command as reconcile_command
from appliance.cli.review import review
from appliance.data import load_pointer, read_listing
from appliance.demo.storage import Storage
from appliance.desired import find_changes, find_touched, read_origin
from appliance.digest import digest_bytes
from appliance.errors import CommandError, DatasetError, DeviceError, RegistryError, StoreError
from appliance.plan import Machine, check_device
from appliance.preparation import Origin, Workspace, prepare
from appliance.recipe import Recipe, load_recipe
from appliance.reconcile import Choice, _Desire, _find_origin, find_unclaimed, plan_from_git, reconcile
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


@pytest.mark.parametrize("ends_at", [2, 5])
def test_a_lease_outlives_an_answer_that_was_lost(store: Store, tmp_path: Path, ends_at: int) -> None:
    """The holder knows a renewal of its own that was applied: it renews on, and gives the lease back in the end."""
    writes = [0]

    def lose(number: int, _key: str, done: bool) -> None:
        writes.append(number)
        if done and number == 2:
            raise StoreError("no answer")

    watched: Any = WatchedStore(store, lose)
    with hold(watched, tmp_path / "one", ttl_s=1.2):
        deadline = time.monotonic() + 20
        while writes[-1] < ends_at and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RegistryError, match="elsewhere"):
            hold(store, tmp_path / "two").__enter__()
    with hold(store, tmp_path / "two"):
        pass


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
    (planned,) = project.reconcile(dry_run=True)
    assert (planned.action, planned.reason) == ("failed", lost.reason), "a dry run says what a real one would"
    remote.put(key, content[:-1])
    (cut,) = project.reconcile()
    assert "not whole there" in cut.reason
    remote.put(key, content)
    write_dataset(project.root / "datasets" / "colours", rows=131)  # that no other test pushes
    project.run(sys.executable, "-m", "dvc", "add", "--quiet", "datasets")
    project.commit("never pushed")
    shutil.rmtree(project.root / "datasets")  # DVC's cache has it, so that a pull asks no remote
    (unpushed,) = project.reconcile()
    assert unpushed.action == "failed"
    assert "run `dvc push`" in unpushed.reason
    assert project.versions() == []
    assert registry.read_lease(project.store, "colours") is None, "nobody was kept from working"
    (project.root / "datasets" / "colours" / "rows.jsonl").open("a").write("\n")
    with pytest.raises(DatasetError, match="uncommitted changes"):
        project.reconcile(dry_run=True)
    assert [o.action for o in project.reconcile(dry_run=True, allow_dirty=True)] == ["train"]


def write_general(folder: Path) -> None:
    """Rows that ask what no dataset of these tests asks."""
    rows = write_dataset(folder, rows=40) / "rows.jsonl"
    rows.write_text(rows.read_text().replace("thing", "matter"))


def test_only_what_a_commit_holds_is_trained(project: Project, tmp_path: Path) -> None:
    """Whatever hides it from `git status`, wherever a recipe looks: each such recipe is refused, the others go on."""
    root, colours = project.root, project.root / "datasets" / "colours"
    (root / "recipes" / ".gitattributes").write_text("crlf.yaml text eol=crlf\n")
    names = ["crlf", "assumed", "skipped", "deleted"]
    for name in names:
        project.write_recipe(name, name=name)
    for name, forgetting in {"replayed": "replay", "weighed": "ewc"}.items():
        section = {forgetting: {"path": "general"}}
        project.write_recipe(name, name=name, forgetting=section)
    for name, path in {
        "elsewhere": "other/colours", "behind": "link/colours", "above": "datasets/../other/colours",
        "outside": str(tmp_path / "outside"), "inside": str(colours), "tracked": "tracked",
    }.items():  # fmt: skip
        project.write_recipe(name, name=name, dataset={"path": path})
    write_general(root / "general")
    for folder in (root / "other" / "colours", root / "tracked", tmp_path / "outside", tmp_path / "away" / "colours"):
        shutil.copytree(colours, folder)
    (root / "link").symlink_to(tmp_path / "away")
    with (root / ".gitignore").open("a") as ignored:
        ignored.write("/other\n/general\n/recipes/ignored.yaml\n")
    project.commit("recipes")
    (root / "recipes" / "crlf.yaml").unlink()
    (root / "recipes" / "deleted.yaml").unlink()
    project.run("git", "checkout", "recipes/crlf.yaml")
    assert b"\r\n" in (root / "recipes" / "crlf.yaml").read_bytes()
    (root / ".git" / "info" / "exclude").write_text("/recipes/excluded.yaml\n")
    project.run("git", "config", "status.showUntrackedFiles", "no")
    project.run("git", "update-index", "--assume-unchanged", "recipes/assumed.yaml")
    project.run("git", "update-index", "--skip-worktree", "recipes/skipped.yaml")
    for name in ("ignored", "excluded", "unasked", "assumed", "skipped"):
        project.write_recipe(name, name=name, training={**TRAINING, "epochs": 1, "seed": 5})
    shutil.copy(root / "recipes" / "colours.yaml", tmp_path / "linked.yaml")
    (tmp_path / "linked.yaml").write_text(
        (tmp_path / "linked.yaml").read_text().replace("name: colours", "name: linked")
    )
    (root / "recipes" / "linked.yaml").symlink_to(tmp_path / "linked.yaml")
    assert not project.run("git", "status", "--porcelain").replace(" D recipes/deleted.yaml\n", ""), "Git sees nothing"
    outcomes = {o.recipe: o for o in project.reconcile(dry_run=True)}
    assert {n for n, o in outcomes.items() if o.action == "train"} == {"colours", "crlf", "inside", "tracked"}
    said = {n: o.reason for n, o in outcomes.items() if o.action == "failed"}
    for name in ("ignored", "excluded", "unasked"):
        assert f"recipes/{name}.yaml: not in the commit HEAD; commit it, or give --allow-dirty" in said.pop(name)
    for name in ("assumed", "skipped"):
        assert f"recipes/{name}.yaml: not what the commit HEAD holds; commit it, or" in said.pop(name)
    assert "recipes/linked.yaml: behind a symbolic link" in said.pop("linked")
    assert "/link/colours: behind a symbolic link" in said.pop("behind")
    for name in ("elsewhere", "above"):
        assert f"{root}/other/colours/rows.jsonl: not in the commit HEAD" in said.pop(name)
    for name in ("replayed", "weighed"):
        assert "/general/rows.jsonl: not in the commit HEAD" in said.pop(name)
    assert "/outside: outside of the repository" in said.pop("outside")
    assert not said
    allowed = project.reconcile(dry_run=True, allow_dirty=True)
    assert {o.action for o in allowed} == {"train"}, [o.reason for o in allowed]


def test_rows_that_dvc_leaves_out_are_not_trained_on(project: Project) -> None:
    """A file of .dvcignore is in no commit's data, however well the rest is proven; elsewhere it is in nobody's way."""
    (project.root / ".dvcignore").write_text("more.*\n")
    project.commit("ignores")
    (project.root / "datasets" / "more.txt").write_text("notes")
    assert [o.action for o in project.reconcile(dry_run=True)] == ["train"]
    more = project.root / "datasets" / "colours" / "more.jsonl"
    more.write_bytes((project.root / "datasets" / "colours" / "rows.jsonl").read_bytes().replace(b'"r', b'"s'))
    (outcome,) = project.reconcile(dry_run=True)
    assert outcome.action == "failed"
    assert "datasets/colours/more.jsonl: not what `dvc add` took" in outcome.reason


def test_a_version_names_the_commit_of_all_that_it_is_made_from(project: Project) -> None:
    """Rows in Git itself count like the pointer's: the commit that brought them, or none where no commit holds them."""
    root, path = project.root, project.root / "recipes" / "colours.yaml"
    before = project.run("git", "rev-parse", "HEAD").strip()
    workspace = Workspace(root, root / ".cache", root / ".appliance" / "runs", note=lambda _: None)

    def find(**choice: bool) -> str | None:
        origin = read_origin(root, actor="x")
        pointer = load_pointer(root / "datasets.dvc")
        held, changes = read_listing(pointer, root), find_changes(root)
        desire = _Desire(workspace, project.store, origin, Choice(**choice), pointer, held, changes)
        return _find_origin(path, load_recipe(path), desire=desire).commit

    (root / "README").write_text("a commit that touches nothing of it")
    project.commit("later")
    assert find() == before
    project.write_recipe("colours", dataset={"path": "tracked"})
    project.commit("rows in Git")
    shutil.copytree(root / "datasets" / "colours", root / "tracked")
    with pytest.raises(CommandError, match=r"tracked/dataset\.yaml: not in the commit HEAD"):
        find()
    assert find(allow_dirty=True) is None
    commit = project.commit("the rows")
    (root / "README").write_text("another")
    project.commit("later still")
    assert find() == find(allow_dirty=True) == commit
    (root / "tracked" / "rows.jsonl").unlink()
    with pytest.raises(CommandError, match=r"tracked/rows\.jsonl: deleted, and the commit HEAD has it; restore it"):
        find()
    project.run("git", "checkout", "tracked")
    (root / "datasets" / "colours" / "rows.jsonl").open("a").write("\n")
    assert find(allow_dirty=True) == commit, "the pointer's data is no concern of this recipe"
    project.run("git", "checkout", before, "recipes")
    project.commit("rows of DVC")
    assert find(allow_dirty=True) is None


def test_a_job_without_data_pulls_it_only_where_something_may_train(project: Project, tmp_path: Path) -> None:
    """A manifest whose commit has HEAD's pointer is of HEAD's data; another recipe, base or pointer needs the data."""
    root, data = project.root, project.root / "datasets"
    path = root / "recipes" / "colours.yaml"
    workspace = Workspace(root, root / ".cache", root / ".appliance" / "runs", note=lambda _: None)
    commit = project.run("git", "rev-parse", "HEAD").strip()
    prepared = prepare(load_recipe(path), workspace=workspace)
    facts = {"name": "colours", "run_key": prepared.key, "data_digest": prepared.dataset.digest}
    publish_new(project.store, tmp_path, "loose", **facts, git_commit=None)

    def look(**options: bool) -> tuple[str, bool]:
        """What is done, and whether the data was pulled for it; a job begins without any."""
        shutil.rmtree(data, ignore_errors=True)
        (outcome,) = project.reconcile(**options)
        return outcome.action, data.exists()

    assert look(dry_run=True) == ("train", True), "nobody can make it again: no commit says which data it was"
    version = publish_new(project.store, tmp_path, "held", **facts, git_commit=commit)
    assert look(dry_run=True) == ("none", False)
    assert registry.read_alias(project.store, "colours", prepared.recipe.publish.alias) is None
    assert look() == ("none", False)
    move = registry.read_alias(project.store, "colours", prepared.recipe.publish.alias)
    assert move is not None
    assert move.version == version, "a promotion that was lost is made up for all the same"
    assert look(dry_run=True, force=True) == look(dry_run=True, allow_dirty=True, force=True) == ("train", True)
    kept = path.read_text()
    for change in ({"training": {**TRAINING, "epochs": 2}}, {"dataset": {"path": "other"}},
                   {"forgetting": {"replay": {"share": 0.1}}}):  # fmt: skip
        project.write_recipe(**change)
        project.commit("another recipe")
        assert look(dry_run=True)[1], change
    path.write_text(kept)
    project.commit("the recipe of old")
    assert look(dry_run=True) == ("none", False)
    pointer = root / "datasets.dvc"
    before = pointer.read_text()
    project.commit_data(rows=124)
    assert look(dry_run=True) == ("train", True)
    pointer.write_text(before)
    project.commit("the data of old")
    assert look(dry_run=True) == ("none", False)
    (root / "base" / "more.json").write_text("{}")
    assert look(dry_run=True) == ("train", True), "the base is another"


def test_a_dry_run_answers_where_the_remote_cannot_be_asked(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without credentials or network the plan stands, with a note of what is not known."""
    said: list[str] = []
    workspace = Workspace(project.root, project.root / ".cache", project.root / ".appliance" / "runs", note=said.append)
    store = open_store((tmp_path / "store").as_uri())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    (outcome,) = reconcile(workspace, store=store, actor="x", choice=Choice(), dry_run=True)
    assert (outcome.action, outcome.reason) == ("train", "has no version yet")
    assert "no credentials for the DVC remote" in said[-1]


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
    push(project)
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
    assert cost[4].startswith("hours unknown until this model has a version, or prices.yaml names the GPU")
    rows.write_text(rows.read_text().replace('"content": "blue"}', '"content": "bleu"}', 1))
    push(project)
    sections, faults = review(workspace, since=since, store=None)
    assert faults == 1
    (finding,) = (r for s in sections if s.title == "Findings: colours" for r in s.rows if r[0] == "error")
    assert finding[1].startswith("datasets/colours/rows.jsonl:1: [contract]")
    rows.write_text(rows.read_text().replace('"content": "bleu"}', '"content": "blue<|im_end|>"}', 1))
    push(project)
    sections, faults = review(workspace, since=since, store=None)
    found = [r[1] for s in sections if s.title == "Findings: colours" for r in s.rows if r[0] == "error"]
    assert faults == len(found) == 2
    assert any(f.startswith("datasets/colours/rows.jsonl:1: [mask] row r1: the answer of turn 2 holds") for f in found)


def push(project: Project) -> None:
    """`dvc add` and `dvc push`; the commit is the caller's."""
    project.run(sys.executable, "-m", "dvc", "add", "--quiet", "datasets")
    project.run(sys.executable, "-m", "dvc", "push", "--quiet")


def test_a_review_is_red_where_the_remote_lacks_the_data(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never pushed is a fault of the change, on this disk or not; no credentials or network are the runner's."""
    write_dataset(project.root / "datasets" / "colours", rows=132)  # that no other test pushes
    project.run(sys.executable, "-m", "dvc", "add", "--quiet", "datasets")
    project.commit("never pushed")
    workspace = Workspace(
        project.root, project.root / ".cache", project.root / ".appliance" / "runs", note=lambda _: None
    )
    sections, faults = review(workspace, since="HEAD~1", store=None)
    told = {s.title: s for s in sections}
    assert faults == 1
    assert "run `dvc push`" in told["Data"].lines[0]
    assert "12 added" in told["Data: colours"].lines[0], "what is here is reported all the same"
    assert review(workspace, since="HEAD", store=None)[1] == 0, "nothing would be trained, so nothing is asked"
    shutil.rmtree(project.root / "datasets")
    shutil.rmtree(project.root / ".dvc" / "cache")
    sections, faults = review(workspace, since="HEAD~1", store=None)
    assert (sections[-1].title, faults) == ("Data", 1)
    assert "run `dvc push`" in sections[-1].lines[0]
    child = project.start("review", "--since", "HEAD~1", "--json")
    output, errors = child.communicate(timeout=60)
    assert (child.returncode, json.loads(output)["faults"]) == (1, 1), errors
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    sections, faults = review(workspace, since="HEAD~1", store=None)
    assert faults == 0
    assert sections[-1].lines[0].startswith("cannot be known from here")
    assert "no credentials" in sections[-1].lines[0]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    refused, faults = review(workspace, since="HEAD~1", store=None)
    assert faults == 0
    assert "refuses these credentials" in refused[-1].lines[0]
    project.run(
        sys.executable, "-m", "dvc", "remote", "modify", "--local", "store", "endpointurl", "http://127.0.0.1:9"
    )
    away, faults = review(workspace, since="HEAD~1", store=None)
    assert faults == 0
    assert "cannot be reached" in away[-1].lines[0]


def test_a_first_change_has_a_price_without_a_store(project: Project) -> None:
    """A pull request has no credentials, so its range comes from the tokens and the GPU that the prices are of."""
    (project.root / "prices.yaml").write_text(
        "as_of: 2026-01-31\nsource: our contract\ncurrency: EUR\ngpu_hour: 2\ngpu: NVIDIA L4\n"
    )
    workspace = Workspace(
        project.root, project.root / ".cache", project.root / ".appliance" / "runs", note=lambda _: None
    )
    sections, _ = review(workspace, since=None, store=None)
    ((*_, cost),) = next(s.rows for s in sections if s.title == "Cost")
    assert re.fullmatch(r"about .* minutes? \(at .* of the peak of NVIDIA L4\), .* to .* EUR \(2 an hour, .*\)", cost)


def test_a_change_of_a_model_that_has_versions_is_priced_by_what_they_took(project: Project, tmp_path: Path) -> None:
    """By the speed of the newest that tells one; what is in the registry already costs nothing."""
    (project.root / "prices.yaml").write_text(
        "as_of: 2026-01-31\nsource: our contract\ncurrency: EUR\ngpu_hour: 2\ngpu: NVIDIA L4\n"
    )
    workspace = Workspace(
        project.root, project.root / ".cache", project.root / ".appliance" / "runs", note=lambda _: None
    )
    key = prepare(load_recipe(project.root / "recipes" / "colours.yaml"), workspace=workspace).key

    def publish(text: str, **facts: Any) -> str:
        facts = {"created_at": f"2026-01-0{text}T00:00:00Z", **facts}
        return publish_new(project.store, tmp_path / text, text, name="colours", **facts)

    def find_cost() -> tuple[str, ...]:
        sections, _ = review(workspace, since=None, store=project.store)
        (row,) = next(s.rows for s in sections if s.title == "Cost")
        return row

    publish("1", training={"tokens_per_second": 0.25})
    publish("2", training={"tokens_per_second": 0.5})
    publish("3")
    *_, tokens, cost = find_cost()
    hours = int(tokens.replace(",", "")) / 0.5 / 3600
    assert cost == f"about {hours:.2f} hours, {2 * hours:.2f} EUR (2 an hour, our contract, 2026-01-31)"
    publish("4", run_key=key, git_commit=None)
    assert find_cost()[-1].startswith("about"), "no commit holds it, so it will be trained"
    made = publish("5", run_key=key)
    assert find_cost()[-1] == f"none: {made} was made from this recipe, data and base"


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
    (outcome,) = reconcile(workspace, store=project.store, actor="x", choice=Choice(), dry_run=True)
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

    def publish(number: int, **facts: Any) -> str:
        commit, at = commits[number], f"2026-01-0{9 - number}T00:00:00Z"
        facts = {"git_commit": commit, "name": "colours", "created_at": at, **facts}
        return publish_new(store, tmp_path / commit, commit, **facts)

    older, middle = publish(0), publish(1)
    newest = publish(2, parent=middle)
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
    assert abs(datetime.fromisoformat(move.at).timestamp() - time.time()) < 3600, "when it moved, not the commit's time"


@pytest.mark.parametrize(("revision", "moves"), [("tiny", False), ("another", True)])
def test_an_alias_moves_only_from_the_version_that_was_compared(
    tmp_path: Path, store: Store, revision: str, moves: bool
) -> None:
    """What it replaces must have answered the same rows; one of another base cannot be compared and stops nobody."""
    made = {"name": "colours", "verdict": "ship"}
    first, second, rival = (
        publish_new(store, tmp_path / t, t, **made, created_at=f"2026-01-0{i}T00:00:00Z", base={"revision": b})
        for i, (t, b) in enumerate([("first", "tiny"), ("second", "tiny"), ("rival", revision)], start=1)
    )
    promote(store, first, name="colours")
    late = publish_new(store, tmp_path / "late", "late", **made, parent=first, created_at=AT, base={"revision": "tiny"})
    recipe, origin = make_recipe(), Origin(commit=None, time=AT, actor="x")

    def go(version: str) -> tuple[str, str]:
        manifest = registry.load_manifest(store, "colours", version)
        return promote_by_verdict(recipe, version, manifest, store=store, origin=origin, root=tmp_path)

    alias, note = go(second)
    assert not alias
    assert f"production is at {first}, and {second} was compared with no version in use; to move it: " in note
    promote(store, rival, name="colours")
    assert bool(go(late)[0]) is moves, "it was compared with the first, which is not what it would replace"


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
    """Its recipe, ignores and DVC config stay; who approves is asked for, as an organisation alone is nobody's name."""
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
    assert "wrote .github/CODEOWNERS; fill in who approves" in said
    owners = (tmp_path / ".github" / "CODEOWNERS").read_text().splitlines()
    assert all(line.startswith("#") for line in owners)
    assert "# /datasets.dvc @some-team/TEAM" in owners


def ask_dvc(root: Path) -> str:
    """The remotes as DVC reads them, the default one with its mark."""
    project = Project(root, open_store(f"file://{root}/store"), {"DVC_NO_ANALYTICS": "1"})
    return project.run(sys.executable, "-m", "dvc", "remote", "list").strip()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_remote_that_is_asked_for_is_written_or_refused_by_name(tmp_path: Path, end: str) -> None:
    """Into a config of `dvc init` too; one that has another remote is left, with what changes it."""
    config = tmp_path / ".dvc" / "config"
    for text in (
        "",
        f"[core]{end}    analytics = false{end}",
        f"[cache]{end}    type = copy{end}[core]{end}    autostage = true",
    ):
        shutil.rmtree(tmp_path / ".dvc", ignore_errors=True)
        config.parent.mkdir()
        config.write_bytes(text.encode())
        assert "has no remote yet" in invoke_init(tmp_path)
        assert "added the remote s3://one/dvc to .dvc/config" in invoke_init(tmp_path, "--remote", "s3://one/dvc")
        assert ask_dvc(tmp_path).split() == ["store", "s3://one/dvc", "(default)"]
        assert all(line.strip() in config.read_text() for line in text.splitlines())
        assert (b"\r\n" in config.read_bytes()) is ("\r" in text)
    for options in (("--remote", "s3://one/dvc"), ("--store", "s3://two/registry")):
        assert invoke_init(tmp_path, *options).startswith("nothing to do")
    assert "it has another remote than s3://two/dvc" in invoke_init(tmp_path, "--remote", "s3://two/dvc")
    assert "s3://one/dvc" in ask_dvc(tmp_path)


def test_a_folder_as_remote_is_the_one_that_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative one is resolved from where the user is, not from `.dvc`; what only looks like a URL is refused."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    root = tmp_path / "there" / "team"
    for _ in range(2):
        invoke_init(root, "--remote", "../storage")
    assert Path(ask_dvc(root).split()[1]).resolve() == tmp_path / "storage"
    for wrong in ("s3:/bucket", "s3://", "S3:bucket"):
        done = CliRunner().invoke(init_command, ["--root", str(tmp_path / "x"), "--remote", wrong])
        assert f"--remote {wrong}: not a URL; expected one such as s3://BUCKET/dvc" in str(done.exception)
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_made_is_one_message() -> None:
    """Not a traceback."""
    done = CliRunner().invoke(init_command, ["--root", "/proc/foo/bar"], standalone_mode=False)
    assert isinstance(done.exception, CommandError)
    assert str(done.exception).startswith("/proc/foo/bar: cannot be made (")


@pytest.mark.parametrize("name", ["2024", "no", "on", "true", "null", "007", "0x10", "1e3", "~"])
def test_a_name_is_text_whatever_yaml_makes_of_it(tmp_path: Path, name: str) -> None:
    """The folder's name becomes the recipe's, the dataset's and the path; all are what they look like."""
    invoke_init(tmp_path / name)
    (file,) = (tmp_path / name / "recipes").iterdir()
    recipe = load_recipe(file)
    assert recipe.name == ("model" if name == "~" else name)
    card = yaml.safe_load((tmp_path / name / recipe.dataset.path / "dataset.yaml").read_text())
    assert card["name"] == recipe.name


def test_a_dataset_that_is_there_is_the_recipes(tmp_path: Path) -> None:
    """However it is called, with a card or without; where only its pointer is here, nothing is guessed."""
    write_dataset(tmp_path / "one" / "datasets" / "a: b #c")
    invoke_init(tmp_path / "one")
    assert load_recipe(tmp_path / "one" / "recipes" / "one.yaml").dataset.path == "datasets/a: b #c"
    away = tmp_path / "two" / "datasets.dvc"
    away.parent.mkdir()
    away.write_text("outs:\n- md5: 0123456789abcdef0123456789abcdef.dir\n  path: datasets\n")
    for _ in range(2):
        assert "no recipe yet: datasets.dvc names data that is not here; `dvc pull`" in invoke_init(tmp_path / "two")
    assert not (tmp_path / "two" / "recipes").exists()
    assert not (tmp_path / "two" / "datasets").exists()
    write_dataset(tmp_path / "two" / "datasets" / "colours")
    (tmp_path / "two" / "datasets" / "colours" / "dataset.yaml").unlink()
    invoke_init(tmp_path / "two")
    assert load_recipe(tmp_path / "two" / "recipes" / "two.yaml").dataset.path == "datasets/colours"


def test_lines_are_added_in_a_files_own_form(tmp_path: Path) -> None:
    """Line ends and encoding of `.gitignore` and `.gitattributes` are the team's, to the byte."""
    content = "caf\u00e9\r\n*.log".encode("latin-1")
    for name in (".gitignore", ".gitattributes"):
        (tmp_path / name).write_bytes(content)
    invoke_init(tmp_path)
    for name in (".gitignore", ".gitattributes"):
        found = (tmp_path / name).read_bytes()
        assert found.startswith(content + b"\r\n/")
        assert found.count(b"\n") == found.count(b"\r\n")


def test_line_ends_and_mode_are_the_releases(started: Path) -> None:
    """Files that Git or an editor gave other line ends, and a script without its mode, are told and put right."""
    workflow, script = (started / ".github" / p for p in ("workflows/retrain.yml", "scripts/appliance"))
    content = workflow.read_bytes()
    workflow.write_bytes(content.replace(b"\n", b"\r\n"))
    script.chmod(0o644)
    drift = invoke_init(started, "--check", code=1)
    assert "retrain.yml: outdated\nits lines end in CRLF, the release's in LF" in drift
    assert "scripts/appliance: outdated\nits mode forbids to execute it" in drift
    invoke_init(started)
    assert workflow.read_bytes() == content
    assert invoke_init(started, "--check").startswith("0 kept files")
    project = Project(started, open_store(f"file://{started}/store"), {})
    project.run("git", "config", "core.autocrlf", "true")
    project.commit("first")
    shutil.rmtree(started / ".github")
    project.run("git", "checkout", "--quiet", ".")
    assert invoke_init(started, "--check").startswith("0 kept files"), "whatever Git does to other files"


@pytest.mark.parametrize("place", [".github", ".github/workflows", ".dvc", "recipes", "datasets", ".gitignore/x"])
def test_what_is_in_the_way_is_one_message(tmp_path: Path, place: str) -> None:
    """A file where a folder must be, or the other way round, is named before anything is written."""
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("x")
    before = read_all(tmp_path)
    done = CliRunner().invoke(init_command, ["--root", str(tmp_path)], standalone_mode=False)
    assert isinstance(done.exception, CommandError)
    assert f"{tmp_path / place.removesuffix('/x')}: is a f" in str(done.exception)
    assert read_all(tmp_path) == before


@pytest.mark.parametrize("options", [(), ("--check",)], ids=["init", "check"])
def test_only_the_top_of_a_repository_is_started(started: Path, options: tuple[str, ...]) -> None:
    """GitHub reads `.github` there and nowhere else; a folder below, made already or not, is refused."""
    before = read_all(started)
    for folder in (started / "recipes", started / "new" / "one"):
        done = CliRunner().invoke(init_command, ["--root", str(folder), *options], standalone_mode=False)
        assert isinstance(done.exception, CommandError)
        assert f"give --root {started.resolve()}" in str(done.exception)
    assert read_all(started) == before
    assert not (started / "new").exists()


def test_a_branch_that_starts_nothing_is_told(tmp_path: Path) -> None:
    """`main` and `master` are in the workflows; another name is said, the remote's before this clone's."""
    for name in ("main", "master", "trunk"):
        project = Project(tmp_path / name, open_store(f"file://{tmp_path}/store"), {})
        project.root.mkdir()
        project.run("git", "init", "--quiet", "--initial-branch", name)
        assert ("start at pushes to main or master, not to trunk" in invoke_init(project.root)) is (name == "trunk")
        for workflow in ("retrain", "validate"):
            triggers = yaml.safe_load((project.root / ".github" / "workflows" / f"{workflow}.yml").read_text())[True]
            assert triggers["push"]["branches"] == ["main", "master"]
        project.commit("first")
        project.run("git", "checkout", "--quiet", "-b", "topic")
        if name == "trunk":
            project.run("git", "update-ref", "refs/remotes/origin/trunk", "HEAD")
            project.run("git", "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/trunk")
        assert ("not to trunk" in invoke_init(project.root)) is (name == "trunk")


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read_triggers(workflow: dict[Any, Any]) -> set[str]:
    """The events that start it; YAML 1.1 reads the key `on` as true."""
    return set(workflow[True])


def test_this_repository_has_the_files_that_it_ships() -> None:
    """One source: workflows and scripts here are byte for byte those that `init` writes."""
    assert [c.path for c in check_files(ROOT) if c.state != "same"] == []
    assert invoke_init(ROOT, "--check").startswith("0 kept files")


class Facts(dict[str, Any]):
    """A context of GitHub's expressions: what is not there is empty."""

    def __getattr__(self, name: str) -> Any:
        value = self.get(name, "")
        return Facts(value) if isinstance(value, dict) else value


def evaluate(expression: str, **contexts: Any) -> Any:
    """An expression of a workflow, of the operators that ours have."""
    names = {"vars": Facts(), "github": Facts()} | {k: Facts(v) for k, v in contexts.items()}
    return eval(expression.replace("&&", " and ").replace("||", " or "), {"__builtins__": {}}, names)  # noqa: S307


def find_group(name: str, **github: Any) -> str:
    """The concurrency group of a run."""
    group = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())["concurrency"]["group"]
    return re.sub(r"\$\{\{(.*?)\}\}", lambda found: str(evaluate(found[1].strip(), github=github)), group)


def test_what_waits_is_replaced_only_by_what_does_its_work() -> None:
    """GitHub keeps one waiting run of a group: a newer push stands for an older one, a night for a night, no more."""
    main, other = {"event_name": "push", "ref": "refs/heads/main"}, {"event_name": "push", "ref": "refs/heads/x"}
    hands = [{"event_name": "workflow_dispatch", "ref": "refs/heads/main", "event": {}} for _ in range(2)]
    night, month = ({"event_name": "schedule", "event": {"schedule": s}} for s in ("17 3 * * *", "17 5 1 * *"))
    runs = [("retrain", r) for r in (main, main, other, *hands)]
    runs += [("reconcile", r) for r in (night, night, month, *hands)] + [("promote", r) for r in hands]
    groups = [find_group(name, run_id=number, **run) for number, (name, run) in enumerate(runs)]
    assert groups[0] == groups[1]
    assert groups[5] == groups[6]
    assert len(set(groups)) == len(runs) - 2

    def report(owner: str, branch: str) -> str:
        return find_group(
            "report", event={"workflow_run": {"head_repository": {"owner": {"login": owner}}, "head_branch": branch}}
        )

    assert report("a", "patch-1") == report("a", "patch-1")
    assert len({report("a", "patch-1"), report("b", "patch-1"), report("b/patch", "1"), report("b-patch", "1")}) == 4


def is_reached(workflow: dict[Any, Any], name: str, **contexts: Any) -> bool:
    """Whether a job runs: its own condition holds, and those of the jobs that it needs."""
    job = workflow["jobs"][name]
    needs = [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
    own = bool(evaluate(job["if"], **contexts)) if "if" in job else True
    return own and all(is_reached(workflow, need, **contexts) for need in needs)


@pytest.mark.parametrize("name", ["retrain", "reconcile", "promote"])
def test_only_the_default_branch_reaches_a_runner_of_ours(name: str) -> None:
    """Whatever may be dispatched: no other branch, no tag of its name; and nothing trains before there is a store."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
    jobs = [n for n, job in workflow["jobs"].items() if job["runs-on"] != "ubuntu-24.04"]
    assert jobs
    ours = {"ref_name": "trunk", "ref_type": "branch", "event": {"repository": {"default_branch": "trunk"}}}
    store = {"APPLIANCE_STORE": "s3://x/y"}
    for job in jobs:
        assert is_reached(workflow, job, github=ours, vars=store)
        assert not is_reached(workflow, job, github={**ours, "ref_name": "topic"}, vars=store)
        assert not is_reached(workflow, job, github={**ours, "ref_type": "tag"}, vars=store)
        assert is_reached(workflow, job, github=ours) is (name == "promote")


def test_a_push_says_what_it_asks_for_by_git_alone(project: Project, tmp_path: Path) -> None:
    """On a hosted machine, without store and secrets; a commit that nobody has is the same as none."""
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "retrain.yml").read_text())["jobs"]["plan"]
    (*_, step) = job["steps"]
    assert step["continue-on-error"] is True, "what informs does not keep anything from training"
    assert set(step["env"]) == {"APPLIANCE_IMAGE", "BEFORE", "ONLY"}
    program = tmp_path / "bin" / "appliance"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m appliance "$@"\n')
    program.chmod(0o755)
    shutil.copytree(ROOT / ".github", project.root / ".github")
    before = project.run("git", "rev-parse", "HEAD").strip()
    project.write_recipe(training={**TRAINING, "epochs": 3})
    project.commit("three epochs")
    for since, reason in ((before, "the recipe changed since"), ("0" * 40, "every recipe"), ("a" * 40, "every recipe")):
        summary = tmp_path / f"{since}.md"
        variables = [f"{k}={v}" for k, v in {"GITHUB_STEP_SUMMARY": summary, "BEFORE": since, "ONLY": ""}.items()]
        path = f"PATH={program.parent}:{os.environ['PATH']}"
        project.run("env", "-u", "APPLIANCE_STORE", *variables, path, "bash", "-e", "-c", step["run"])
        assert "| `colours` | `would train` | `" + reason in summary.read_text()


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
            assert {*workflow[True].get("push", {"branches": []})["branches"]} <= {"main", "master"}
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
    assert checked["run"] == 'exec bash .github/scripts/appliance check --sample 20 --summary "$GITHUB_STEP_SUMMARY"'
    assert looked["run"] == 'exec bash .github/scripts/appliance gc --dry-run --summary "$GITHUB_STEP_SUMMARY"'
