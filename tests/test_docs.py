"""Laws of the documentation: what it says is what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml
from test_cli import walk
from tiny import load_dataset

from appliance.cli import appliance
from appliance.data.findings import Rule
from appliance.recipe import Recipe, render_schema

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def read(name: str) -> str:
    """A page's text."""
    return (ROOT / name).read_text("utf-8")


def test_what_is_made_from_the_code_is_fresh() -> None:
    """The schema, the README's tree and the tables of measured speed are what `make docs` writes."""
    from write import render_readme, render_resume, render_speed

    assert read("docs/recipe.schema.json") == render_schema()
    assert read("README.md") == render_readme(read("README.md"), ROOT)
    assert read("docs/speed.md") == render_speed(read("docs/speed.md"), ROOT)
    assert read("docs/resume.md") == render_resume(read("docs/resume.md"), ROOT)


def test_every_file_in_the_tree_is_told() -> None:
    """No line of the tree is without a description, folders of the top level aside."""
    from write import list_tree

    assert [path for path, text in list_tree(ROOT).items() if not text and not (ROOT / path).is_dir()] == []
    assert [path for path in list_tree(ROOT) if not (ROOT / path).exists()] == []


def test_every_command_is_in_the_readme() -> None:
    """The README shows each verb."""
    leaves = [name for name, command in walk(appliance) if not isinstance(command, click.Group)]
    assert [name for name in leaves if f"appliance {name}" not in read("README.md")] == []


def test_every_command_shown_exists() -> None:
    """A page shows no verb and no make target that is not there."""
    verbs = {name.split(" ")[0] for name, _ in walk(appliance)}
    targets = set(re.findall(r"^([a-z0-9-]+):", read("Makefile"), re.MULTILINE))
    for page in PAGES:
        text = page.read_text("utf-8")
        assert set(re.findall(r"(?:^|`)appliance ([a-z]+)", text, re.MULTILINE)) <= verbs, page
        assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", text, re.MULTILINE)) <= targets, page


def test_the_readmes_recipe_is_valid() -> None:
    """Who copies the recipe of the README has a recipe."""
    (text,) = re.findall(r"```yaml\n(.*?)```", read("README.md"), re.DOTALL)
    assert Recipe.model_validate(yaml.safe_load(text)).name == "tickets"


def test_every_rule_is_explained() -> None:
    """The table in docs/data.md has the check's rules, each once, and no other."""
    table = read("docs/data.md").split("| Rule |")[1]
    cells = [line.split("|")[1] for line in table.splitlines()[2:] if line.startswith("|")]
    told = [rule for cell in cells for rule in re.findall(r"`([a-z-]+)`", cell)]
    assert sorted(told) == sorted(get_args(Rule))


def test_the_conversion_makes_rows(tmp_path: Path) -> None:
    """The script of docs/data.md turns each of the forms that it names into rows that can be read."""
    (script,) = re.findall(r"```python\n(.*?)```", read("docs/data.md"), re.DOTALL)
    theirs = [
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "input": "c", "output": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "\u00e4"}, {"role": "assistant", "content": "b"}]},
    ]
    (tmp_path / "theirs.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, theirs)) + "\n", "utf-8")
    (tmp_path / "dataset.yaml").write_text("name: x\n")
    command = [sys.executable, "-c", script, str(tmp_path / "theirs.jsonl")]
    done = subprocess.run(command, capture_output=True, check=True)
    (tmp_path / "theirs.jsonl").unlink()
    (tmp_path / "rows.jsonl").write_bytes(done.stdout)
    rows = load_dataset(tmp_path).examples
    assert [(r.request, r.answer) for r in rows] == [("a", "b"), ("a\n\nc", "b"), ("a", "b"), ("\u00e4", "b")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_page_says_a_thing_twice(page: Path) -> None:
    """No long line stands twice on a page: an edit that went wrong pastes a block a second time."""
    lines = [line for line in page.read_text("utf-8").splitlines() if len(line) > 60]
    assert [line for line in lines if lines.count(line) > 1] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_link_is_dead(page: Path) -> None:
    """Links to files of this repository lead somewhere."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
