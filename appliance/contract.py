"""The output contract: what every answer of a task must look like.

The same contract judges the reference answers (data check) and the model's outputs (scorers), so
the two can never disagree. Free text has no contract to break. Composed characters (NFC) and those
they are made of are the same text: a tokenizer may make the one of the other.
"""

from __future__ import annotations

import json
import unicodedata
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class JsonContract(BaseModel):
    """The answer is one JSON value that satisfies a JSON Schema (draft 2020-12)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["json"]
    json_schema: dict[str, Any] = Field(alias="schema")

    @field_validator("json_schema")
    @classmethod
    def _check_schema(cls, schema: dict[str, Any]) -> dict[str, Any]:
        from jsonschema import Draft202012Validator, SchemaError

        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as fault:
            message = f"not a JSON Schema: {_where(fault.absolute_path)}: {fault.message}"
            raise ValueError(message) from fault
        _check_references(schema)
        return schema

    @cached_property
    def _validator(self) -> Any:
        from jsonschema import Draft202012Validator
        from jsonschema_specifications import REGISTRY

        return Draft202012Validator(compose(self.json_schema), registry=REGISTRY)  # which fetches nothing

    def find_faults(self, text: str) -> list[str]:
        """What is wrong with `text`, in words; empty when it keeps the contract."""
        try:
            value = parse_json(text)
        except ValueError as fault:
            return [f"not valid JSON: {fault}"]
        try:
            return [f"{_where(e.absolute_path)}: {e.message}" for e in self._validator.iter_errors(value)]
        except (ArithmeticError, RecursionError) as fault:  # 1e999 as a multiple of 0.01, lists in lists
            return [f"$: too large or too deep for the schema: {fault}"]


class LabelContract(BaseModel):
    """The answer is exactly one of a set of labels."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["labels"]
    labels: tuple[str, ...] = Field(min_length=2)

    def find_faults(self, text: str) -> list[str]:
        """What is wrong with `text`, in words; empty when it is one of the labels."""
        return [] if compose(text) in compose(self.labels) else [f"{text!r} is not one of {', '.join(self.labels)}"]


class TextContract(BaseModel):
    """The answer is free text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["text"] = "text"

    def find_faults(self, text: str) -> list[str]:
        """Free text has only one fault: being empty."""
        return [] if text.strip() else ["the answer is empty"]


Contract = Annotated[JsonContract | LabelContract | TextContract, Field(discriminator="type")]


def _check_references(schema: dict[str, Any]) -> None:
    """Every reference leads to a schema inside this one. Raises `ValueError` naming the first that does not."""
    from jsonschema_specifications import REGISTRY
    from referencing.jsonschema import DRAFT202012

    root = DRAFT202012.create_resource(schema)
    waiting = [(root, REGISTRY.resolver_with_root(root))]
    seen: set[int] = set()
    while waiting:
        resource, resolver = waiting.pop()
        part = resource.contents
        if not isinstance(part, dict) or id(part) in seen:
            continue
        seen.add(id(part))
        for key in ("$ref", "$dynamicRef"):
            if key in part:
                found = _follow(part[key], resolver, place=f"{_where(_locate(schema, part) or ())}.{key}")
                waiting.append((DRAFT202012.create_resource(found.contents), found.resolver))
        waiting += [(inner, resolver.in_subresource(inner)) for inner in resource.subresources()]


def _follow(reference: str, resolver: Any, *, place: str) -> Any:
    """What a reference leads to. Raises `ValueError` where that is no schema, or elsewhere: nothing is fetched."""
    from jsonschema import Draft202012Validator, SchemaError
    from referencing.exceptions import Unresolvable

    try:
        found = resolver.lookup(reference)
        Draft202012Validator.check_schema(found.contents)
    except (Unresolvable, SchemaError, ValueError, TypeError) as fault:  # the last two for pointers into values
        message = f"not a JSON Schema: {place}: {reference!r} leads to no schema inside this one"
        raise ValueError(message) from fault
    return found


def _locate(value: Any, part: Any) -> tuple[Any, ...] | None:
    """The keys from `value` down to the very `part`."""
    if value is part:
        return ()
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next(((key, *path) for key, v in inner if (path := _locate(v, part)) is not None), None)


def _where(path: Any) -> str:
    return "$" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)


def _refuse_constant(name: str) -> None:
    message = f"{name} is not JSON"
    raise ValueError(message)


def parse_json(text: str) -> Any:
    """The value of strict JSON: no NaN, no key twice; its texts in composed characters. Raises `ValueError`."""
    try:
        return compose(json.loads(text, object_pairs_hook=_refuse_repeats, parse_constant=_refuse_constant))
    except RecursionError as fault:
        message = "too many brackets within brackets"
        raise ValueError(message) from fault


def compose(value: Any) -> Any:
    """The value with every text of it in composed characters (NFC)."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, dict):
        return {compose(k): compose(v) for k, v in value.items()}
    return [compose(v) for v in value] if isinstance(value, list | tuple) else value


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, held in pairs:
        if compose(key) in value:
            message = f"the key {key!r} is given twice"
            raise ValueError(message)
        value[compose(key)] = held
    return value
