"""The output contract: what every answer of a task must look like.

The same contract judges the reference answers (data check) and the model's outputs (scorers), so
the two can never disagree. Free text has no contract to break.
"""

from __future__ import annotations

import json
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
        return schema

    @cached_property
    def _validator(self) -> Any:
        from jsonschema import Draft202012Validator

        return Draft202012Validator(self.json_schema)

    def find_faults(self, text: str) -> list[str]:
        """What is wrong with `text`, in words; empty when it keeps the contract."""
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as fault:
            return [f"not valid JSON: {fault}"]
        return [f"{_where(e.absolute_path)}: {e.message}" for e in self._validator.iter_errors(value)]


class LabelContract(BaseModel):
    """The answer is exactly one of a set of labels."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["labels"]
    labels: tuple[str, ...] = Field(min_length=2)

    def find_faults(self, text: str) -> list[str]:
        """What is wrong with `text`, in words; empty when it is one of the labels."""
        return [] if text in self.labels else [f"{text!r} is not one of {', '.join(self.labels)}"]


class TextContract(BaseModel):
    """The answer is free text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["text"] = "text"

    def find_faults(self, text: str) -> list[str]:
        """Free text has only one fault: being empty."""
        return [] if text.strip() else ["the answer is empty"]


Contract = Annotated[JsonContract | LabelContract | TextContract, Field(discriminator="type")]


def _where(path: Any) -> str:
    return "$" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)


def _refuse_constant(name: str) -> None:
    message = f"{name} is not JSON"
    raise ValueError(message)
