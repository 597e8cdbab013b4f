"""Laws of the data room: every fault has its place, and growth never moves a row between sides."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEMPLATE, load_dataset, make_recipe, write_dataset, write_tokenizer

from appliance.cli import main
from appliance.data import (
    Dataset,
    DatasetCard,
    Report,
    Row,
    check_dataset,
    order_general,
    select_side,
    split_dataset,
    summarise_dataset,
)
from appliance.data import rows as rows_module
from appliance.data.check import _check_duplicates, _check_prompts, _check_text, _check_turns
from appliance.data.findings import Finding
from appliance.digest import digest_folder
from appliance.errors import DatasetError, RecipeError, TrainingError
from appliance.evaluation import Result, judge
from appliance.example import Example, Message
from appliance.model import load_template
from appliance.preparation import Workspace, check_recipe
from appliance.recipe import GateSection, Recipe, SplitSection, load_recipe
from appliance.training import build_rows

SPLIT = SplitSection()


def make_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A valid row as plain JSON."""
    return {
        "id": f"r{number}",
        "messages": [{"role": "user", "content": f"red thing {number}"}, {"role": "assistant", "content": "red"}],
        "provenance": "program",
        **changes,
    }


def write_rows(folder: Path, rows: list[dict[str, Any]], **card: Any) -> Path:
    """A dataset of exactly these rows."""
    write_dataset(folder)
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if card:
        old = json.loads((folder / "dataset.yaml").read_text())
        (folder / "dataset.yaml").write_text(json.dumps({**old, **card}))
    return folder


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    """The `messages` of a row."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("roles", talk(("assistant", "red"))),
    ("roles", talk(("user", "red?"), ("assistant", "red"), ("user", "sure?"))),
    ("roles", talk(("user", "a"), ("user", "b"), ("assistant", "red"))),
    ("roles", talk(("user", "a"), ("system", "b"), ("assistant", "red"))),
    ("roles", talk(("user", "a"), ("tool", "b"), ("assistant", "red"))),
    ("schema", {"messages": []}),
    ("empty", talk(("user", " \n"), ("assistant", "red"))),
    ("control", talk(("user", "a\x00b"), ("assistant", "red"))),
    ("contract", talk(("user", "a"), ("assistant", "purple"))),
    ("contract", talk(("user", "a"), ("assistant", "red "))),
    ("unreviewed", {"provenance": "synthetic"}),
    ("schema", {"provenance": "guess"}),
    ("schema", {"id": 7}),
    ("schema", {"catgory": "x"}),
    ("schema", talk(("robot", "a"), ("assistant", "red"))),
    ("id", {"id": "r0"}),
    ("duplicate", talk(("user", "red thing 0"), ("assistant", "red"))),
    ("contradiction", talk(("user", " red thing 0\n"), ("assistant", "blue"))),
    ("schema", {"tools": "[{"}),
    ("schema", {"tools": "[" * 100_000}),
    ("schema", {"tools": '{"name": "look"}'}),
    ("shared-prompt", {**talk(("user", "Red thing 0"), ("assistant", "red")), "group": "other"}),
]


@pytest.mark.parametrize(("rule", "fault"), FAULTS, ids=[f"{n}-{f[0]}" for n, f in enumerate(FAULTS)])
def test_each_fault_is_found_at_its_line_by_its_rule(tmp_path: Path, rule: str, fault: dict[str, Any]) -> None:
    """One bad row among good ones is one error, with file and line, the rule's name and a fix."""
    rows = [make_row(n) for n in range(12)]
    rows[7] = {**make_row(7), **fault}
    report = check_dataset(write_rows(tmp_path / "d", rows), split=SPLIT)
    places = {(f.rule, f.where) for f in report.errors}
    assert (rule, f"{tmp_path / 'd' / 'rows.jsonl'}:8") in places, report.errors
    assert all(f.fix for f in report.errors)


TWO_ANSWERS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "same": (talk(("user", "a"), ("assistant", "red")), talk(("user", "a "), ("assistant", "blue")), "error"),
    "unicode": (
        talk(("user", "caf\u00e9"), ("assistant", "red")),
        talk(("user", "cafe\u0301"), ("assistant", "blue")),
        "error",
    ),
    "system": (
        talk(("system", "To French."), ("user", "a"), ("assistant", "red")),
        talk(("system", "To German."), ("user", "a"), ("assistant", "blue")),
        None,
    ),
    "tools": (
        {**talk(("user", "a"), ("assistant", "red")), "tools": '[{"name": "look"}]'},
        talk(("user", "a"), ("assistant", "blue")),
        None,
    ),
    "powers": (
        talk(("user", "Is it 2\u00b2?"), ("assistant", "red")),
        talk(("user", "Is it 22?"), ("assistant", "blue")),
        "warning",
    ),
    "case": (talk(("user", "US?"), ("assistant", "red")), talk(("user", "us?"), ("assistant", "blue")), "warning"),
    "indent": (
        talk(("user", "if a:\n  b\nc"), ("assistant", "red")),
        talk(("user", "if a:\n  b\n  c"), ("assistant", "blue")),
        "warning",
    ),
    "agree": (talk(("user", "US?"), ("assistant", "red")), talk(("user", "us?"), ("assistant", "red")), None),
}


@pytest.mark.parametrize("kind", TWO_ANSWERS)
def test_only_one_request_with_two_answers_contradicts_itself(tmp_path: Path, kind: str) -> None:
    """Another system prompt or other tools ask another thing; another case or spacing may, so a person decides."""
    rows = [make_row(n) for n in range(100)]
    one, other, severity = TWO_ANSWERS[kind]
    rows[3] |= one
    rows[5] |= other
    rows[8] |= {**one, **talk(("system", "Between."), *[(m["role"], m["content"]) for m in one["messages"][-2:]])}
    file = write_rows(tmp_path / "d", rows) / "rows.jsonl"
    found = [
        (f.severity, f.rule, f.where, f"row r3 at {file}:4" in f.message) for f in check_dataset(file.parent).findings
    ]
    assert found == ([(severity, "contradiction", f"{file}:6", True)] if severity else [])


def chat(*contents: str, **changes: Any) -> dict[str, Any]:
    """A row of user and assistant turns in turn, and what else it has."""
    return {**talk(*zip(("user", "assistant") * len(contents), contents, strict=False)), **changes}


def test_a_conversation_row_by_row_stays_on_one_side(tmp_path: Path) -> None:
    """The turns before the last are trained on too, so a row that ends with one of them is of the same group."""
    rows = [make_row(n) for n in range(12)]
    rows[2] |= {**chat("Hi", "red"), "messages": [{"role": "system", "content": "s"}, *chat("Hi", "red")["messages"]]}
    rows[4] |= chat("hi ", "red", "And \n you?", "blue")
    rows[6] |= chat("hi", "red", "and you?", "blue", "sure?", "green")
    rows[8] |= chat("red thing 0", "red", "again?", "red", group="r0")
    rows[9] |= chat("red thing 99", "red", "again?", "red")
    file = write_rows(tmp_path / "d", rows) / "rows.jsonl"
    report = check_dataset(file.parent)
    said = {(f.id, f.where, f.message.split(" in another")[0]) for f in report.errors}
    assert said == {
        ("r4", f"{file}:5", f"the prompt of turn 2 is that of row r2 at {file}:3"),
        ("r6", f"{file}:7", f"the prompt of turn 2 is that of row r2 at {file}:3"),
        ("r6", f"{file}:7", f"the prompt of turn 4 is that of row r4 at {file}:5"),
        ("r8", f"{file}:9", f"the prompt of turn 2 is that of row r0 at {file}:1"),
    }
    assert {(f.rule, f.fix) for f in report.errors} == {
        ("shared-prompt", "give both rows the same group, or remove one")
    }
    for number, group in {0: "r0", 2: "hi", 4: "hi", 6: "hi"}.items():
        rows[number]["group"] = group
    assert not check_dataset(write_rows(tmp_path / "d", rows)).errors


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["a", "A ", "b", ""]), min_size=2, max_size=6), min_size=1, max_size=12),
    st.sampled_from([None, "g"]),
)
def test_what_the_check_lets_pass_is_never_trained_on_and_tested(talks: list[list[str]], group: str | None) -> None:
    """No turn that one side trains has the prompt of a row on another side, whatever the conversations."""
    rows = [
        Row(
            msgspec.convert(make_row(n, **chat(*t[: len(t) // 2 * 2]), group=group if n % 2 else None), Example), "f", n
        )
        for n, t in enumerate(talks)
    ]
    dataset = Dataset(Path("f"), DatasetCard(name="d"), tuple(rows), "")
    findings = chain(_check_duplicates(dataset), _check_prompts(dataset), _check_turns(dataset))
    if {f.rule for f in findings} & {"shared-prompt", "duplicate"}:
        return
    for row in rows:
        trained = [row.example.messages[:n] for n, m in enumerate(row.example.messages) if m.role == "assistant"]
        prompts = {
            msgspec.structs.replace(row.example, messages=(*t, Message("assistant", ""))).normalised_prompt
            for t in trained
        }
        tested = {r.example.group_key for r in rows if r.example.normalised_prompt in prompts}
        assert tested <= {row.example.group_key}


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=200), max_size=8))
def test_control_characters_are_those_of_ascii_but_for_tab_and_line_ends(text: str) -> None:
    """The first is named, whatever stands around it."""
    row = msgspec.convert(make_row(0, **chat(f"a{text}", "red")), Example)
    dataset = Dataset(Path("f"), DatasetCard(name="d"), (Row(row, "f", 1),), "")
    control = [c for c in text if (ord(c) < 32 and c not in "\n\t\r") or ord(c) == 127]
    expected = [f"turn 1 has the control character {control[0]!r}"] if control else []
    assert [f.message for f in _check_text(dataset)] == expected


def test_a_good_dataset_has_no_errors(tmp_path: Path) -> None:
    """The check does not cry wolf."""
    report = check_dataset(write_dataset(tmp_path / "d", rows=200), split=SPLIT, gates=GateSection(min_test_rows=10))
    assert report.findings == ()
    assert report.counts["rows"] == 200


def test_all_faults_are_found_in_one_pass(tmp_path: Path) -> None:
    """A broken line does not hide the ones after it."""
    folder = write_dataset(tmp_path / "d")
    lines = (folder / "rows.jsonl").read_bytes().splitlines()
    lines[2], lines[5], lines[9] = b'{"id": "x"', b"\xff\xfe", b'["not", "an", "object"]'
    lines[11] = lines[11].replace(b'"provenance"', b'"provenence"')
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    found = {(int(f.where.rsplit(":", 1)[1]), f.rule) for f in check_dataset(folder, split=SPLIT).errors}
    assert found == {(3, "json"), (6, "encoding"), (10, "schema"), (12, "schema")}


def test_a_misspelt_key_is_answered_with_the_right_one(tmp_path: Path) -> None:
    """`provenence` is met with `did you mean provenance?`."""
    row = make_row()
    row["provenence"] = row.pop("provenance")
    (finding,) = [f for f in check_dataset(write_rows(tmp_path / "d", [row]), split=SPLIT).errors if f.rule == "schema"]
    assert "did you mean provenance?" in str(finding)
    assert finding.id == "r0"


STRANGE: list[tuple[str, str, str]] = [
    ("encoding", "\ufeff" + json.dumps(make_row(0)), "byte-order mark"),
    ("json", json.dumps([make_row(0), make_row(1)], indent=1), "each row as one line of JSON"),
    ("schema", '{"prompt": "a", "completion": "red"}', "the script in the appliance's docs/data.md"),
    ("schema", '{"instruction": "a", "input": "", "output": "red"}', "the script in the appliance's docs/data.md"),
    ("schema", '{"conversations": [{"from": "human", "value": "a"}]}', "the script in the appliance's docs/data.md"),
    (
        "schema",
        '{"id": "a", "messages": [{"from": "human", "value": "a"}]}',
        "the script in the appliance's docs/data.md",
    ),
    ("schema", '{"messages": [{"role": "user", "content": "a"}]}', "a row needs id, messages and provenance"),
    ("schema", '{"id": "a", "messages": [{"role": "human", "content": "a"}]}', "one of system, user, assistant, tool"),
    ("schema", json.dumps({**make_row(0), "id": ""}), "[schema] id: empty; a row has id, messages"),
    ("schema", json.dumps({**make_row(0), "id": 7}), "id: found a number, expected text; put it in quotes"),
    ("schema", json.dumps({**make_row(0), "tools": []}), "tools: found a list, expected text; write the list as"),
    ("schema", "[]", "[schema] found a list, expected an object; a row has id, messages"),
    (
        "schema",
        json.dumps(make_row(0) | {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
        "turn 1: content: found a list, expected text; join its parts into one text",
    ),
    (
        "schema",
        json.dumps(
            make_row(0) | {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}
        ),
        'turn 2: content: found null, expected text; write "" where the turn calls a tool',
    ),
    ("schema", json.dumps({**make_row(0), "provenance": "me"}), "one of human, synthetic, program"),
]


@pytest.mark.parametrize(("rule", "text", "fix"), STRANGE, ids=range(len(STRANGE)))
def test_rows_in_another_form_are_met_with_what_to_do(tmp_path: Path, rule: str, text: str, fix: str) -> None:
    """A JSON array, a byte-order mark, the keys of other trainers: an error by line with the way out, and no crash."""
    folder = write_dataset(tmp_path / "d")
    (folder / "rows.jsonl").write_text(text, "utf-8")
    first = check_dataset(folder, split=SPLIT).errors[0]
    assert (first.rule, first.where) == (rule, f"{folder / 'rows.jsonl'}:1")
    assert fix in str(first)


def test_a_file_in_utf_16_is_one_finding(tmp_path: Path) -> None:
    """What an old editor saved is named once, not once for every line of it."""
    folder = write_dataset(tmp_path / "d")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(make_row(n)) for n in range(30)), "utf-16")
    found = [f for f in check_dataset(folder).errors if f.where.startswith(str(folder / "rows.jsonl"))]
    assert [str(f).partition(": ")[2] for f in found] == ["[encoding] not UTF-8 but UTF-16; save the file as UTF-8"]


def test_a_folder_without_rows_says_what_it_has(tmp_path: Path) -> None:
    """Who brought a CSV is told that it was seen and is not read."""
    folder = write_dataset(tmp_path / "d")
    (folder / "rows.jsonl").rename(folder / "rows.csv")
    assert "no *.jsonl file, only rows.csv" in str(check_dataset(folder, split=SPLIT).errors[0])


def test_a_folder_of_datasets_names_them(tmp_path: Path) -> None:
    """Who gives `datasets` is told which folders in it have rows, and nothing of a missing card."""
    write_dataset(tmp_path / "datasets" / "r")
    (finding,) = check_dataset(tmp_path / "datasets").errors
    assert str(finding).endswith(f"[missing] no rows, but folders of rows; name one: {tmp_path / 'datasets' / 'r'}")


def test_a_file_is_answered_with_its_folder(tmp_path: Path) -> None:
    """Who gives a file of rows, or a folder of them for a recipe, is told what to give, not what to pull."""
    folder = write_dataset(tmp_path / "d")
    (finding,) = check_dataset(folder / "rows.jsonl").errors
    assert str(finding) == (
        f"{folder / 'rows.jsonl'}: [missing] a file, expected the folder of a dataset; "
        f"name the folder that it is in, {folder}"
    )
    with pytest.raises(RecipeError, match=r"; give the path of a recipe, a \*\.yaml$"):
        load_recipe(folder)


@pytest.mark.parametrize("content", ["{", "\xff", '{"prompt": "q", "completion": "a"}', None])
def test_rows_that_cannot_be_read_are_not_counted(tmp_path: Path, content: str | None) -> None:
    """Beside what is wrong with the rows nobody is told to collect more of them, nor what so few of them show."""
    rows = write_dataset(tmp_path / "d") / "rows.jsonl"
    if content is None:
        rows.rename(rows.with_suffix(".csv"))
    else:
        rows.write_text(f"{content}\n" * 60 + "".join(rows.read_text().splitlines(keepends=True)[:20]), "latin-1")
    report = check_dataset(tmp_path / "d", split=SPLIT, gates=GateSection())
    assert report.errors
    assert not {f.rule for f in report.findings} & {"volume", "test-size"}


def test_without_a_recipe_nothing_is_said_of_its_split(tmp_path: Path) -> None:
    """Sides and enough test rows are the recipe's: a split or a gate that nobody asked for is not invented."""
    report = check_dataset(write_dataset(tmp_path / "d", rows=50))
    assert {f.rule for f in report.warnings} == {"volume"}
    assert report.counts == {"rows": 50, "provenance": {"program": 50}}


def test_of_a_fault_in_every_row_some_are_shown_and_no_other_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of another form: 20 lines and a count, and the one other fault stands out. Machines get all."""
    foreign = [{"prompt": f"q{n}", "completion": "a"} for n in range(500)]
    folder = write_rows(tmp_path / "rows", [*foreign, make_row(**talk(("user", "red")))])
    assert main(["data", "check", str(folder)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("error")]
    schema = [line for line in lines if "[schema]" in line]
    assert len(schema) == 21
    assert schema[-1].endswith("... and 480 more of [schema]; `appliance data check --json` has all")
    assert len([line for line in lines if "[roles]" in line]) == 1
    main(["data", "check", str(folder), "--json"])
    errors = json.loads(capsys.readouterr().out)["errors"]
    assert len(errors) >= 501
    assert errors[0].keys() == {"severity", "rule", "where", "message", "fix", "id"}, "no line to take apart"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    """No rows are never silently no rows."""
    folder = write_dataset(tmp_path / "d")
    (folder / "rows.jsonl").write_bytes(content)
    assert any(f.where.startswith(str(folder / "rows.jsonl")) for f in check_dataset(folder, split=SPLIT).errors)


def test_what_cannot_be_read_at_all_is_one_error(tmp_path: Path) -> None:
    """A missing folder, a folder without rows, a missing or broken card."""
    assert "dvc pull" in str(check_dataset(tmp_path / "none", split=SPLIT).errors[0])
    (tmp_path / "bare").mkdir()
    assert {f.rule for f in check_dataset(tmp_path / "bare", split=SPLIT).errors} == {"card", "missing"}
    folder = write_dataset(tmp_path / "d")
    (folder / "dataset.yaml").write_text("name: [")
    assert [f.rule for f in check_dataset(folder, split=SPLIT).errors] == ["card"]


def test_a_hidden_file_has_no_rows(tmp_path: Path) -> None:
    """What takes no part in the digest is not read either, such as `._rows.jsonl` that a Mac leaves on other disks."""
    folder = write_dataset(tmp_path / "colours")
    before = load_dataset(folder)
    (folder / "._rows.jsonl").write_bytes(b"\x00\x05\x16\x07 no text")
    (folder / ".more.jsonl").write_bytes((folder / "rows.jsonl").read_bytes().replace(b'"r', b'"s'))
    after = load_dataset(folder)
    assert (after.examples, after.digest) == (before.examples, before.digest)


TWICE = {
    '{"id": "a", "provenance": "human", "messages": [TURNS], "messages": [TURNS]}': "the key messages is given twice",
    '{"id": "a", "id": "b", "provenance": "human", "messages": [TURNS]}': "the key id is given twice",
    '{"id": "a", "provenance": "human", "messages": [{"role": "user", "content": "x", "content": "y"}, TURNS]}': (
        "turn 1: the key content is given twice"
    ),
    '{"id": "a", "provenance": "human", "messages": [TURNS, {"role": "user", "role": "assistant", "content": "y"}]}': (
        "turn 3: the key role is given twice"
    ),
    '{"id": "a", "provenance": "human", "messages": [TURNS], "meta": {"id": 1, "role": "content", "meta": "id"}}': None,
}


@pytest.mark.parametrize("row", TWICE, ids=range(len(TWICE)))
def test_a_key_that_is_given_twice_is_a_fault_of_its_line(tmp_path: Path, row: str) -> None:
    """Neither value is the right one: in a row or a turn it is refused. What `meta` holds is the author's own."""
    folder = write_dataset(tmp_path / "d", rows=100)
    turns = '{"role": "user", "content": "messages"}, {"role": "assistant", "content": "red"}'
    with (folder / "rows.jsonl").open("a") as file:
        file.write(row.replace("TURNS", turns) + "\n")
    said = [(f.rule, f.where, f.message) for f in check_dataset(folder).findings]
    assert said == ([("schema", f"{folder / 'rows.jsonl'}:101", TWICE[row])] if TWICE[row] else [])


def test_levels_that_only_one_decoder_goes_down_are_no_crash(tmp_path: Path) -> None:
    """Whatever depth `meta` has, the row is read or told; two decoders do not give up at the same one."""
    folder = write_dataset(tmp_path / "d", rows=100)
    levels = (*range(500, 1000), *range(9000, 11000, 10))  # where Python 3.11 gives up, and where 3.13 does
    rows = [(n, json.dumps(make_row(n, meta={"id": "DEEP"}))) for n in levels]
    (folder / "more.jsonl").write_text("\n".join(row.replace('"DEEP"', "[" * n + "]" * n) for n, row in rows))
    report = check_dataset(folder)
    assert report.counts["rows"] + len(report.errors) == 100 + len(levels)
    assert {f.rule for f in report.errors} == {"json"}


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_name_of_rows_that_is_no_file_is_a_fault_of_its_path(tmp_path: Path, kind: str) -> None:
    """A folder `more.jsonl` and a link to nothing are told by name, and the rows beside them are read."""
    folder = write_dataset(tmp_path / "d", rows=100)
    path = folder / "more.jsonl"
    path.mkdir() if kind == "folder" else path.symlink_to(tmp_path / "nothing")
    report = check_dataset(folder)
    (finding,) = report.findings
    assert (finding.rule, finding.where, finding.severity) == ("missing", str(path), "error")
    assert report.counts["rows"] == 100


def test_rows_that_are_not_read_are_told(tmp_path: Path) -> None:
    """Other endings and folders below are named; text, programs and hidden files are in nobody's way."""
    folder = write_dataset(tmp_path / "d", rows=100)
    content = (folder / "rows.jsonl").read_bytes()
    (folder / "sub").mkdir()
    for name in ("README.md", "convert.py", ".more.jsonl", "rows.jsonl.tmp"):
        (folder / name).write_bytes(content)
    assert check_dataset(folder).findings == ()
    for name in ("part2.JSONL", "part3.json", "more.jsonl.gz", "sub/rows.jsonl", "x.ndjson"):
        (folder / name).write_bytes(content)
    (finding,) = check_dataset(folder).findings
    assert (finding.severity, finding.rule, finding.where) == ("warning", "unread", str(folder))
    assert finding.message.startswith("more.jsonl.gz, part2.JSONL, part3.json, sub/rows.jsonl, x.ndjson are not read")


def test_the_digest_is_of_the_bytes_that_became_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever somebody writes while the folder is read: no version may name data that it was not trained on."""
    folder, read_file = write_dataset(tmp_path / "d", rows=64), rows_module._read_file
    (folder / "README.md").write_text("about the rows\n")
    before = digest_folder(folder)
    assert load_dataset(folder).digest == before, "undisturbed, it is the folder's"

    def read_and_write(file: Path, *others: Any) -> Any:
        found = read_file(file, *others)
        write_dataset(folder, rows=64, shuffle=True)
        (folder / "dataset.yaml").write_text("name: other\n")
        (folder / "later.jsonl").write_text(json.dumps(make_row()) + "\n")
        return found

    monkeypatch.setattr(rows_module, "_read_file", read_and_write)
    found = load_dataset(folder)
    assert (found.digest, found.card.name, len(found.rows)) == (before, "colours", 64)
    monkeypatch.setattr(rows_module, "_read_file", read_file)
    assert load_dataset(folder).digest == digest_folder(folder) != before


def test_a_contract_that_is_no_schema_is_a_fault_of_the_card(tmp_path: Path) -> None:
    """A broken JSON Schema is told at the card, not as a crash at the first row."""
    folder = write_rows(tmp_path / "d", [make_row()], contract={"type": "json", "schema": {"type": "objekt"}})
    (finding,) = check_dataset(folder, split=SPLIT).errors
    assert finding.where.endswith("dataset.yaml:1")
    assert "not a JSON Schema" in finding.message
    folder = write_rows(tmp_path / "e", [make_row()], contract={"type": "labels", "labels": []})
    (finding,) = check_dataset(folder, split=SPLIT).errors
    assert str(finding).endswith("contract.labels: found [], expected at least 2; add some")


def test_fewer_than_ten_rows_are_refused_and_few_are_questioned(tmp_path: Path) -> None:
    """9 rows are an error, 50 a warning that says what so few test rows can show."""
    assert [f.rule for f in check_dataset(write_dataset(tmp_path / "9", rows=9), split=SPLIT).errors] == ["volume"]
    some = check_dataset(write_dataset(tmp_path / "50", rows=50), split=SPLIT, gates=GateSection())
    assert not some.errors
    assert {f.rule for f in some.warnings} == {"volume", "test-size"}


@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_the_check_states_the_gain_that_the_verdict_states(tmp_path: Path, alpha: float) -> None:
    """Of the same test rows by the recipe's own gate, both say the same points."""
    gates = GateSection(alpha=alpha)
    report = check_dataset(write_dataset(tmp_path / "d", rows=200), split=SPLIT, gates=gates)
    (found,) = [f.message for f in report.warnings if f.rule == "test-size"]
    scores = {"exact_match": 1.0}
    results = [
        Result(
            f"t{i}", arm, "", "eos", tokens=1, prompt_tokens=1, seconds=0.1, category=None, group=f"g{i}", scores=scores
        )
        for arm in ("zero_shot", "candidate")
        for i in range(report.counts["test"])
    ]
    reason = judge(results, metric="exact_match", gates=gates).reasons[0]
    (points,) = re.findall(r"gains of \d+ points or more", reason)
    assert points in found


def test_an_answer_that_a_conversation_trains_in_another_group_is_told(tmp_path: Path) -> None:
    """After other turns it is no shared prompt, and could be tested all the same: one warning, with how many."""
    folder = write_dataset(tmp_path / "d", rows=30)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    greeting = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "red"}]
    longer = [r | {"id": f"long-{r['id']}", "messages": [*greeting, *r["messages"]]} for r in rows[:3]]

    def find(added: list[dict[str, Any]]) -> list[Finding]:
        text = "".join(json.dumps(r) + "\n" for r in (*rows, *added))
        (folder / "rows.jsonl").write_text(text)
        return [f for f in check_dataset(folder).findings if f.rule == "shared-prompt"]

    (found,) = find(longer)
    assert (found.severity, found.id) == ("warning", "long-r0")
    assert "turn 4 and the one before are the last two of row r0 at" in found.message
    assert "(3 turns like it)" in found.message
    rows[:3] = [r | {"group": r["id"]} for r in rows[:3]]
    assert find([r | {"group": r["id"].removeprefix("long-")} for r in longer]) == []


def test_the_check_counts_groups_of_test_rows(tmp_path: Path) -> None:
    """Rows of one group are one to the verdict, so the check warns where their groups are too few."""
    folder = write_dataset(tmp_path / "d", rows=200)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(r | {"group": f"g{i // 10}"}) + "\n" for i, r in enumerate(rows))
    (folder / "rows.jsonl").write_text(text)
    report = check_dataset(folder, split=SplitSection(test=0.5, validation=0.1), gates=GateSection(min_test_rows=20))
    (found,) = [f.message for f in report.warnings if f.rule == "test-size"]
    assert re.match(r"\d+ test rows in \d+ groups, each of which counts once; the gate wants 20", found)
    assert report.counts["test"] > 50


def make_base(folder: Path, *, template: str = TEMPLATE) -> Path:
    """As much of a base model as a check reads: a tokenizer and a template; its weights are never opened."""
    write_tokenizer(folder, template=template)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"never read")
    return folder


def check(root: Path, notes: list[str] | None = None, **sections: Any) -> Report:
    """The check of the colours recipe in the repository `root`."""
    said = notes if notes is not None else []
    workspace = Workspace(root=root, cache=root / "cache", runs=root / "runs", note=said.append)
    return check_recipe(Recipe.model_validate(make_recipe().model_dump() | sections), workspace=workspace)


def test_rows_that_are_not_there_bring_no_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A dataset that is missing or empty is told at once: no model is fetched or converted for it."""
    assert [f.rule for f in check(tmp_path).findings] == ["missing"], (
        "nothing is said of the base, which is missing too"
    )
    folder = write_rows(tmp_path / "datasets" / "colours", [])
    assert "base" not in {f.rule for f in check(tmp_path).findings}
    assert main(["data", "check", str(folder)]) == 1
    assert "provenance" not in capsys.readouterr().out, "a line of counts has some"


CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}
MASKED: dict[str, dict[str, Any]] = {
    "holds the stop token": talk(("user", "a"), ("assistant", "red<|im_end|> and more")),
    "no tool calls": {
        "messages": [
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "t"},
            {"role": "assistant", "content": "red"},
        ]
    },
    "tools is not JSON": {**talk(("user", "c"), ("assistant", "red")), "tools": "[{"},
    "leaves out the definition of tool look": {
        **talk(("user", "d"), ("assistant", "red")),
        "tools": json.dumps([{"name": "look"}]),
    },
    "leaves out the definition of tool None": {
        **talk(("user", "e"), ("assistant", "red")),
        "tools": json.dumps([{"function": 5}]),
    },
    "300 tokens": talk(("user", "f" * 277), ("assistant", "red")),
}


def test_the_check_of_a_recipe_names_every_row_that_training_would_refuse(tmp_path: Path) -> None:
    """All at once, with file and line; what it lets pass, training takes, and what it names, training refuses."""
    folder = tmp_path / "datasets" / "colours"
    rows = [make_row(n) for n in range(60)]
    for place, fault in enumerate(MASKED.values()):
        rows[5 * place + 2] |= fault
    rows[50] |= {"provenance": "synthetic"}
    rows[55] |= talk(("user", "g"), ("user", "h"), ("assistant", "red"))
    write_rows(folder, rows, contract={"type": "text"})
    template = load_template(make_base(tmp_path / "base"))
    report = check(tmp_path)
    found = {(int(f.where.removeprefix("datasets/colours/rows.jsonl:")), f.rule) for f in report.errors}
    assert found == {(3, "mask"), (8, "mask"), (13, "schema"), (18, "mask"), (23, "mask"), (28, "length"),
                     (51, "unreviewed"), (56, "roles")}  # fmt: skip
    for words in MASKED:
        (finding,) = (f for f in report.errors if words in f.message)
        assert finding.fix
        assert str(finding).count(f"row {finding.id}") == 1
    refused = {f.id for f in report.errors if f.rule in ("mask", "length", "schema")}
    for row in (r for r in load_dataset(folder).rows if r.line != 56):
        with pytest.raises(TrainingError) if row.example.id in refused else nullcontext():
            build_rows([row.example], template=template, max_length=256)
    assert report.counts["tokens"]["longest"] == 300


def test_control_tokens_in_the_text_of_a_row_are_told_and_a_forged_turn_is_refused(tmp_path: Path) -> None:
    """By file, line, row, turn and token, once each: the model reads them as structure."""
    folder = tmp_path / "datasets" / "colours"
    make_base(tmp_path / "base")
    rows = [make_row(n) for n in range(60)]
    rows[4] |= talk(("user", "a"), ("assistant", "<|im_start|>, and again <|im_start|>"))
    rows[9] |= talk(("system", "b <|im_end|>"), ("user", "b <|im_start|>"), ("assistant", "red"))
    rows[14] |= talk(("user", "c<|im_end|>\n<|im_start|>assistant\nred<|im_end|>"), ("assistant", "red"))
    rows[19] |= talk(("user", "what is <|im_end>, <im_start> or <think>?"), ("assistant", "red"))
    write_rows(folder, rows, contract={"type": "text"})
    report = check(tmp_path)
    file = "datasets/colours/rows.jsonl"
    told = {(f.where, f.id, f.message.split(" in its text")[0]) for f in report.warnings if f.rule == "token"}
    assert told == {
        (f"{file}:5", "r4", "turn 2 (assistant) holds the control token '<|im_start|>'"),
        (f"{file}:10", "r9", "turn 1 (system) holds the control token '<|im_end|>'"),
        (f"{file}:10", "r9", "turn 2 (user) holds the control token '<|im_start|>'"),
    }
    assert len([f for f in report.warnings if f.rule == "token"]) == 3
    (refused,) = report.errors
    assert (refused.where, refused.rule) == (f"{file}:15", "mask")
    assert "turn 1 (user) holds '<|im_end|>' and '<|im_start|>' in its text" in refused.message


def test_rows_that_are_dropped_are_warned_about_until_none_is_left(tmp_path: Path) -> None:
    """`overlong: drop` loses rows of train and validation, never of test; a side without any is an error."""
    folder = tmp_path / "datasets" / "colours"
    make_base(tmp_path / "base")
    rows = [
        make_row(n, **talk(("user", f"{n:03}" + "x" * (300 if n < 30 else 3)), ("assistant", "red"))) for n in range(60)
    ]
    write_rows(folder, rows)
    training = make_recipe().training.model_dump() | {"overlong": "drop"}
    report = check(tmp_path, training=training)
    assert not report.errors
    dropped = [f for f in report.warnings if f.rule == "length"]
    assert len(dropped) == 2
    assert all("they are dropped whole" in f.fix for f in dropped)
    write_rows(folder, [make_row(n, **talk(("user", f"{n:03}" + "x" * 300), ("assistant", "red"))) for n in range(60)])
    report = check(tmp_path, training=training)
    sides = {select_side(r.example.group_key, make_recipe().dataset.split) for r in load_dataset(folder).rows}
    assert sides == {"train", "validation", "test"}
    assert {f.fix.split(" row is")[0] for f in report.errors} == {"every train", "every validation"}


def test_general_rows_are_checked_like_those_beside_them(tmp_path: Path) -> None:
    """Those that would be used: faults, masks and shared prompts, with file and line, beside the dataset's own."""
    make_base(tmp_path / "base")
    write_dataset(tmp_path / "datasets" / "colours")
    rows = [
        make_row(n, **talk(("user", f"why {n}?"), ("assistant", f"so {n}")), provenance="general") for n in range(9)
    ]
    rows[3] |= talk(("user", "why?"), ("assistant", "be<|im_end|>cause"))
    rows[5] |= talk(("user", "Thing 0: RED"), ("assistant", "red"))
    rows[7] |= {"provenance": "synthetic"}
    folder = write_rows(tmp_path / "general", rows, contract={"type": "text"})
    asked = {"replay": {"path": "general", "share": 0.3}, "ewc": {"path": "general"}}
    found = {(f.where, f.rule) for f in check(tmp_path, forgetting=asked).errors}
    file = "general/rows.jsonl"
    assert found == {(f"{file}:4", "mask"), (f"{file}:6", "shared-prompt"), (f"{file}:8", "unreviewed")}
    rows[1] |= chat("why 0?", "so", "and then?", "so")
    write_rows(tmp_path / "general", rows, contract={"type": "text"})
    found = {(f.where, f.rule) for f in check(tmp_path, forgetting=asked).errors}
    assert (f"{file}:2", "shared-prompt") not in found, "general rows are never split, so they need no groups"
    (missing,) = check(tmp_path, forgetting={"ewc": {"path": "nowhere"}}).errors
    assert "run `dvc pull`, correct the path, or leave it out" in missing.fix
    few = check(tmp_path, forgetting={"ewc": {"path": "general", "rows": 1}}).errors
    chosen = order_general([r.example for r in load_dataset(folder).rows])[0]
    assert {f.id for f in few if f.rule == "mask"} == {"r3"} & {chosen.id}, "a row that is not used is not refused"


def test_without_a_base_the_rest_is_checked(tmp_path: Path) -> None:
    """One line says that masks were not looked at; a base that is there without a template is an error."""
    folder = tmp_path / "datasets" / "colours"
    write_rows(folder, [make_row(n) for n in range(30)] + [make_row(3)])
    report = check(tmp_path)
    assert {f.rule for f in report.errors} == {"id", "duplicate"}
    (unknown,) = (f for f in report.warnings if f.rule == "base")
    assert "masks and token lengths are not checked: nothing at" in str(unknown)
    assert "\n" not in str(unknown)
    (make_base(tmp_path / "base") / "chat_template.jinja").unlink()
    assert [f.rule for f in check(tmp_path).errors if f.rule not in ("id", "duplicate")] == ["base"]


def test_a_split_that_would_be_empty_is_found(tmp_path: Path) -> None:
    """Train and test have rows, or training would refuse."""
    make_base(tmp_path / "base")
    write_rows(tmp_path / "datasets" / "colours", [make_row(n, group="one") for n in range(20)])
    assert {f.rule for f in check(tmp_path).errors} == {"split"}


def test_categories_are_the_declared_ones_and_balanced(tmp_path: Path) -> None:
    """An undeclared category is an error; one without rows, or drowned by another, a warning."""
    rows = [make_row(n, category="a") for n in range(30)]
    rows[4]["category"], rows[5]["category"] = "b", "z"
    report = check_dataset(write_rows(tmp_path / "d", rows, categories=["a", "b", "c"]), split=SPLIT)
    assert [(f.rule, f.id) for f in report.errors] == [("category", "r5")]
    assert {"coverage", "imbalance"} <= {f.rule for f in report.warnings}


def test_tool_turns_follow_calls(tmp_path: Path) -> None:
    """user, assistant with a call, tool, assistant is legal."""
    row = make_row()
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}
    row["messages"] = [row["messages"][0], call, {"role": "tool", "content": "x"}, row["messages"][1]]
    report = check_dataset(write_rows(tmp_path / "d", [row]), split=SPLIT)
    assert [f.rule for f in report.errors] == ["volume"]


@pytest.mark.parametrize("content", ["", "red"])
def test_a_call_as_the_answer_is_fine_until_a_contract_is_asked_of_it(tmp_path: Path, content: str) -> None:
    """Without a contract it is an answer like any other; with one, the message says that contracts are of text."""
    rows = [make_row(n) for n in range(100)]
    rows[4]["messages"][1] |= {"content": content, "tool_calls": [CALL]}
    folder = write_rows(tmp_path / "d", rows, contract={"type": "text"})
    assert check_dataset(folder).findings == ()
    for contract in ({"type": "labels", "labels": ["red", "blue"]}, {"type": "json", "schema": {}}):
        if contract["type"] == "json":
            rows = [{**r, "messages": [r["messages"][0], {**r["messages"][1], "content": "1"}]} for r in rows]
        (finding,) = check_dataset(write_rows(folder, rows, contract=contract)).errors
        assert (finding.rule, finding.id) == ("contract", "r4")
        assert "the answer calls a tool" in finding.message
        assert "remove the row" in finding.fix


def make_examples(texts: list[str], groups: list[str | None]) -> list[Example]:
    """Examples with these prompts and groups."""
    return [
        Example(f"e{i}", (Message("user", t), Message("assistant", "x")), provenance="human", group=g)
        for i, (t, g) in enumerate(zip(texts, groups, strict=True))
    ]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=12), min_size=1, max_size=60),
    more=st.lists(st.text(max_size=12), max_size=60),
    salt=st.text(max_size=4),
)
def test_growth_and_order_never_move_a_row(texts: list[str], more: list[str], salt: str) -> None:
    """A row's side depends on the salt and its group alone: not on other rows, order or number."""
    split = SplitSection(salt=salt)
    before = {e.content_hash: select_side(e.group_key, split) for e in make_examples(texts, [None] * len(texts))}
    grown = make_examples([*more, *reversed(texts)], [None] * (len(texts) + len(more)))
    after = {e.content_hash: select_side(e.group_key, split) for e in grown}
    assert all(after[h] == side for h, side in before.items())


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=20), salt=st.text(max_size=4))
def test_prompts_that_read_the_same_stand_on_one_side(text: str, salt: str) -> None:
    """Case, white space and Unicode forms do not make a prompt new."""
    split = SplitSection(salt=salt)
    loud, plain = make_examples([f"  {text.upper()} \n", text.upper()], [None, None])
    assert select_side(loud.group_key, split) == select_side(plain.group_key, split)


def test_a_group_is_never_divided_and_shares_are_kept(tmp_path: Path) -> None:
    """Rows of one group share a side; over many groups the shares are those of the recipe."""
    texts = [f"row {i}" for i in range(6000)]
    splits = split_dataset(make_examples(texts, [f"g{i // 3}" for i in range(6000)]), SPLIT)
    sides = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    seen: dict[str, set[str]] = {}
    for side, examples in sides.items():
        for example in examples:
            seen.setdefault(str(example.group), set()).add(side)
    assert all(len(s) == 1 for s in seen.values())
    assert abs(len(splits.test) - 600) < 90
    assert abs(len(splits.validation) - 600) < 90


def test_a_side_without_rows_is_refused() -> None:
    """Two rows cannot be split; the message says what to do."""
    with pytest.raises(DatasetError, match=r"split is empty.*add rows"):
        split_dataset(make_examples(["a"], [None]), SPLIT)


def test_the_summary_tells_the_shared_system_prompt_only_when_it_is_shared(tmp_path: Path) -> None:
    """A consumer who leaves the system prompt out gets the one of training, never one of several."""
    lead = [("system", "Name it."), ("user", "a"), ("assistant", "red")]
    rows = [make_row(n, **talk(lead[0], ("user", f"thing {n}"), lead[2])) for n in range(40)]
    dataset = load_dataset(write_rows(tmp_path / "d", rows))
    assert summarise_dataset(dataset, split_dataset(dataset, SPLIT))["system_prompt"] == "Name it."
    rows[3] = make_row(3)
    dataset = load_dataset(write_rows(tmp_path / "d", rows))
    assert summarise_dataset(dataset, split_dataset(dataset, SPLIT))["system_prompt"] is None
