"""Laws of rows and contracts: identity is content, and one contract judges references and outputs alike."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from appliance.contract import Contract
from appliance.example import Example, Message, decode_examples, encode_examples, normalise_text

CONTRACT: TypeAdapter[Contract] = TypeAdapter(Contract)
TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30)


@given(TEXT, TEXT, st.sampled_from(["human", "program"]))
def test_rows_survive_a_round_trip(prompt: str, answer: str, provenance: str) -> None:
    """What is written is what is read, line breaks of every kind included."""
    row = Example("x", (Message("user", prompt), Message("assistant", answer)), provenance=provenance)  # type: ignore[arg-type]
    assert decode_examples(encode_examples((row, row))) == (row, row)


def test_the_content_hash_sees_what_is_said_and_nothing_else() -> None:
    """Id, category and provenance do not count; every character of a turn does."""
    messages = (Message("user", "a"), Message("assistant", "b"))
    row = Example("1", messages, provenance="human")
    assert row.content_hash == Example("2", messages, provenance="program", category="c", group="g").content_hash
    assert row.content_hash != Example("1", (messages[0], Message("assistant", "b ")), provenance="human").content_hash
    assert row.content_hash != Example("1", messages, provenance="human", tools="[]").content_hash


def test_normalisation_folds_case_width_and_space() -> None:
    """Prompts that a reader would call the same are the same."""
    assert normalise_text("  Straße \n\uff21 ") == normalise_text("STRASSE a")


@pytest.mark.parametrize(
    ("text", "keeps"),
    [
        ('{"n": 1}', True),
        ('{"n": 1, "m": 2}', False),
        ('{"n": "1"}', False),
        ('```json\n{"n": 1}\n```', False),
        ('{"n": NaN}', False),
        ('{"n": 1, "n": 2}', False),
        ('{"n": 1} and more', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_the_json_contract_is_strict(text: str, *, keeps: bool) -> None:
    """Fences, extra keys, wrong types and NaN break a program that reads the answer, so they break the contract."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
    contract = CONTRACT.validate_python({"type": "json", "schema": schema})
    assert (contract.find_faults(text) == []) is keeps


LOST: list[dict[str, object]] = [
    {"properties": {"a": {"$ref": "#/definitions/Item"}}, "$defs": {"Item": {"type": "integer"}}},
    {"properties": {"a": {"$ref": "#Item"}}},
    {"properties": {"a": {"$ref": "https://example.invalid/schema.json"}}},
    {"properties": {"a": {"$ref": "http://[/"}}},
    {"properties": {"a": {"$dynamicRef": "#/nowhere"}}},
    {"allOf": [{"items": {"$ref": "#/allOf/one"}}]},
    {"properties": {"a": {"$ref": "#/title/one"}}, "title": "text"},
    {"properties": {"a": {"$ref": "#/required"}}, "required": ["a"]},
    {"properties": {"a": {"$ref": "#/words"}}, "words": {"type": "objekt"}},
    {"properties": {"a": {"$ref": "#/words"}}, "words": {"properties": {"b": {"$ref": "#/lost"}}}},
    {"$schema": "https://example.invalid/dialect", "properties": {"a": {"$ref": "#Item"}}},
]


@pytest.mark.parametrize("schema", LOST, ids=range(len(LOST)))
def test_a_reference_that_leads_nowhere_is_a_fault_of_the_schema(schema: dict[str, object]) -> None:
    """Before any answer is judged, by the place of the reference; nothing is fetched."""
    with pytest.raises(ValidationError, match=r"not a JSON Schema: \$\.(properties\.a|allOf|words)"):
        CONTRACT.validate_python({"type": "json", "schema": schema})


def test_references_inside_the_schema_are_followed() -> None:
    """By pointer, anchor, id and recursion, also outside of $defs; one that is a property or a value is none."""
    schema = {
        "$id": "https://example.org/ticket",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "properties": {
            "a": {"$ref": "#/$defs/number"},
            "b": {"$ref": "#text"},
            "c": {"$ref": "more#/own"},
            "d": {"$ref": "#"},
            "e": {"$ref": "#/words/x~1y"},
            "$ref": {"type": "string"},
            "f": {"const": {"$ref": "#/nowhere"}},
            "g": {"$ref": "https://json-schema.org/draft/2020-12/schema"},
        },
        "$defs": {
            "number": {"type": "integer"},
            "text": {"$anchor": "text", "type": "string"},
            "more": {"$id": "more", "own": {"type": "null"}},
        },
        "words": {"x/y": {"$ref": "#/$defs/number"}},
    }
    contract = CONTRACT.validate_python({"type": "json", "schema": schema})
    keeps = {"a": 1, "b": "x", "c": None, "d": {"a": 2}, "e": 3, "$ref": "x", "f": {"$ref": "#/nowhere"}, "g": {}}
    assert contract.find_faults(json.dumps(keeps)) == []
    for name, wrong in {"a": "x", "b": 1, "c": 1, "d": {"a": "x"}, "e": "x", "$ref": 1, "f": {}, "g": 1}.items():
        assert contract.find_faults(json.dumps(keeps | {name: wrong})), name


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"properties": {"a": {"multipleOf": 0.01}}}, '{"a": 1' + "0" * 319 + "1}"),
        ({"properties": {"a": {"multipleOf": 0.01}}}, '{"a": 1e999}'),
        ({"anyOf": [{"type": "object"}, {"type": "array", "items": {"$ref": "#"}}]}, "[" * 400 + "]" * 400),
    ],
)
def test_a_value_beyond_the_schemas_arithmetic_breaks_the_contract(schema: dict[str, object], text: str) -> None:
    """A number beyond all numbers and levels without end are faults of the answer, never a crash."""
    contract = CONTRACT.validate_python({"type": "json", "schema": schema})
    assert contract.find_faults(text)


def test_labels_and_text() -> None:
    """A label is exactly one of the set; text is anything but nothing."""
    labels = CONTRACT.validate_python({"type": "labels", "labels": ["a", "b"]})
    assert labels.find_faults("a") == []
    assert labels.find_faults("A")
    text = CONTRACT.validate_python({"type": "text"})
    assert text.find_faults("x") == []
    assert text.find_faults(" \n")


def test_a_contract_without_sense_is_refused() -> None:
    """Unknown kinds, one label, a broken schema."""
    for bad in ({"type": "xml"}, {"type": "labels", "labels": ["a"]}, {"type": "json", "schema": {"type": "objekt"}}):
        with pytest.raises(ValidationError):
            CONTRACT.validate_python(bad)
