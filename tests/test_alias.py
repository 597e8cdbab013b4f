"""Laws of the alias that verdicts move: it is where Git's HEAD asks it to be, unless a person moved it."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_gitops import project, template  # noqa: F401 - fixtures
from test_reconcile import TRAINING, Project, base  # noqa: F401 - a fixture
from test_registry import publish_new

from appliance import registry
from appliance.cli import main
from appliance.cli.common import find_origin
from appliance.preparation import Origin, Workspace, prepare
from appliance.recipe import load_recipe
from appliance.registry import AliasMove, load_manifest
from appliance.release import judge_alias, promote_by_verdict


def head(project: Project) -> str:  # noqa: F811
    """The commit that is checked out."""
    return project.run("git", "rev-parse", "HEAD").strip()


def publish_asked(project: Project, folder: Path, *, text: str = "", **overrides: Any) -> str:  # noqa: F811
    """A version of what is asked for here, compared with the one in use, as a training would publish it."""
    workspace = Workspace(project.root, project.root / ".cache", project.root / ".appliance", note=lambda _: None)
    key = prepare(load_recipe(project.root / "recipes" / "colours.yaml"), workspace=workspace).key
    facts = {"name": "colours", "run_key": key, "git_commit": head(project), "parent": project.alias(), **overrides}
    return publish_new(project.store, folder, f"{key}{text}", **facts)


def ask_for(project: Project, epochs: int) -> str:  # noqa: F811
    """Commit a recipe of so many epochs; the commit."""
    project.write_recipe(training={**TRAINING, "epochs": epochs})
    return project.commit(f"{epochs} epochs")


def revert(project: Project) -> str:  # noqa: F811
    """`git revert HEAD`; the commit."""
    project.run("git", "revert", "--no-edit", "HEAD")
    return head(project)


def read_move(project: Project) -> AliasMove:  # noqa: F811
    """The alias's last move."""
    move = registry.read_alias(project.store, "colours", "production")
    assert move is not None
    return move


def move_by_hand(project: Project, version: str) -> None:  # noqa: F811
    """What `appliance promote` does."""
    registry.promote(
        project.store, name="colours", version=version, alias="production",
        actor="ann", reason="rolled back", at="2026-01-01T00:00:00Z",
    )  # fmt: skip


def ship(project: Project, folder: Path, epochs: int) -> str:  # noqa: F811
    """A commit, its version, and the alias at it by a reconcile."""
    ask_for(project, epochs)
    version = publish_asked(project, folder)
    project.reconcile()
    assert project.alias() == version
    return version


def test_a_revert_takes_the_alias_back(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """What was shipped and is asked for again is behind the alias again, by a move that says so; and forth again."""
    older, newer = ship(project, tmp_path, 2), ship(project, tmp_path, 3)
    asker = revert(project)
    (planned,) = project.reconcile(dry_run=True)
    assert planned.reason.endswith(f"production goes back from {newer} to {older}, which HEAD asks for again")
    assert project.alias() == newer, "a dry run moves nothing"
    (outcome,) = project.reconcile()
    assert (outcome.action, outcome.reason) == ("none", planned.reason)
    assert outcome.finished is not None
    assert outcome.finished.alias == "production"
    move = read_move(project)
    assert (project.alias(), move.asked_by) == (older, asker)
    assert move.reason == f"verdict ship; HEAD {asker} asks for it again"
    (settled,) = project.reconcile()
    assert settled.reason == f"{older} was made from this recipe, data and base"
    revert(project)
    project.reconcile()
    assert project.alias() == newer, "the revert was reverted"
    assert read_move(project).seq == 4


def test_a_revert_of_data_takes_the_alias_back(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """The same for `datasets.dvc` as for a recipe."""
    older = publish_asked(project, tmp_path)
    project.reconcile()
    project.commit_data(rows=124)
    newer = publish_asked(project, tmp_path)
    project.reconcile()
    assert project.alias() == newer
    revert(project)
    project.run(sys.executable, "-m", "dvc", "checkout", "--quiet", "--force")
    project.reconcile()
    assert project.alias() == older


def test_what_a_person_moved_stays_and_is_told(
    project: Project,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The outcome and the summary say where the alias is, what HEAD asks for, and the command that moves it."""
    older, newer = ship(project, tmp_path, 2), ship(project, tmp_path, 3)
    move_by_hand(project, older)
    (rolled,) = project.reconcile()
    assert project.alias() == older
    command = f"appliance promote colours@{newer} production --expected {older}"
    assert rolled.reason.endswith(
        f"production is at {older} (ann: rolled back), HEAD asks for {newer}; to move it: `{command}`"
    )
    revert(project)
    (satisfied,) = project.reconcile()
    assert satisfied.reason.endswith("data and base"), "what HEAD asks for is there, whoever put it there"
    revert(project)
    project.reconcile()
    assert project.alias() == older, "a person's move stays"
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    summary = project.root / ".cache" / "summary.md"
    assert main(["reconcile", "--json", "--root", str(project.root), "--summary", str(summary)]) == 0
    (told,) = json.loads(capfd.readouterr().out)
    assert command in told["reason"]
    assert command in summary.read_text()
    move_by_hand(project, newer)
    revert(project)
    project.reconcile()
    assert project.alias() == newer


def test_an_older_checkout_never_takes_the_alias_back(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """A late job of an older commit, a night at an old checkout: by the commit that asked, not the version's own."""
    older, newer = ship(project, tmp_path, 2), ship(project, tmp_path, 3)
    second = head(project)
    project.run("git", "checkout", "--quiet", "--detach", "HEAD~1")
    (late,) = project.reconcile()
    assert project.alias() == newer
    assert late.reason.endswith(f"production is at {newer}, which the newer commit {second[:12]} asked for; it stays")
    project.run("git", "checkout", "--quiet", "main")
    revert(project)
    project.reconcile()
    assert project.alias() == older
    project.run("git", "checkout", "--quiet", "--detach", second)
    project.reconcile()
    assert project.alias() == older, "the version's own commit is older than this checkout, the one that asked is not"
    project.run("git", "checkout", "--quiet", "-b", "late", second)
    ask_for(project, 4)
    publish_asked(project, tmp_path)
    project.run("git", "checkout", "--quiet", "main")
    project.run("git", "merge", "--quiet", "-s", "ours", "-m", "not taken", "late")
    project.reconcile()
    project.run("git", "checkout", "--quiet", "late")
    (side,) = project.reconcile()
    assert side.finished is not None
    assert project.alias() == side.finished.version, "neither commit is known to be the newer one: as it was before"


def test_a_late_job_moves_nothing_though_its_clone_is_older(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """What asked for the version in use may be younger than this clone: the alias stays, and says what to do."""
    ship(project, tmp_path, 2)
    ask_for(project, 3)
    late = replace(project, root=tmp_path / "late")
    shutil.copytree(project.root, late.root, symlinks=True)
    newer, asker = ship(project, tmp_path, 4), head(project)
    older = publish_asked(late, tmp_path)
    (told,) = late.reconcile()
    assert late.alias() == newer
    assert told.reason.endswith(
        f"production is at {newer}, and this clone lacks the commit {asker[:12]} that asked for it (`git fetch`, then "
        f"reconcile again); to move it: `appliance promote colours@{older} production --expected {newer}`"
    )
    late.run("git", "fetch", "--quiet", str(project.root), "main")
    (fetched,) = late.reconcile()
    assert late.alias() == newer
    assert fetched.reason.endswith(f"which the newer commit {asker[:12]} asked for; it stays")
    ask_for(late, 5)
    beside = publish_asked(late, tmp_path)
    late.reconcile()
    assert late.alias() == beside, "a commit that is known, and neither older nor newer, hinders nothing"


def test_two_pushes_in_quick_succession_end_at_the_newer_one(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """A commit and its revert, and the job of the commit ends last: the next reconcile of HEAD puts it right."""
    older = ship(project, tmp_path, 2)
    first = ask_for(project, 3)
    newer = publish_asked(project, tmp_path)
    revert(project)
    project.reconcile()
    project.run("git", "checkout", "--quiet", "--detach", first)
    project.reconcile()
    assert project.alias() == newer, "nothing tells this job of the revert: the alias was where it was asked to be"
    project.run("git", "checkout", "--quiet", "main")
    project.reconcile()
    assert project.alias() == older


def test_a_persons_move_is_one_whatever_its_reason_says(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """A move counts as a verdict's by the commit recorded in it, not by its words: a revert leaves a person's."""
    ship(project, tmp_path, 2)
    newer = publish_after(project, tmp_path, 3)
    registry.promote(
        project.store, name="colours", version=newer, alias="production",
        actor="ann", reason=f"verdict ship; HEAD {head(project)} asks for it", at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    project.run("git", "checkout", "--quiet", "--detach", "HEAD~1")
    project.reconcile()
    assert project.alias() == newer, "an older checkout moves nothing: a person's move counts by its version's commit"
    project.run("git", "checkout", "--quiet", "main")
    revert(project)
    (told,) = project.reconcile()
    assert project.alias() == newer
    assert "to move it: `appliance promote colours@" in told.reason


def publish_after(project: Project, folder: Path, epochs: int) -> str:  # noqa: F811
    """A commit and its version, without a reconcile."""
    ask_for(project, epochs)
    return publish_asked(project, folder)


def test_the_version_that_shipped_counts_when_a_forced_one_did_not(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """`--force` made HEAD's version again and the verdict held it: the one that was shipped goes back in place."""
    older = ship(project, tmp_path, 2)
    publish_asked(project, tmp_path, verdict="hold", text="again")
    (kept,) = project.reconcile()
    assert (project.alias(), "production" in kept.reason) == (older, False)
    newer = ship(project, tmp_path, 3)
    revert(project)
    project.reconcile()
    assert project.alias() == older
    assert newer != older


def test_a_lost_record_of_the_history_stops_no_new_version(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """What was published just now was never there; of an older one it is not known, and no rollback is undone."""
    first, second = ship(project, tmp_path, 2), ship(project, tmp_path, 3)
    move_by_hand(project, first)
    lost = next(o.key for o in project.store.list("models/colours/reflog/") if "/00000002-" in o.key)
    project.store.delete(lost)
    (told,) = project.reconcile()
    assert project.alias() == first, "a person moved it away from there"
    assert told.reason.endswith(
        f"production is at {first}, and whether {second} was there before is not known: {project.store.url}/{lost}: "
        "missing, the history of production is broken here; to move it: "
        f"`appliance promote colours@{second} production --expected {first}`"
    )
    asker = ask_for(project, 4)
    new = publish_asked(project, tmp_path)
    facts = {"store": project.store, "origin": Origin(asker, "2026-01-31T12:00:00Z", "ci"), "root": project.root}
    recipe, manifest = load_recipe(project.root / "recipes/colours.yaml"), load_manifest(project.store, "colours", new)
    assert promote_by_verdict(recipe, new, manifest, **facts) == ("", judge_alias(recipe, new, manifest, **facts).note)
    assert promote_by_verdict(recipe, new, manifest, **facts, is_new=True) == ("production", "")


def test_what_is_not_committed_moves_nothing_back(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """With --allow-dirty nobody's commit asks."""
    ship(project, tmp_path, 2)
    newer = ship(project, tmp_path, 3)
    project.write_recipe(training={**TRAINING, "epochs": 2})
    (outcome,) = project.reconcile(allow_dirty=True)
    assert outcome.action == "none"
    assert project.alias() == newer


def test_a_version_of_what_no_commit_holds_gets_no_alias(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """With --allow-dirty as by `run`: published, told, and nothing that Git has to take back; a dry run says it too."""
    kept = ship(project, tmp_path, 2)
    project.write_recipe(training={**TRAINING, "epochs": 5})
    dirty = publish_asked(project, tmp_path, git_commit=None)
    (planned,) = project.reconcile(allow_dirty=True, dry_run=True)
    (outcome,) = project.reconcile(allow_dirty=True)
    assert (outcome.action, project.alias()) == ("none", kept)
    assert outcome.reason == planned.reason
    assert outcome.reason.endswith(
        "production is not moved: recipes/colours.yaml: not what the commit HEAD holds; commit it, then "
        f"`appliance reconcile`; or as it is: `appliance promote colours@{dirty} production`"
    )
    project.run("git", "checkout", "--quiet", "--", ".")
    (settled,) = project.reconcile()
    assert settled.reason == f"{kept} was made from this recipe, data and base"


def call_run(project: Project, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:  # noqa: F811
    """What `appliance run` says of the recipe, in the repository and with its registry."""
    path = project.root / "recipes" / "colours.yaml"
    main(["run", str(path), "--root", str(project.root), *arguments])
    told = capfd.readouterr()
    return " ".join((told.err + told.out).split())


@pytest.fixture
def environment(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """This process has the project's store and cache."""
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("environment")
def test_what_no_commit_holds_gets_a_version_and_no_alias(
    project: Project,  # noqa: F811
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """`run` on an edited recipe says so and what to do; committed, it is published with its commit, and has the alias.

    Nothing is trained again where the run folder is still there, and a new version needs no history of the alias.
    """
    better = {"method": {"type": "full"}, "training": {**TRAINING, "learning_rate": 0.003}}
    project.write_recipe(**better, evaluation={"gates": {"min_test_rows": 20}})
    said = call_run(project, capfd)
    (dirty,) = project.versions()
    assert "-000000000000-" in dirty
    assert project.alias() is None, said
    warned = said.index(
        "warning: recipes/colours.yaml: not what the commit HEAD holds; commit it; as it is, the version gets no commit"
    )
    assert warned < said.index("training "), "before anything is spent"
    assert (
        "note production is not moved: recipes/colours.yaml: not what the commit HEAD holds; commit it, then "
        f"`appliance reconcile`; or as it is: `appliance promote colours@{dirty} production`" in said
    )
    assert "already there" in call_run(project, capfd)
    (adapter,) = (project.root / ".appliance" / "runs").glob("*/adapter")
    trained = adapter.stat().st_mtime_ns
    break_history(project, tmp_path)
    commit = project.commit("the recipe")
    (planned,) = project.reconcile(dry_run=True)
    assert planned.reason == (
        f"is published again with its commit: {dirty} was made from files that were not committed"
    )
    (outcome,) = project.reconcile()
    assert (outcome.action, outcome.reason) == ("train", planned.reason)
    assert outcome.finished is not None
    assert commit[:12] in outcome.finished.version
    assert project.alias() == outcome.finished.version
    assert adapter.stat().st_mtime_ns == trained
    (again,) = project.reconcile()
    assert again.reason == f"{outcome.finished.version} was made from this recipe, data and base"
    said = call_run(project, capfd)
    assert "already there" in said
    assert "warning" not in said
    assert len(project.versions()) == 4


def break_history(project: Project, folder: Path) -> None:  # noqa: F811
    """Two versions of another base, the alias at both, and the record of the first move lost."""
    for text in ("one", "two"):
        facts = {"name": "colours", "base": {"revision": "another"}, "git_commit": None}
        move_by_hand(project, publish_new(project.store, folder, text, **facts))
    project.store.delete(next(o.key for o in project.store.list("models/colours/reflog/") if "/00000001-" in o.key))


def edit_rows(project: Project) -> None:  # noqa: F811
    """A row more, which `dvc add` has not seen."""
    (project.root / "datasets" / "colours" / "rows.jsonl").open("a").write("\n")


def test_a_run_outside_of_a_repository_moves_the_alias_as_ever(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """Without a commit there is nothing to differ from; with one, what differs is named, by this recipe alone."""
    root, path = project.root, project.root / "recipes" / "colours.yaml"

    def find(file: Path = path) -> Origin:
        return find_origin(file, load_recipe(file), root=root)

    assert (find().commit, find().unheld) == (head(project), "")
    project.write_recipe("other", name="other")
    assert find().unheld == "", "somebody else's recipe"
    edit_rows(project)
    assert (find().commit, find().unheld.startswith("datasets/colours/")) == (None, True)
    outside = shutil.copy(path, tmp_path / "elsewhere.yaml")
    assert "outside of the repository" in find(outside).unheld
    (root / ".git" / "shallow").write_text(f"{head(project)}\n")
    project.run("git", "checkout", "--quiet", "--", ".")
    shutil.rmtree(root / "datasets")
    project.run(sys.executable, "-m", "dvc", "checkout", "--quiet", "--force")
    assert "git fetch --unshallow" in find().unheld
    shutil.rmtree(root / ".git")
    assert (find().commit, find().unheld, find(outside).unheld) == (None, "", "")
