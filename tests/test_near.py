"""Laws of near copies: what remembering answers is found, told before training, and counts in no verdict."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_verdict import make_results
from tiny import make_recipe, write_base, write_dataset

from appliance.cli import main
from appliance.data import check_dataset, find_near_copies, near, select_side
from appliance.errors import EvaluationError
from appliance.evaluation import judge
from appliance.example import Example, Message
from appliance.pipeline import run_recipe
from appliance.preparation import Origin, Workspace
from appliance.recipe import GateSection, SplitSection

SPLIT, GATES = SplitSection(), GateSection()


def ask(text: str, answer: str = "red", *, group: str | None = None) -> Example:
    """A row that asks this."""
    return Example(
        id=text, messages=(Message("user", text), Message("assistant", answer)), provenance="human", group=group
    )


def ask_at_random(count: int, *, seed: int, begin: str = "") -> list[Example]:
    """Rows of random letters, none of which is like another but for how they begin."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz "
    return [ask(begin + "".join(rng.choices(letters, k=40))) for _ in range(count)]


OTHERS = ask_at_random(40, seed=1)
REQUEST = "Please send somebody, the printer on the second floor prints nothing but black pages since this morning."


@pytest.mark.parametrize(
    ("text", "is_copy"),
    [
        (REQUEST.upper().replace(" ", "  "), True),
        (REQUEST.replace("Please send", "Kindly send"), True),
        (REQUEST + " Thanks!", True),
        (REQUEST.replace("printer", "copier"), True),
        (REQUEST[:50], False),
        ("The screen in my room stays dark, please send somebody to look at it before noon.", False),
    ],
)
def test_a_row_that_is_hardly_changed_is_a_near_copy(text: str, is_copy: bool) -> None:
    """Case, white space, a word more or another one do not make a request new; half of it, or another wish, is."""
    found = find_near_copies([*OTHERS[:3], ask(text)], [*OTHERS[3:], ask(REQUEST)])
    assert found == ({3: 37} if is_copy else {})


def test_another_answer_is_no_copy() -> None:
    """Who remembers the trained row's answer gets such a row wrong, so it tests something."""
    assert find_near_copies([ask(REQUEST + " Thanks!", "blue")], [*OTHERS, ask(REQUEST, "red")]) == {}
    assert find_near_copies([ask(REQUEST + " Thanks!", "RED ")], [*OTHERS, ask(REQUEST, "red")]) == {0: 40}


@pytest.mark.parametrize("count", [60, 900])
def test_an_instruction_that_every_request_begins_with_makes_no_copies(count: int) -> None:
    """Long as it is, what follows it tells the rows apart; a copy among them is found all the same."""
    begin = "Name the colour of the thing that is described below, in one word and without a full stop. The thing: " * 2
    rows = ask_at_random(count, seed=2, begin=begin)
    assert find_near_copies(rows[:10], rows[10:]) == {}
    copied = ask(rows[30].messages[0].content + "!")
    assert find_near_copies([*rows[:10], copied], rows[10:]) == {10: 20}


def test_the_copy_that_is_told_is_the_first_in_the_rows_order() -> None:
    """Of several; what comes after it is not looked at."""
    near, nearer = ask(REQUEST + " Thanks a lot."), ask(REQUEST + " ok")
    for trained in ([*OTHERS, near, nearer], [*OTHERS, nearer, near]):
        assert find_near_copies([ask(REQUEST)], trained) == {0: 40}


@pytest.mark.parametrize(("number", "copied"), [("{0:03}", True), ("{0:03} {1:05}", False)])
def test_forms_with_many_rows_are_compared_in_bounded_time(
    monkeypatch: pytest.MonkeyPatch, number: str, copied: bool
) -> None:
    """Rows that differ in numbers alone, whether they are copies or not quite: no test row is compared with all."""
    monkeypatch.setattr(near, "_TRIES", 20)
    compared: list[int] = []
    compare = near._compare
    monkeypatch.setattr(near, "_compare", lambda *sets: compared.append(1) or compare(*sets))
    forms = [e.messages[0].content for e in ask_at_random(20, seed=4)]
    rows = [ask(f"{form} {number.format(n, 7919 * n % 99991)}") for form in forms for n in range(150)]
    assert bool(find_near_copies(rows[::5], [r for n, r in enumerate(rows) if n % 5])) == copied
    assert len(compared) <= near._TRIES * len(rows[::5])


def measure_exactly(test: Sequence[Example], trained: Sequence[Example]) -> set[int]:
    """The same by comparing every pair, of texts that have no common form."""

    def cut(text: str) -> set[str]:
        return {text[i : i + 4] for i in range(max(1, len(text) - 3))}

    sets = [cut(e.normalised_prompt) for e in trained]
    return {
        place
        for place, e in enumerate(test)
        if any(len(g & cut(e.normalised_prompt)) >= 0.8 * len(g | cut(e.normalised_prompt)) for g in sets)
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 39), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_every_pair_that_is_similar_enough_is_found(places: list[int], rng: random.Random) -> None:
    """The sketch loses none: as many as by comparing each with each, where up to eight letters of a row are changed."""
    changed = []
    for place in places:
        text = list(OTHERS[place].messages[0].content)
        for at in rng.sample(range(len(text)), k=rng.randrange(9)):
            text[at] = "#"
        changed.append(ask("".join(text)))
    assert set(find_near_copies(changed, OTHERS)) == measure_exactly(changed, OTHERS)


def write_copies(folder: Path, *, copied: int, count: int = 300, **more: Any) -> tuple[Path, list[str]]:
    """A dataset of `count` rows and so many test rows that are training rows with a full stop; the ids of these."""
    write_dataset(folder, rows=1)
    rows = ask_at_random(count, seed=3)
    trained = [e for e in rows if select_side(e.group_key, SPLIT) == "train"]
    copies: list[Example] = []
    for e in trained:
        text = e.messages[0].content + "."
        if len(copies) < copied and select_side(ask(text).group_key, SPLIT) == "test":
            copies.append(ask(text))
    assert len(copies) == copied
    lines = [
        json.dumps(
            {
                "id": f"r{n}",
                "provenance": "human",
                "messages": [{"role": m.role, "content": m.content} for m in e.messages],
                **more,
            }
        )
        for n, e in enumerate([*rows, *copies])
    ]
    (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return folder, [f"r{n}" for n in range(count, count + copied)]


def test_the_check_names_each_near_copy_and_counts_the_other_test_rows(tmp_path: Path) -> None:
    """With the training row that it copies; what the rest can show is said of the rest."""
    folder, copies = write_copies(tmp_path / "d", copied=9)
    report = check_dataset(folder, split=SPLIT, gates=GATES)
    found = [f for f in report.findings if f.rule == "near-copy"]
    assert [f.id for f in found] == copies
    assert all(f.severity == "warning" and f"{folder}/rows.jsonl:" in f.message for f in found)
    (few,) = [f.message for f in report.findings if f.rule == "test-size"]
    assert few.startswith(f"{report.counts['test'] - 9} test rows, 9 near copies not counted; ")
    assert check_dataset(folder).findings == ()  # sides are a recipe's


def test_near_copies_in_one_group_are_no_finding(tmp_path: Path) -> None:
    """One group is on one side."""
    folder, _ = write_copies(tmp_path / "d", copied=9, group="one")
    assert not [f for f in check_dataset(folder, split=SPLIT, gates=GATES).findings if f.rule == "near-copy"]


def test_a_test_of_near_copies_alone_is_refused(tmp_path: Path) -> None:
    """Before a GPU is asked for: a row that is new makes it a warning."""
    folder, _ = write_copies(tmp_path / "d", copied=9)
    file = folder / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    sides = [select_side(ask(r["messages"][0]["content"]).group_key, SPLIT) for r in rows]
    new = [r for r, side in zip(rows[:300], sides, strict=False) if side == "test"]
    for kept, severities in (([], {"warning", "error"}), (new[:1], {"warning"})):
        left = [r for r in rows if r not in new or r in kept]
        file.write_text("".join(json.dumps(r) + "\n" for r in left), "utf-8")
        found = [f for f in check_dataset(folder, split=SPLIT, gates=GATES).findings if f.rule == "near-copy"]
        assert {f.severity for f in found} == severities


def test_a_gain_on_near_copies_alone_ships_nothing() -> None:
    """60 rows that were remembered and 120 without any gain: shipped by all, held back by those that count."""
    results = make_results({"zero_shot": [0.0] * 180, "candidate": [1.0] * 60 + [0.0] * 120})
    assert judge(results, metric="exact_match", gates=GATES).outcome == "ship"
    verdict = judge(results, metric="exact_match", gates=GATES, copies={f"t{i}" for i in range(60)})
    assert verdict.outcome != "ship"
    assert (verdict.n, verdict.copies) == (120, 60)
    assert verdict.arms["candidate"]["n"] == sum(s["candidate"]["n"] for s in verdict.slices.values()) == 120
    assert "60 of 180 test rows are not counted" in verdict.reasons[-1]


def test_too_few_rows_beside_near_copies_are_inconclusive() -> None:
    """The gate's rows are those that count."""
    results = make_results({"zero_shot": [0.0] * 110, "candidate": [1.0] * 110})
    assert judge(results, metric="exact_match", gates=GATES, copies={"t1"}).outcome == "ship"
    assert (
        judge(results, metric="exact_match", gates=GATES, copies={f"t{i}" for i in range(11)}).outcome == "inconclusive"
    )


def test_near_copies_alone_are_an_error_never_a_verdict() -> None:
    """There is nothing to judge by."""
    results = make_results({"zero_shot": [0.0], "candidate": [1.0]})
    with pytest.raises(EvaluationError, match="none is left to judge by"):
        judge(results, metric="exact_match", gates=GATES, copies={"t0"})


def test_a_run_judges_without_near_copies_and_its_card_says_so(tmp_path: Path) -> None:
    """Every arm answers them, and no score has them."""
    write_copies(tmp_path / "datasets" / "colours", copied=4, count=80)
    write_base(tmp_path / "base")
    notes: list[str] = []
    workspace = Workspace(tmp_path, tmp_path / "cache", tmp_path / "runs", note=notes.append)
    origin, recipe = Origin(None, "2026-01-31T12:00:00Z", "tester"), make_recipe(training={"epochs": 1})
    done = run_recipe(recipe, workspace=workspace, store=None, origin=origin, until="evaluate")
    assert len([n for n in notes if "[near-copy]" in n]) == 4
    assert done.folder is not None
    card = json.loads((done.folder / "card" / "card.json").read_bytes())
    assert (card["verdict"]["n"], card["verdict"]["copies"]) == (card["data"]["test"] - 4, 4)
    page = (done.folder / "card" / "card.md").read_text("utf-8")
    assert f"## {card['data']['test'] - 4} held-out test rows, without 4 near copies of training rows" in page
    assert any("4 of" in r and "not counted" in r for r in done.reasons)


def test_the_command_tells_near_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`data check --recipe` names row, place, training row and what to do, and passes."""
    write_copies(tmp_path / "d", copied=3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: a\nbase: {model: ./none}\ndataset: {path: d}\nmethod: {type: lora}\n")
    assert main(["data", "check", "--recipe", str(recipe), "--root", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "[near-copy] row r300: asks nearly what training row r" in said.out + said.err
    assert "give both rows the same group" in said.out + said.err
