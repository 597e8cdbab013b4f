"""Laws of the documentation: what it says is what the code does."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import click
import pytest
import yaml
from test_cli import walk
from tiny import load_dataset, write_base

from appliance.cli import appliance, main
from appliance.data.findings import Rule
from appliance.demo import QUICK_ROWS, write_dataset
from appliance.example import Example
from appliance.manifest import Outcome
from appliance.recipe import GateSection, Recipe, render_schema
from appliance.starter import start_repository
from appliance.statistics import mcnemar_exact, paired_gain_interval, smallest_gain
from appliance.training.monitor import Rules, watch_records

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def read(name: str) -> str:
    """A page's text."""
    return (ROOT / name).read_text("utf-8")


def test_what_is_made_from_the_code_is_fresh() -> None:
    """The schema, the recipe's keys, the tree and the tables of measured speed are what `make docs` writes."""
    from write import (
        render_architecture,
        render_forgetting,
        render_memory,
        render_recipe,
        render_resume,
        render_speed,
    )

    assert read("docs/recipe.schema.json") == render_schema()
    assert read("docs/architecture.md") == render_architecture(read("docs/architecture.md"), ROOT)
    assert read("docs/recipe.md") == render_recipe(read("docs/recipe.md"))
    assert read("docs/speed.md") == render_memory(render_speed(read("docs/speed.md"), ROOT), ROOT)
    assert read("docs/resume.md") == render_resume(read("docs/resume.md"), ROOT)
    assert read("docs/forgetting.md") == render_forgetting(read("docs/forgetting.md"), ROOT)


def test_every_file_in_the_tree_is_told() -> None:
    """No line of the tree is without a description, folders of the top level aside."""
    from write import list_tree

    assert [path for path, text in list_tree(ROOT).items() if not text and not (ROOT / path).is_dir()] == []
    assert [path for path in list_tree(ROOT) if not (ROOT / path).exists()] == []


def test_every_command_is_in_the_readme() -> None:
    """The README shows each verb."""
    leaves = [name for name, command in walk(appliance) if not isinstance(command, click.Group)]
    assert [name for name in leaves if f"appliance {name}" not in read("README.md")] == []


LEAD = re.compile(
    r"\s*(?:\w+=\S+ )*(?:\$ |run: )?"
    r"(?:docker run .*IMAGE|docker compose run --rm appliance|(?:\.github/scripts/)?appliance) (?=[a-z-])"
)


def list_commands(file: Path) -> tuple[list[list[str]], list[list[str]]]:
    """The `appliance` commands that a file shows: those to be typed or run, and those named in running text."""
    text = re.sub(r"\\\n\s*", "", file.read_text("utf-8"))
    typed = "" if file.suffix == ".py" else re.sub(r"^ *# *(?=appliance )", "", text, flags=re.MULTILINE)
    if file.suffix == ".md":
        parts = re.split(r"^```.*$", text, flags=re.MULTILINE)
        text, typed = "\n".join(parts[::2]), "\n".join(parts[1::2])
    return read_commands(typed.splitlines()), read_commands(re.findall(r"`([^`]+)`", text))


def read_commands(lines: list[str]) -> list[list[str]]:
    """The words after `appliance` in each line that runs it, up to a pipe or comment; a `{value}` is one word."""
    commands = [(line, lead.end()) for line in lines if (lead := LEAD.match(line))]
    shown = [re.split(r"[|;&<>#`]| \(", line[end:])[0].replace('"${options[@]}"', "") for line, end in commands]
    return [shlex.split(re.sub(r"\$?\{+[^{}]*\}+", "VALUE", words)) for words in shown]


def find_fault(words: list[str], *, is_named: bool) -> str:
    """What click's own parser has against a command: an unknown verb or option, too many or too few arguments.

    A name in running text may be a verb without its arguments, and may end in an option without its value.
    """
    command: click.Command = appliance
    rest = [word for word in words if word not in ("-h", "--help", "--version")]
    while isinstance(command, click.Group) and rest:
        try:
            child = command.get_command(click.Context(command), rest[0])
        except click.UsageError as fault:
            return fault.format_message()
        if child is None:
            return f"no command {rest[0]}"
        command, rest = child, rest[1:]
    context = click.Context(command)
    try:
        given, left, _ = command.make_parser(context).parse_args([*rest])
    except click.BadOptionUsage as fault:
        return "" if is_named and words[-1] == fault.option_name else fault.format_message()
    except click.UsageError as fault:
        return fault.format_message()
    wanted = [p for p in command.params if isinstance(p, click.Argument) and p.required]
    lacking = [p.name for p in wanted if p.value_is_missing(given.get(p.name))]
    is_whole = bool(rest) or not is_named
    return f"unexpected {left}" if left else f"lacks {lacking}" if lacking and is_whole else ""


SHOWING = sorted(
    file
    for pattern in ("*.md", "docs/**/*.md", "recipes/**/*.yaml", "appliance/**/*.py", "appliance/starter/files/*/**/*")
    for file in ROOT.glob(pattern)
    if file.is_file() and "__pycache__" not in file.parts
)


@pytest.mark.parametrize("file", sorted({*SHOWING}), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_shown_can_be_typed(file: Path) -> None:
    """Pages, recipes, starter files and messages show no verb, option or number of arguments that is refused."""
    typed, named = list_commands(file)
    faults = [(words, find_fault(words, is_named=False)) for words in typed]
    faults += [(words, find_fault(words, is_named=True)) for words in named]
    assert [f"appliance {' '.join(words)}: {fault}" for words, fault in faults if fault] == []


def test_a_command_that_cannot_be_typed_is_found(tmp_path: Path) -> None:
    """The test above is worth something: each class of fault is found, in a block and in running text."""
    page = tmp_path / "page.md"
    page.write_text(
        "`appliance review A..B` `appliance plan` `appliance plna`\n```\nappliance plan\nappliance gc --older\n```\n"
    )
    typed, named = list_commands(page)
    assert [bool(find_fault(words, is_named=True)) for words in named] == [True, False, True]
    assert [bool(find_fault(words, is_named=False)) for words in typed] == [True, True]


def test_the_readmes_table_names_options_of_its_verbs() -> None:
    """An option in the row of a verb is one that the verb has."""
    for verb, does in re.findall(r"^\| `appliance ([a-z ]+).*?` \| (.*) \|$", read("README.md"), re.MULTILINE):
        command = dict(walk(appliance))[verb.strip()]
        options = {o for p in command.params for o in p.opts}
        assert set(re.findall(r"`(--[a-z-]+)", does)) <= options, verb


def test_every_page_is_in_the_readme() -> None:
    """Who reads the README finds every page, and gets no list of files in its stead."""
    pages = [f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")]
    assert [page for page in pages if f"]({page})" not in read("README.md")] == []
    assert "tests/" not in read("README.md")


def test_every_make_target_shown_exists() -> None:
    """A page shows no make target that is not there."""
    targets = set(re.findall(r"^([a-z0-9-]+):", read("Makefile"), re.MULTILINE))
    for page in [*PAGES, ROOT / "recipes" / "demo.yaml"]:
        assert set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", page.read_text("utf-8"), re.MULTILINE)) <= targets, page


def test_nobody_is_told_to_install_a_name_from_an_index() -> None:
    """No page and no message says `pip install appliance`: whoever registers that name would be installed."""
    texts = [*PAGES, *sorted((ROOT / "appliance").rglob("*.py"))]
    named = re.compile(r"pip install ['\"]?appliance\b(?!/)")
    assert [file for file in texts if named.search(file.read_text("utf-8"))] == []


def list_texts(file: Path) -> list[str]:
    """The strings of a module, docstrings aside."""
    tree = ast.parse(file.read_text("utf-8"))
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in bare)
    return [node.value for node in found if isinstance(node.value, str)]


def test_no_message_points_into_a_clone_that_the_reader_may_not_have() -> None:
    """An install has `appliance/` alone: a message says what a page would, or whose page it is."""
    pointer = re.compile(r"(?<!the appliance's )docs/\w+\.md|README,|recipes/examples\b(?!`)")
    files = [f for f in sorted((ROOT / "appliance").rglob("*.py")) if f.name not in ("recipe.py", "method.py")]
    assert [(f.name, text) for f in files for text in list_texts(f) if pointer.search(text)] == []


def test_every_extra_is_told() -> None:
    """The README's table of extras has those of pyproject.toml, the one for work on the appliance aside."""
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"].keys() - {"dev"}
    table = read("README.md").split("| Extra |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z]+)` \|", table, re.MULTILINE)) == extras


def test_the_readmes_way_into_a_repository_works(tmp_path: Path) -> None:
    """Its commands, one after the other, with the real Git and DVC, lead to a recipe that would train."""
    block = read("README.md").split("## In your own repository")[1].split("```")[1]
    write_dataset(tmp_path, rows=QUICK_ROWS)
    (tmp_path / "dataset.yaml").unlink()
    base = write_base(tmp_path / "base")
    places = {
        "s3://my-bucket/dvc": str(tmp_path / "dvc"),
        "s3://my-bucket/registry": (tmp_path / "registry").as_uri(),
        "~/rows.jsonl": str(next(tmp_path.glob("*.jsonl"))),
        "appliance init\n": f"appliance init\nsed -i 's|model: .*|model: {base}|' recipes/*.yaml\n",
        "appliance reconcile ": "appliance reconcile --dry-run ",
    }
    for shown, real in places.items():
        assert shown in block
        block = block.replace(shown, real)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "APPLIANCE_"))},
        **{f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "APPLIANCE_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        ["bash", "-euc", block], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "tickets: would train: has no version yet" in done.stdout


def test_the_first_run_of_the_page_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/start.md: check and plan of 200 rows with the base of the tests say what the page has, line by line."""
    blocks = re.split(r"^\$ appliance ", read("docs/start.md"), flags=re.MULTILINE)
    shown = {block.partition("\n")[0]: block.partition("\n")[2].splitlines() for block in blocks}
    root = tmp_path / "tickets"
    monkeypatch.setenv("APPLIANCE_CACHE", str(tmp_path / "cache"))
    start_repository(root, remote=None)
    monkeypatch.chdir(root)
    write_dataset(tmp_path / "rows", rows=200)
    (*_, rows) = (tmp_path / "rows").glob("*.jsonl")
    rows.rename(root / "datasets" / "tickets" / "rows.jsonl")
    recipe = root / "recipes" / "tickets.yaml"
    base = write_base(tmp_path / "base")
    recipe.write_text(re.sub(r"model: .*", f"model: {base}", recipe.read_text()))
    for command in ("data check datasets/tickets", "plan recipes/tickets.yaml"):
        assert main(command.split()) == 0
        told = "".join(capsys.readouterr())
        for line in shown[command]:
            form = re.sub(r"[0-9a-f]{12}", "[0-9a-f]{12}", re.escape(line).replace(re.escape("..."), ".*"))
            assert re.search(f"^{form}$", told, re.MULTILINE), line


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "Makefile", "recipes/demo.yaml"])
def test_the_demos_time_is_one(name: str) -> None:
    """Whoever says how long the demo takes says the same."""
    lines = [line for line in read(name).splitlines() if "demo" in line]
    told = [number for line in lines for number in re.findall(r"[Aa]bout (\d+) min", line)]
    assert told
    assert set(told) == {"10"}


def test_the_readmes_recipe_is_valid() -> None:
    """Who copies the recipe of the README has a recipe."""
    (text,) = re.findall(r"```yaml\n(.*?)```", read("README.md"), re.DOTALL)
    assert Recipe.model_validate(yaml.safe_load(text)).name == "tickets"


def test_parts_of_a_recipe_on_a_page_are_valid() -> None:
    """A part of a recipe that a page shows can be put into a recipe as it stands."""
    parts = [
        part for page in PAGES for part in re.findall(r"```yaml\n(\w+:\n.*?)```", page.read_text("utf-8"), re.DOTALL)
    ]
    whole = yaml.safe_load(re.findall(r"```yaml\n(name:.*?)```", read("README.md"), re.DOTALL)[0])
    assert len([Recipe.model_validate({**whole, **yaml.safe_load(part)}) for part in parts]) >= 2


def test_every_key_of_a_recipe_is_described() -> None:
    """Editors and docs/recipe.md say what each key means."""
    schema = Recipe.model_json_schema()
    sections = {"Recipe": schema, **schema["$defs"]}
    mute = [f"{n}.{k}" for n, s in sections.items() for k, v in s["properties"].items() if not v.get("description")]
    assert mute == []


@pytest.mark.parametrize("page", ["docs/recipe.md", "appliance/starter/files/start/recipe.yaml"])
def test_the_schema_can_be_written_from_what_is_installed(page: str, tmp_path: Path) -> None:
    """The command of docs/recipe.md and of a first recipe writes the schema, outside of a clone too."""
    (command,) = re.findall(r"^(?:# +)?(python .*recipe\.schema\.json)$", read(page), re.MULTILINE)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", command], cwd=tmp_path, env=env, check=True, timeout=60)
    assert (tmp_path / "recipe.schema.json").read_text("utf-8") == render_schema()


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/**/*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_that_names_a_schema_names_this_one(path: Path) -> None:
    """Each example names the schema beside it; the demo's does not, for it is also where there is none."""
    named = re.findall(r"^# yaml-language-server: \$schema=(.*)$", path.read_text("utf-8"), re.MULTILINE)
    wanted = [ROOT / "docs" / "recipe.schema.json"] if path.parent.name == "examples" else []
    assert [(path.parent / name).resolve() for name in named] == wanted


def test_the_speed_of_the_other_processor_is_its_result() -> None:
    """What docs/speed.md says of the EPYC is in a committed result."""
    result = json.loads(read("benchmarks/results/train_cpu_epyc.json"))
    rate = statistics.median(result["tokens_per_second"]["appliance"])
    best = min(ratio for name, ratio in result["ratio"].items() if name.startswith("trl"))
    words = f"gave {rate:.0f} tokens/s, {result['ratio']['trl']:.1f} times TRL's defaults and {best:.1f} times its best"
    assert f"{words} ({result['date']}; `benchmarks/results/train_cpu_epyc.json`)" in " ".join(
        read("docs/speed.md").split()
    )


def test_the_examples_of_monitoring_are_what_the_rules_say() -> None:
    """docs/monitoring.md: where a run that begins at 2.4 is refused, and which sameness is a collapse."""
    rules = Rules(keep="best_loss", patience=None, max_steps=100)

    def refuses(loss: float, *, steps: int) -> bool:
        losses = [2.4, *[loss] * steps]
        return bool(
            watch_records(({"step": i, "loss": x, "learning_rate": 1e-4} for i, x in enumerate(losses)), rules).refusal
        )

    assert [refuses(7.3, steps=5), refuses(7.3, steps=4), refuses(7.1, steps=5)] == [True, False, False]
    assert [refuses(3.7, steps=60), refuses(3.5, steps=60)] == [True, False]

    def collapses(answer: float, reference: float) -> bool:
        found = {"validation_loss": 1.0, "validation_rows": 100, "validation_same_answer": answer}
        evaluations = [{**found, "step": step, "validation_same_reference": reference} for step in (1, 2)]
        return any(alert.kind == "collapse" for alert in watch_records(evaluations, rules).alerts)

    assert [collapses(0.95, 0.3), collapses(0.95, 0.9)] == [True, False]


def test_the_page_on_the_verdict_is_the_code() -> None:
    """docs/evaluation.md has each outcome, the gates as they are, and numbers that the statistics give."""
    page = read("docs/evaluation.md")
    assert set(re.findall(r"^\| `([a-z]+)` \| yes \|", page, re.MULTILINE)) == set(get_args(Outcome))
    gates = GateSection()
    assert f"`alpha` {gates.alpha}, `min_gain` {gates.min_gain}, `min_test_rows` {gates.min_test_rows}." in page
    counts, gains = (
        re.findall(r"[\d,]+", re.findall(rf"^\| {n} .*$", page, re.MULTILINE)[0]) for n in ("Test rows", "Gain")
    )
    found = [smallest_gain(int(n.replace(",", "")), alpha=gates.alpha) for n in counts]
    assert [f"{(gain or 0) * 100:.0f}" for gain in found] == gains
    low, high = paired_gain_interval(both=25, wins=12, losses=3, neither=60)
    assert f"p = {mcnemar_exact(12, 3):.2g}, interval {low * 100:+.1f} to {high * 100:+.1f}" in page


def test_every_rule_is_explained() -> None:
    """The table in docs/data.md has the check's rules, each once, and no other."""
    table = read("docs/data.md").split("| Rule |")[1]
    cells = [line.split("|")[1] for line in table.splitlines()[2:] if line.startswith("|")]
    told = [rule for cell in cells for rule in re.findall(r"`([a-z-]+)`", cell)]
    assert sorted(told) == sorted(get_args(Rule))


def convert(file: Path) -> subprocess.CompletedProcess[bytes]:
    """What the script of docs/data.md makes of a file."""
    (script,) = re.findall(r"```python\n(.*?)```", read("docs/data.md"), re.DOTALL)
    return subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, check=False)


def convert_all(folder: Path, *files: Path) -> tuple[Example, ...]:
    """The dataset of the files, converted one by one."""
    folder.mkdir()
    (folder / "dataset.yaml").write_text("name: x\n")
    for file in files:
        done = convert(file)
        assert done.returncode == 0, done.stderr.decode()
        (folder / f"{file.stem}.jsonl").write_bytes(done.stdout)
    return load_dataset(folder).examples


@pytest.mark.parametrize("form", ["lines", "array", "indented array"])
def test_the_conversion_makes_rows(tmp_path: Path, form: str) -> None:
    """The script of docs/data.md turns each of the forms that it names into rows that can be read."""
    theirs = [
        {"prompt": "a", "completion": "b"},
        {"instruction": "a", "input": "c", "output": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "\u00e4"}, {"role": "assistant", "content": "b"}]},
    ]
    indent = 2 if form == "indented array" else None
    text = "\n".join(map(json.dumps, theirs)) if form == "lines" else json.dumps(theirs, indent=indent)
    (tmp_path / "theirs.jsonl").write_text(f"\ufeff{text}\n", "utf-8")
    rows = convert_all(tmp_path / "rows", tmp_path / "theirs.jsonl")
    assert [(r.request, r.answer) for r in rows] == [("a", "b"), ("a\n\nc", "b"), ("a", "b"), ("\u00e4", "b")]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_conversion_reads_what_a_spreadsheet_writes(tmp_path: Path, separator: str, mark: str) -> None:
    """With a byte-order mark or without, by comma, semicolon or tab, with line ends inside of a cell."""
    text = f'{mark}prompt{separator}completion\r\n"a{separator}\r\nb"{separator}c\r\n'
    (tmp_path / "table.csv").write_bytes(text.encode())
    (row,) = convert_all(tmp_path / "rows", tmp_path / "table.csv")
    assert (row.request.replace("\r", ""), row.answer) == (f"a{separator}\nb", "c")


def test_the_conversion_loses_nothing_that_a_row_holds(tmp_path: Path) -> None:
    """Ids, writers, tools and calls stay, text in parts is joined; two files of one dataset never collide."""
    call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    row = {"messages": turns, "tools": [{"type": "function", "function": {"name": "look"}}]}
    for name in ("one", "two"):
        kept = {**row, "id": f"kept-{name}", "provenance": "synthetic", "tools": json.dumps(row["tools"])}
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(kept)}\n")
    rows = convert_all(tmp_path / "rows", tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    assert [r.id for r in rows] == ["one-00001", "kept-one", "two-00001", "kept-two"]
    assert [r.provenance for r in rows] == ["human", "synthetic"] * 2
    assert {r.request for r in rows} == {"ab"}
    assert [r.messages[-1].tool_calls for r in rows] == [[call]] * 4
    assert [json.loads(r.tools or "") for r in rows] == [row["tools"]] * 4


def test_the_conversion_names_the_keys_that_it_does_not_know(tmp_path: Path) -> None:
    """What is in no form that it names is one line with the keys that were found, and no traceback."""
    (tmp_path / "theirs.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    done = convert(tmp_path / "theirs.jsonl")
    assert done.returncode == 1
    assert b"row 1 has question, answer; expected messages" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "recipe.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_page_says_a_thing_twice(page: Path) -> None:
    """No long line stands twice on a page: an edit that went wrong pastes a block a second time.

    docs/recipe.md is written from the code, and methods share keys.
    """
    lines = [line for line in page.read_text("utf-8").splitlines() if len(line) > 60]
    assert [line for line in lines if lines.count(line) > 1] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_link_is_dead(page: Path) -> None:
    """Links to files of this repository lead somewhere."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
