"""Laws of the demo's dataset: written by a program, verified by its own contract, the same everywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from appliance.contract import JsonContract
from appliance.data import check_dataset, digest_dvc_folder, load_pointer
from appliance.demo import DEMO_ROWS, GROWTH_ROWS, write_dataset
from appliance.demo.repository import read_recipe
from appliance.demo.requests import BASE_PROMPT, CANONICAL, SCHEMA, build_requests
from appliance.recipe import GateSection, SplitSection, parse_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset as the demo writes it."""
    folder = tmp_path_factory.mktemp("data") / "datasets" / "workplace-requests"
    write_dataset(folder)
    return folder


def test_the_repository_points_to_exactly_these_bytes(folder: Path) -> None:
    """`datasets.dvc` is the real pointer of the rows that the program writes."""
    pointer = load_pointer(ROOT / "datasets.dvc")
    assert digest_dvc_folder(folder.parent) == pointer.md5
    assert sum(p.stat().st_size for p in folder.iterdir()) == pointer.size


def test_the_check_finds_nothing(folder: Path) -> None:
    """Every row keeps its contract, no prompt is repeated, no category is thin, the test set is large enough."""
    report = check_dataset(folder, split=SplitSection(), gates=GateSection())
    assert report.findings == ()
    assert report.counts["rows"] == DEMO_ROWS
    assert report.counts["provenance"] == {"program": DEMO_ROWS}


def test_growth_keeps_the_first_rows() -> None:
    """A longer dataset begins with the rows of the shorter one."""
    assert build_requests(DEMO_ROWS + GROWTH_ROWS)[:DEMO_ROWS] == build_requests(DEMO_ROWS)


def test_rows_are_varied(folder: Path) -> None:
    """Hundreds of ways to ask: every item, every priority, edge cases, few repeated words at the start."""
    rows = build_requests(DEMO_ROWS)
    tickets = [json.loads(r.answer) for r in rows]
    assert set(CANONICAL) == {t["item"] for t in tickets}
    assert {t["quantity"] for t in tickets} >= set(range(1, 7))
    assert 0.2 < sum(bool(r.meta.get("edge")) for r in rows) / len(rows) < 0.4
    assert len({r.normalised_prompt for r in rows}) == DEMO_ROWS
    starts = Counter(" ".join(r.request.lower().split()[:4]) for r in rows)
    assert len(starts) > 300
    assert max(starts.values()) < 80


def test_the_answer_follows_from_the_request() -> None:
    """A room in the ticket is in the request, digit for digit; a number above one is said."""
    for row in build_requests(DEMO_ROWS):
        location = json.loads(row.answer)["location"]
        assert location is None or location.split("-")[1] in row.request


def test_the_best_prompt_names_everything_that_the_schema_wants() -> None:
    """The base model is not beaten by a prompt that keeps the rules from it."""
    assert all(item in BASE_PROMPT for item in CANONICAL)
    assert all(key in BASE_PROMPT for key in SCHEMA["properties"])
    for text in (read_recipe(quick=False), read_recipe(quick=True)):
        assert parse_recipe(text, source="demo").evaluation.system_prompt == BASE_PROMPT


def test_the_contract_in_the_card_is_the_schema(folder: Path) -> None:
    """`dataset.yaml` carries the schema that the rows were written for, without YAML anchors."""
    text = (folder / "dataset.yaml").read_text()
    assert "&id" not in text
    assert JsonContract.model_validate(yaml.safe_load(text)["contract"]).json_schema == SCHEMA
