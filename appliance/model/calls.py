"""Tools and the calls of them, in the one shape that chat templates are given."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from appliance.errors import TrainingError

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template wants tool calls: arguments as an object or as JSON text, no content as "" or none."""

    arguments: Literal["object", "text"]
    empty: Literal["text", "none"]


CALL_FORMS = tuple(CallForm(a, e) for a in ("object", "text") for e in ("text", "none"))


def holds_call(text: str, call: Any) -> bool:
    """Whether a rendering says a tool call: its name, and its arguments as one JSON text or value by value."""
    name, arguments = _read_call(call)
    if name not in text:
        return False
    squeezed, wanted = _SPACE.sub("", text), _SPACE.sub("", json.dumps(arguments, ensure_ascii=False))
    if wanted in squeezed:
        return True
    mangled = (_SPACE.sub("", repr(arguments)), json.dumps(wanted, ensure_ascii=False)[1:-1])
    return not any(m in squeezed for m in mangled) and all(leaf in text for leaf in _list_leaves(arguments))


def _list_leaves(value: Any) -> list[str]:
    """Keys and scalars of a JSON value as a template would write them one by one."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in (str(k), *_list_leaves(v))]
    if isinstance(value, list):
        return [leaf for v in value for leaf in _list_leaves(v)]
    return [value if isinstance(value, str) else json.dumps(value)]


def read_tools(tools: str | None) -> list[Any] | None:
    """The definitions as templates expect them, `None` without any. Raises `TrainingError` for another form."""
    try:
        value = json.loads(tools) if tools else None
    except (ValueError, RecursionError) as fault:
        raise TrainingError(f"tools is not JSON ({fault}); write a JSON list of tool definitions") from fault
    if value is not None and not (isinstance(value, list) and all(isinstance(v, dict) for v in value)):
        raise TrainingError(f"tools is {tools[:60] if tools else ''!r}; expected a JSON list of tool definitions")
    return [v if "function" in v else {"type": "function", "function": v} for v in value] if value else None


def build_call(call: Any, *, form: CallForm, number: int) -> dict[str, Any]:
    """One call in OpenAI's shape; an id of nine characters where the row has none (Mistral wants nine)."""
    name, arguments = _read_call(call)
    if form.arguments == "text" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    given = call.get("id")
    return {
        "id": given if isinstance(given, str) else f"call{number:05d}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _read_call(call: Any) -> tuple[str, Any]:
    """Name and arguments; arguments given as JSON text are read, so that no template encodes them twice."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise TrainingError(
            f"tool call {json.dumps(call)[:60]}: no name; expected "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
        )
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return name, arguments
    return name, arguments
