"""What people see of the mask: in the plan, in the run record and in the arguments of a card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from families import FAMILIES, write_family
from tiny import COLOURS, load_dataset, make_recipe, write_base

from appliance.cli import appliance
from appliance.example import decode_examples
from appliance.model import load_template, render_row
from appliance.preparation import Origin, Workspace, prepare
from appliance.recipe import load_recipe
from appliance.run import Run, open_run
from appliance.training import select_masks, show_mask

BY_NAME = {f.name: f for f in FAMILIES}
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def is_long(index: int) -> bool:
    """A fifth of the rows, on every side of the split."""
    return index % 5 == 2


def write_project(root: Path, *, family: str, **training: Any) -> Path:
    """A base of the family, two-turn rows, some with a long question, and a recipe."""
    write_base(root / "base")
    write_family(root / "base", BY_NAME[family])
    folder = root / "datasets" / "colours"
    folder.mkdir(parents=True)
    card = {"name": "colours", "contract": {"type": "labels", "labels": list(COLOURS)}}
    (folder / "dataset.yaml").write_text(json.dumps(card))
    lines = []
    for index in range(40):
        colour = COLOURS[index % 4]
        asked = f"thing {index}:\n{colour}" + " very" * (60 if is_long(index) else 0)
        turns = [("user", asked), ("assistant", colour), ("user", f"again {index}? <|im_end>"), ("assistant", colour)]
        messages = [{"role": r, "content": c} for r, c in turns]
        lines.append(json.dumps({"id": f"r{index}", "messages": messages, "provenance": "program"}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    recipe = make_recipe(training=training)
    file = root / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    return file


def plan(file: Path, *arguments: str, color: bool = False) -> Result:
    """`appliance plan` on the project, in this process."""
    given = ["plan", str(file), "--root", str(file.parent), "--cache", str(file.parent / "cache"), *arguments]
    return CliRunner().invoke(appliance, given, color=color, env={"APPLIANCE_OUT": str(file.parent / "out")})


def test_references_that_no_answer_can_reach_are_told_before_training(tmp_path: Path) -> None:
    """Else base and candidate score 0 alike on such rows, and the verdict asks for more of them."""
    file = write_project(tmp_path, family="smollm2", max_length=512)
    assert "max_new_tokens" not in plan(file).output
    recipe = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(recipe | {"evaluation": {**recipe.get("evaluation", {}), "max_new_tokens": 3}}))
    found = " ".join(plan(file).output.split())
    told = re.search(
        r"max_new_tokens 3 cuts every answer to (\d+) of (\d+) test rows .*\(row r\d+ has (\d+) tokens\); write (\d+)",
        found,
    )
    assert told, found
    cut, rows, longest, enough = map(int, told.groups())
    assert 0 < cut < rows
    assert enough == longest + 1 == max(map(len, COLOURS)) + 1


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose template leaves history alone."""
    return write_project(tmp_path_factory.mktemp("chatml"), family="smollm2", max_length=512)


def test_the_plan_marks_what_is_trained_also_without_colour(chatml: Path) -> None:
    """Lines of trained tokens begin with `>`, and put together they are the answers and their stop tokens."""
    done = plan(chatml, "--show-mask", "2")
    assert done.exit_code == 0, done.output
    shown = done.stdout.split("\nrow ")[1]
    assert COLOUR.search(shown) is None
    assert [line[4:] for line in shown.splitlines() if line.startswith("  > ")] == ["red<|im_end|>"] * 2
    assert shown.splitlines()[0] == "r0: 8 of 115 tokens are trained (>)"
    assert "thing 0:⏎" in shown


def test_on_a_terminal_trained_text_and_control_tokens_have_their_colours(chatml: Path) -> None:
    """Green is trained, magenta is a control token; text that only looks like one has no colour."""
    shown = plan(chatml, "--show-mask", "1", color=True).stdout
    assert "\x1b[32m\x1b[1mred\x1b[0m" in shown
    assert "\x1b[35m\x1b[1m<|im_end|>\x1b[0m" in shown
    assert "again 0? <|im_end>\x1b" in shown
    plain = plan(chatml, "--show-mask", "1").stdout
    assert COLOUR.sub("", shown) == plain


def test_the_pieces_are_the_row(chatml: Path) -> None:
    """Nothing of a row is left out or doubled, and what is shown as trained is as many tokens as are trained."""
    template = load_template(chatml.parent / "base")
    for example in load_dataset(chatml.parent / "datasets" / "colours").examples[:8]:
        row = render_row(example, template)
        pieces = show_mask(row, template)
        assert "".join(p.text for p in pieces) == template.decode(row.input_ids)
        trained = "".join(p.text for p in pieces if p.is_trained)
        assert trained == "".join(template.decode(row.input_ids[a:b]) for a, b in row.spans)
        assert all(len(template.encode(p.text).ids) == 1 for p in pieces if p.is_token)


def test_a_plan_as_json_has_the_masks(chatml: Path) -> None:
    """For tools: the same pieces, and what became of the rows."""
    said = json.loads(plan(chatml, "--show-mask", "1", "--json").stdout)
    assert said["masks"][0]["id"] == "r0"
    assert [text for text, trained, _ in said["masks"][0]["pieces"] if trained] == ["red", "<|im_end|>"] * 2
    assert said["train"]["split"] == said["train"]["dropped"] == []
    assert said["thinking"] == "fixed"


def test_a_plan_says_what_was_split_and_dropped(tmp_path: Path) -> None:
    """A template that rewrites history and a row that is too long: both are told, by id."""
    file = write_project(tmp_path, family="qwen3", max_length=256, overlong="drop")
    done = plan(file, "--show-mask", "2")
    assert done.exit_code == 0, done.output
    assert "thinking    off: the rows' answers do not think" in done.stdout
    assert "rows became several token rows: the chat template rewrites earlier turns (r0, " in done.stdout
    assert re.search(r"warning: \d rows are too long and would be dropped whole \(r\d*[27], ", done.stdout)
    assert "row r0, part 1 of 2: 4 of" in done.stdout
    assert "row r0, part 2 of 2: 4 of" in done.stdout


def test_a_plan_refuses_what_a_run_would_refuse(tmp_path: Path) -> None:
    """Too long a row: the plan says so by id, before anything is spent."""
    file = write_project(tmp_path, family="smollm2", max_length=256)
    done = plan(file)
    assert done.exit_code == 1
    assert re.search(r"row r\d*[27]: \d+ tokens, training\.max_length is 256", str(done.exception))
    assert "training.overlong: drop" in str(done.exception)


def run_prepare(file: Path, *, notes: list[str] | None = None) -> Run:
    """The first stage of a run, in this process; what it says is added to `notes`."""
    from appliance.pipeline import _prepare_stage

    root = file.parent
    said = notes if notes is not None else []
    workspace = Workspace(root=root, cache=root / "cache", runs=root / "runs", note=said.append)
    recipe = load_recipe(file)
    prepared = prepare(recipe, workspace=workspace)
    run = open_run(workspace.runs, name=recipe.name, key=prepared.key)
    run.folder.mkdir(parents=True)
    _prepare_stage(run, prepared, workspace=workspace, origin=Origin(None, "2026-01-31T12:00:00Z", "me"))
    return run


def test_the_run_record_counts_what_was_dropped_and_keeps_test_rows(tmp_path: Path) -> None:
    """By id, a side at a time; a test row is never dropped, or the score would be of other rows."""
    file = write_project(tmp_path, family="qwen3", max_length=140, overlong="drop")
    run = run_prepare(file)
    record = run.read("prepare")
    dropped = record["rows"]["train"]["dropped"] + record["rows"]["validation"]["dropped"]
    tested = [e.id for e in decode_examples((run.examples / "test.jsonl").read_bytes())]
    long = {f"r{i}" for i in range(40) if is_long(i)}
    assert long & set(tested), "a long row is among those that are evaluated"
    assert set(dropped) == long - set(tested)
    assert record["rows"]["test"]["dropped"] == []
    assert record["rows"]["train"]["token_rows"] == record["plan"]["rows"]
    assert record["thinking"] == "off"
    shown = [(m["id"], m["part"]) for m in record["masks"]]
    assert shown[:2] == [(shown[0][0], "1 of 2"), (shown[0][0], "2 of 2")], "a split conversation is shown whole"


def test_plan_and_run_tell_the_control_tokens_in_the_text_of_rows(tmp_path: Path) -> None:
    """One line with place, row, turn and token, for rows of the dataset and general ones; a plan as JSON stays JSON."""
    file = write_project(tmp_path, family="smollm2", max_length=512)
    rows = tmp_path / "datasets" / "colours" / "rows.jsonl"
    rows.write_text(rows.read_text().replace("thing 7:", "thing 7: <|im_start|>"))
    general = tmp_path / "general"
    general.mkdir()
    (general / "dataset.yaml").write_text("name: general\n")
    turns = [[("user", f"why {n}?"), ("assistant", f"so {n} <|im_start|>" if n == 3 else "so")] for n in range(10)]
    lines = [
        {"id": f"g{n}", "messages": [{"role": r, "content": c} for r, c in t], "provenance": "general"}
        for n, t in enumerate(turns)
    ]
    (general / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = yaml.safe_load(file.read_text()) | {"forgetting": {"ewc": {"path": "general", "rows": 10}}}
    file.write_text(yaml.safe_dump(recipe))
    expected = [
        f"warning: {rows}:8: [token] row r7: turn 1 (user) holds the control token '<|im_start|>' in its text; ",
        "warning: forgetting: [token] row general:g3: turn 2 (assistant) holds the control token '<|im_start|>'",
    ]
    done = plan(file, "--json")
    assert json.loads(done.stdout)["thinking"] == "fixed"
    notes: list[str] = []
    run_prepare(file, notes=notes)
    for said in (done.stderr.splitlines(), notes):
        told = [line.strip() for line in said if "[token]" in line]
        assert len(told) == 2
        assert all(line.startswith(start) for line, start in zip(told, expected, strict=True))


def test_rows_for_the_card_are_few_and_telling(chatml: Path) -> None:
    """The first row, and the one with the most answers; never more than three."""
    template = load_template(chatml.parent / "base")
    rows = [render_row(e, template) for e in load_dataset(chatml.parent / "datasets" / "colours").examples]
    masks = select_masks(rows, template)
    assert [m["id"] for m in masks] == ["r0", "r1", "r2"]
    assert all(sum(1 for p in m["pieces"] if p.is_trained and p.is_token) == 2 for m in masks)
