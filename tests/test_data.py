"""Laws of the data room: every fault has its place, and growth never moves a row between sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_dataset

from appliance.data import check_dataset, load_dataset, select_side, split_dataset, summarise_dataset
from appliance.errors import DatasetError
from appliance.example import Example, Message
from appliance.recipe import SplitSection

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
    ("contradiction", talk(("user", "RED  thing 0"), ("assistant", "blue"))),
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


def test_a_good_dataset_has_no_errors(tmp_path: Path) -> None:
    """The check does not cry wolf."""
    report = check_dataset(write_dataset(tmp_path / "d", rows=200), split=SPLIT, gates_min_test_rows=10)
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
    with pytest.raises(DatasetError, match=r"dataset\.yaml"):
        load_dataset(folder)


def test_a_contract_that_is_no_schema_is_a_fault_of_the_card(tmp_path: Path) -> None:
    """A broken JSON Schema is told at the card, not as a crash at the first row."""
    folder = write_rows(tmp_path / "d", [make_row()], contract={"type": "json", "schema": {"type": "objekt"}})
    (finding,) = check_dataset(folder, split=SPLIT).errors
    assert finding.where.endswith("dataset.yaml")
    assert "not a JSON Schema" in finding.message


def test_fewer_than_ten_rows_are_refused_and_few_are_questioned(tmp_path: Path) -> None:
    """9 rows are an error, 50 a warning that says what so few test rows can show."""
    assert [f.rule for f in check_dataset(write_dataset(tmp_path / "9", rows=9), split=SPLIT).errors] == ["volume"]
    some = check_dataset(write_dataset(tmp_path / "50", rows=50), split=SPLIT)
    assert not some.errors
    assert {f.rule for f in some.warnings} == {"volume", "test-size"}


def test_rows_that_are_too_long_are_named(tmp_path: Path) -> None:
    """With a token counter, each row above the limit is an error with its length."""
    folder = write_dataset(tmp_path / "d", rows=20)
    report = check_dataset(folder, split=SPLIT, max_length=4, count_tokens=lambda e: 5 if e.id == "r3" else 4)
    assert [f.id for f in report.errors] == ["r3"]
    assert "5 tokens" in report.errors[0].message
    assert report.counts["tokens"]["longest"] == 5


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
