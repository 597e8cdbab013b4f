"""Laws of recipes side by side: what one of them got wrong costs the others nothing."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_gitops import project, template  # noqa: F401 - fixtures
from test_reconcile import Project, base  # noqa: F401 - a fixture
from test_registry import make_folder, make_manifest
from tiny import write_dataset

from appliance import desired, preparation
from appliance import reconcile as reconciling
from appliance.changes import diff_revisions
from appliance.cli import main
from appliance.cli.prices import load_prices
from appliance.cli.review import review
from appliance.data import digest_dvc_folder, load_pointer
from appliance.data.rows import read_dataset
from appliance.desired import find_ignored
from appliance.errors import DatasetError, RecipeError, UnexpectedError
from appliance.model import base as model_base
from appliance.preparation import Workspace
from appliance.recipe import Recipe, parse_recipe
from appliance.reconcile import plan_from_git
from appliance.reproduction import _check_out
from appliance.store import open_store

GOOD = "name: a\nbase: {model: ./base}\ndataset: {path: datasets/colours}\nmethod: {type: lora}\n"
NO_NAME = r"found .{1,120}: no file can have this name"
ODD = {
    "date": ("name: 2024-13-45\nbase: {}\n", r"aaa\.yaml:2"),
    "forced-date": (GOOD + "publish: {alias: !!timestamp 2024-13-45}\n", r"aaa\.yaml:5: '2024-13-45' looks like"),
    "itself": (GOOD + "training: &t {epochs: *t}\n", r"aaa\.yaml:5: more than 64 levels"),
    "deep": (GOOD + "training: " + "[" * 3000 + "]" * 3000 + "\n", r"aaa\.yaml:5: too many levels"),
    "laughs": (
        GOOD + "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)),
        r"aaa\.yaml:5: more than 100,000 values",
    ),
    "digits": (GOOD + f"training: {{epochs: {'1' * 5000}}}\n", r"aaa\.yaml:5: '1{32}' looks like a value of type int"),
    "hex": (GOOD + f"training: {{epochs: 0x{'f' * 9000}}}\n", r"aaa\.yaml:5: '0xf{30}' looks like"),
    "empty-int": (GOOD + "training: {epochs: !!int ''}\n", r"aaa\.yaml:5: '' looks like a value of type int"),
    "control": (GOOD + "publish: \x07\n", r"aaa\.yaml:5: special characters are not allowed"),
    "long": (GOOD.replace("datasets/colours", "d" * 300), rf"aaa\.yaml:3: dataset\.path: {NO_NAME}"),
    "long-base": (GOOD.replace("./base", "./" + "d" * 300), rf"aaa\.yaml:2: base\.model: {NO_NAME}"),
    "nul": (GOOD.replace("datasets/colours", '"a\\0b"'), rf"aaa\.yaml:3: dataset\.path: {NO_NAME}"),
    "home": (GOOD.replace("./base", "~nobody-here/x"), r"~nobody-here/x: no such home folder here"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_what_one_file_got_wrong_is_its_own_outcome(project: Project, kind: str) -> None:  # noqa: F811
    """Whatever YAML lets a person write: file and line, exit code 1, and the recipe beside it is planned."""
    text, expected = ODD[kind]
    (project.root / "recipes" / "aaa.yaml").write_text(text)
    project.commit("odd")
    odd, fine = project.reconcile(dry_run=True)
    assert (odd.action, fine.action) == ("failed", "train")
    assert odd.error is not None
    assert odd.error.exit_code == 1, odd.reason
    with pytest.raises(type(odd.error), match=expected):
        raise odd.error
    planned = plan_from_git(project.root)
    assert [o.action for o in planned] == ["failed" if isinstance(odd.error, RecipeError) else "train", "train"]


def test_dates_are_text(tmp_path: Path) -> None:
    """A name may look like a date, a schema may ask for one, and the day of the prices is read from its text."""
    assert parse_recipe(GOOD.replace("name: a", "name: 2024-01-02"), source="r.yaml").name == "2024-01-02"
    (tmp_path / "prices.yaml").write_text("as_of: 2024-01-02\nsource: s\ncurrency: EUR\ngpu_hour: 2\n")
    prices = load_prices(tmp_path)
    assert prices is not None
    assert prices.as_of.year == 2024
    (tmp_path / "prices.yaml").write_text("as_of: 2024-13-45\nsource: s\ncurrency: EUR\ngpu_hour: 2\n")
    with pytest.raises(RecipeError, match=r"prices\.yaml: expected as_of"):
        load_prices(tmp_path)
    (tmp_path / "prices.yaml").write_bytes("as_of: 2024-01-02\n".encode("utf-16"))
    with pytest.raises(RecipeError, match=r"prices\.yaml: not UTF-8 at byte 1; save the file as UTF-8"):
        load_prices(tmp_path)


def test_only_true_and_false_are_true_and_false(tmp_path: Path) -> None:
    """As in YAML 1.2: `yes`, `no`, `on` and `off` are text, in a recipe, as a label and as a key of a schema."""
    folder = write_dataset(tmp_path / "colours")
    (folder / "dataset.yaml").write_text("name: x\ncontract: {type: labels, labels: [yes, no, on, Off, y]}\n")
    dataset, _ = read_dataset(folder)
    assert dataset is not None
    assert dataset.card.contract.find_faults("yes") == []
    (folder / "dataset.yaml").write_text(
        "name: x\ncontract:\n  type: json\n"
        "  schema: {properties: {on: {type: string}, no: {const: TRUE}}, required: [on]}\n"
    )
    dataset, _ = read_dataset(folder)
    assert dataset is not None
    faults = dataset.card.contract.find_faults
    assert faults('{"on": "x", "no": true}') == []
    assert [len(faults(a)) for a in ('{"on": 5, "no": "x"}', '{"on": "x", "no": "TRUE"}', "{}")] == [2, 1, 1]
    sections = "training: {packing: no, gradient_checkpointing: on, speed: {compile: off}}\n"
    recipe = parse_recipe(GOOD + sections, source="r.yaml")
    assert (recipe.training.packing, recipe.training.gradient_checkpointing) == (False, "on")
    spelled = GOOD + 'training: {packing: false, gradient_checkpointing: "on", speed: {compile: "off"}}\n'
    assert parse_recipe(spelled, source="r.yaml").digest == recipe.digest


def test_a_label_that_yaml_reads_as_something_else_is_told_to_be_quoted(tmp_path: Path) -> None:
    """`true` and `1` are labels in quotes alone."""
    folder = write_dataset(tmp_path / "colours")
    for label in ("true", "1", "1:30", "null"):
        (folder / "dataset.yaml").write_text(f"name: x\ncontract: {{type: labels, labels: [{label}, other]}}\n")
        _, findings = read_dataset(folder)
        assert str(findings[0]).endswith("put it in quotes"), label


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name: x\ncontract:\n  200: y\n", "dataset.yaml:3: [card] the key '200' is a value of type int, not text"),
        (b"name: x\ntrue: 1\n", "dataset.yaml:2: [card] the key 'true' is a value of type bool, not text"),
        (b"name: x\n? [a]\n: 1\n", "dataset.yaml:2: [card] a key is a list or a mapping, not text"),
        (b"name: &a [*a]\n", "dataset.yaml:1: [card] more than 64 levels"),
        (b"name: colours\ncategories: " + b"[" * 3000, "dataset.yaml:2: [card] too many levels"),
        (b"name: colours\ndescription: !!timestamp 2024-13-45\n", "dataset.yaml:2: [card] '2024-13-45' looks like"),
        ("name: colours\n".encode("utf-16"), "dataset.yaml: [card] not UTF-8 at byte 1; save the file as UTF-8"),
    ],
)
def test_a_card_that_cannot_be_read_is_a_finding(tmp_path: Path, content: bytes, expected: str) -> None:
    """Of the file and its line, as any other finding."""
    card = write_dataset(tmp_path / "colours") / "dataset.yaml"
    card.write_bytes(content)
    _, findings = read_dataset(tmp_path / "colours")
    assert expected in str(findings[0])
    card.write_text("name: 2024-13-45\ncontract: {type: json, schema: {enum: [2024-01-02]}}\n")
    dataset, findings = read_dataset(tmp_path / "colours")
    assert findings == ()
    assert dataset is not None
    assert dataset.card.contract.find_faults('"2024-01-02"') == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("contrct: {type: text}", "2: [card] unknown key contrct; did you mean contract?"),
        ("contract: {labels: [a, b]}", "2: [card] key contract.type is missing; use one of json, labels, text"),
        (
            "contract:\n  type: label",
            "3: [card] contract.type: found 'label', which is no contract; did you mean labels?",
        ),
        ("contract: labels", "2: [card] contract: found 'labels', expected keys below it, such as type; correct it"),
        ("contract: {type: labels, label: [a, b]}", "2: [card] unknown key contract.label; did you mean labels?"),
        ("contract: {type: labels, label: [a, b]}", "2: [card] key contract.labels is missing; add it"),
        ("contract: {type: json, schemas: {}}", "2: [card] unknown key contract.schemas; did you mean schema?"),
        ("contract: {type: json, schema: []}", "2: [card] contract.schema: found [], expected keys below it"),
        ("contract: {type: json, schema: {type: strin}}", "2: [card] contract.schema: not a JSON Schema: $.type"),
        (
            "contract: {type: labels, labels:\n  [a, 1]}",
            "3: [card] contract.labels.1: found 1, expected text; put it in q",
        ),
        ("categories: a", "2: [card] categories: found 'a', expected a list; correct it"),
        ("licence: MIT\nlicence: GPL", "3: [card] key licence is given twice; keep one"),
    ],
)
def test_a_fault_of_a_card_names_line_and_key_and_what_to_do(tmp_path: Path, content: str, expected: str) -> None:
    """In the words of a recipe's faults, not in the library's."""
    folder = write_dataset(tmp_path / "colours")
    (folder / "dataset.yaml").write_text(f"name: x\n{content}\n")
    dataset, findings = read_dataset(folder)
    assert dataset is None
    assert f"{folder / 'dataset.yaml'}:{expected}" in "\n".join(map(str, findings))


@pytest.mark.parametrize("content", ["", "[]", "- name: x", "text"])
def test_a_card_without_keys_is_told_what_keys_to_have(tmp_path: Path, content: str) -> None:
    """An empty file, a list, a word."""
    folder = write_dataset(tmp_path / "colours")
    (folder / "dataset.yaml").write_text(content)
    _, findings = read_dataset(folder)
    assert "expected keys below it, such as name" in str(findings[0])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("outs:\n- path: datasets\n".encode("utf-16"), "not UTF-8 at byte 1; save the file as UTF-8"),
        (b"outs: " + b"[" * 3000, ":1: too many levels inside each other"),
        (b"outs: [{path: datasets, md5: a, size: .inf, nfiles: 1}]\n", "expected one folder under 'outs'"),
    ],
)
def test_a_broken_pointer_is_told_by_every_verb(project: Project, content: bytes, expected: str) -> None:  # noqa: F811
    """One message: reconcile refuses with it, and a review has it as a section."""
    (project.root / "datasets.dvc").write_bytes(content)
    project.commit("broken")
    with pytest.raises(DatasetError) as caught:
        load_pointer(project.root / "datasets.dvc")
    assert expected in str(caught.value)
    with pytest.raises(DatasetError):
        project.reconcile(dry_run=True)
    quiet = Workspace(project.root, project.root / ".cache", project.root / ".appliance" / "runs", note=lambda _: None)
    sections, faults = review(quiet, since=None, store=None)
    assert faults == 1
    assert expected in sections[0].lines[0]


@pytest.mark.parametrize("content", ["{", "[]", '{"hidden_size": "wide"}', "[" * 100_000])
def test_a_base_whose_sizes_cannot_be_read_is_refused_by_the_plan(project: Project, content: str) -> None:  # noqa: F811
    """Not after the rows were prepared: a dry run that says `would train` has seen the base's config."""
    (project.root / "base" / "config.json").write_text(content)
    (outcome,) = project.reconcile(dry_run=True)
    assert outcome.action == "failed"
    assert "config.json: not a model's sizes in JSON" in outcome.reason
    assert "copy the model again" in outcome.reason


def test_a_bug_that_one_recipe_meets_is_not_the_others(
    project: Project,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its outcome has exit code 70 and its traceback goes to the log; the next recipe is planned."""
    project.write_recipe("zzz", name="zzz")
    project.commit("two")
    real = reconciling.prepare

    def fail(recipe: Recipe, **options: Any) -> Any:
        if recipe.name == "colours":
            raise ZeroDivisionError("nobody thought of it")
        return real(recipe, **options)

    monkeypatch.setattr(reconciling, "prepare", fail)
    broken, fine = project.reconcile(dry_run=True)
    assert isinstance(broken.error, UnexpectedError)
    assert (broken.action, broken.error.exit_code, fine.action) == ("failed", 70, "train")
    assert "a bug in the appliance met it: ZeroDivisionError: nobody thought of it" in broken.reason
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    summary = project.root / ".cache" / "summary.md"
    arguments = ["reconcile", "--dry-run", "--json", "--root", str(project.root), "--summary", str(summary)]
    assert main(arguments) == 70
    output, log = capfd.readouterr()
    assert [o["exit_code"] for o in json.loads(output)] == [70, 0]
    assert "in fail\n" in log
    assert "Please report it" in log
    assert "ZeroDivisionError" in summary.read_text()


def test_a_repository_may_be_a_folder_of_a_larger_one(project: Project, tmp_path: Path) -> None:  # noqa: F811
    """What changed since a commit, and which rows did, is found where recipes lie below the work tree's top."""
    top, root = tmp_path / "everything", tmp_path / "everything" / "team"
    shutil.copytree(project.root, root, ignore=shutil.ignore_patterns(".git"))
    team = replace(project, root=root)
    team.run("git", "init", "--quiet", "--initial-branch", "main", str(top))
    team.commit("as it was")
    team.write_recipe("größe", name="big")
    team.commit("one more")
    planned = {o.recipe: o.action for o in plan_from_git(root, since="HEAD~1")}
    assert planned == {"colours": "none", "größe": "train"}
    assert {o.recipe: o.action for o in team.reconcile(dry_run=True, since="HEAD~1")} == planned
    team.commit_data(rows=124)
    assert {o.action for o in plan_from_git(root, since="HEAD~1")} == {"train"}
    (diff,) = diff_revisions(root, "HEAD~1", "HEAD")
    assert (diff.name, diff.count("added"), len(diff.changes)) == ("colours", 4, 4)


@pytest.mark.parametrize("below", ["", "team"])
def test_a_version_of_a_folder_is_checked_out_with_its_folder(tmp_path: Path, below: str) -> None:
    """`reproduce` finds recipes and data where they were, whether the repository is the work tree's top or not."""
    root = tmp_path / "repository" / below
    (root / "datasets").mkdir(parents=True)
    (root / "datasets" / ".keep").write_text("")
    md5 = digest_dvc_folder(root / "datasets")
    (root / "datasets.dvc").write_text(f"outs:\n- {{path: datasets, md5: {md5}, size: 0, nfiles: 1}}\n")
    team = Project(root, open_store(f"file://{tmp_path}/store"), {})
    team.run("git", "init", "--quiet", str(tmp_path / "repository"))
    manifest = make_manifest(make_folder(tmp_path / "made"), git_commit=team.commit("x"))
    workspace = Workspace(root, tmp_path, tmp_path, note=lambda _: None)
    with _check_out(manifest, "v", workspace=workspace) as tree:
        assert (tree / "datasets.dvc").is_file()


def test_a_file_that_is_no_recipe_by_its_place_is_named(
    project: Project,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In one line of the log, the summary and the review; the examples are meant to be where they are."""
    recipes = project.root / "recipes"
    assert find_ignored(project.root) == ()
    for name in ("x.yml", "sub/x.yaml", "examples/x.yaml"):
        (recipes / name).parent.mkdir(exist_ok=True)
        shutil.copy(recipes / "colours.yaml", recipes / name)
    project.commit("misplaced")
    told = "not read: recipes/sub/x.yaml, recipes/x.yml; a recipe is recipes/NAME.yaml"
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    summary = project.root / ".cache" / "summary.md"
    assert main(["reconcile", "--dry-run", "--root", str(project.root), "--summary", str(summary)]) == 0
    assert told in capfd.readouterr().err
    assert told in summary.read_text()
    assert main(["review", "--root", str(project.root)]) == 0
    assert told in capfd.readouterr().out
    (recipes / "colours.yaml").unlink()
    with pytest.raises(RecipeError, match=r"no \*\.yaml here, only recipes/sub/x\.yaml, recipes/x\.yml; add"):
        plan_from_git(project.root)


def test_what_recipes_share_is_read_once(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Each recipe, its dataset and its base: the work grows with the recipes, not with their square."""
    for index in range(4):
        project.write_recipe(f"r{index}", name=f"r{index}")
    project.commit("many")
    time.sleep(2.1)  # what has just changed is read again, see `digest.stat_files`
    counts: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        real = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(desired, "load_recipe")
    count(preparation, "check_dataset")
    count(model_base, "_digest_anew")
    assert [o.action for o in project.reconcile(dry_run=True)] == ["train"] * 5
    assert counts == {"load_recipe": 5, "check_dataset": 1, "_digest_anew": 1}
    rows = project.root / "datasets" / "colours" / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"content": "blue"}', '"content": "bleu"}', 1))
    failed = project.reconcile(dry_run=True, allow_dirty=True)
    assert all("[contract]" in o.reason for o in failed), "what was changed is read again"
