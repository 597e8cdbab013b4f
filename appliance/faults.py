"""What is wrong with a recipe or a dataset's card, in words: place, key, found, expected, what to do.

The words are this project's, never the library's, so that who mends the file need not know pydantic.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from appliance.contract import Contract
from appliance.method import Method

Lines = dict[tuple[str | int, ...], int]
NAME, ALIAS = r"^[a-z0-9][a-z0-9-]{0,62}$", r"^[a-z][a-z0-9-]{0,31}$"
_CHOICE = re.compile(r"'[^']*'")
_FORMS = {
    NAME: "lower-case letters, digits and '-', at most 63, such as my-model-1",
    ALIAS: "a letter, then lower-case letters, digits and '-', at most 32, such as staging",
}
_KINDS = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
}
_HELD = {type(None): "nothing", list: "a list", str: "text"}
_SHORT = {"lr": "learning_rate"}  # what others call a key, where no letter tells
_LISTED, _SHOWN = 8, 120
_NO_RECIPES = ("prices.yaml", "dataset.yaml")
_TYPES = ("bool", "str", "int", "float")  # members of a union, in pydantic's locations
Model = type[BaseModel]


def _list_forms(union: Any) -> dict[str, Model]:
    return {get_args(m.model_fields["type"].annotation)[0]: m for m in get_args(get_args(union)[0])}


_FORMS_OF: dict[Any, dict[str, Model]] = {"method": _list_forms(Method), "contract": _list_forms(Contract)}


def describe_fault(error: Any, *, model: Model, lines: Lines, source: str) -> str:
    """One pydantic error as `file:line: key: what; next action`; the file has the fields of `model`."""
    path = _strip_form(error["loc"], lines) or _read_path(error["msg"], lines)
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), 1)
    where, key = f"{source}:{line}", join_path(path)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key {key}{_did_you_mean(error['loc'], model)}"
    if error["type"] == "missing":
        return f"{where}: key {key} is missing; add it"
    if error["type"] == "union_tag_not_found":
        return f"{where}: key {key}.type is missing; use one of {', '.join(_FORMS_OF[key])}"
    if error["type"] == "union_tag_invalid":
        line, tag = lines.get((*path, "type"), line), error["ctx"]["tag"]
        return f"{source}:{line}: {key}.type: found {tag!r}, which is no {key}; {_hint_form(tag, _FORMS_OF[key])}"
    key = key or "the file"
    if error["type"] == "value_error":
        has_value = not isinstance(error["input"], dict | BaseModel | None)
        found = f"found {_quote(error['input'])}: " if has_value else ""
        text = error["msg"].removeprefix("Value error, ").removeprefix(f"{key}: ")
        return f"{where}: {key}: {found}{text}"
    found = "nothing" if error["input"] is None else _quote(error["input"])
    return f"{where}: {key}: found {found}, expected {_describe_expected(error, model)}"


def _quote(value: Any) -> str:
    """A value as Python writes it, its middle left out where it is long."""
    found = repr(value)
    return found if len(found) <= _SHOWN else f"{found[: _SHOWN - 20]}…{found[-19:]}"


def name_kind(value: Any) -> str:
    """What a file holds in place of keys, in words."""
    return _HELD.get(type(value), "a single value")


def _hint_form(tag: str, forms: Mapping[str, Model]) -> str:
    for name, form in forms.items():
        variant = form.model_fields.get("variant")
        if variant is not None and tag in get_args(variant.annotation):
            return f"it is a variant: write type: {name} and variant: {tag}"
    close = difflib.get_close_matches(tag, forms, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(forms)}"


def _describe_expected(error: Any, model: Model) -> str:
    """What a value must be, and what to do: a choice that is close, or the default where there is one."""
    kind, asked = error["type"], error["msg"].removeprefix("Input should be ")
    if kind == "string_pattern_mismatch":
        return _FORMS.get(error["ctx"]["pattern"], f"the form {error['ctx']['pattern']}")
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"keys below it, such as {_list_keys(_find_model((*error['loc'], ''), model))[0]}"
    if kind == "string_type" and not isinstance(error["input"], dict | list):
        return "text; put it in quotes"
    if kind in ("too_short", "string_too_short"):
        return f"at least {error['ctx']['min_length']}; add some" if kind == "too_short" else "text; write some"
    field = _find_model(error["loc"], model).model_fields.get(error["loc"][-1])
    if kind == "literal_error":
        close = difflib.get_close_matches(str(error["input"]), [c.strip("'") for c in _CHOICE.findall(asked)], n=1)
        if close:
            return f"{asked}; did you mean {close[0]}?"
    asked = next((words for start, words in _KINDS.items() if kind.startswith(start)), asked)
    asked = f"a value {asked}" if kind.startswith(("greater_", "less_")) else asked
    default = field.default if field is not None else None
    return f"{asked}; left out, it is {default}" if isinstance(default, int | float | str) else f"{asked}; correct it"


def _read_path(message: str, lines: Lines) -> tuple[str | int, ...]:
    """The key that a fault of the whole file starts with, when the file has it."""
    path = tuple(message.removeprefix("Value error, ").partition(": ")[0].split("."))
    return path if path in lines else ()


def _strip_form(loc: tuple[str | int, ...], lines: Lines) -> tuple[str | int, ...]:
    """Leave out what pydantic puts into a location that is no key of the file: names of forms, members of unions."""
    path: tuple[str | int, ...] = ()
    for index, part in enumerate(loc):
        is_missing = index == len(loc) - 1 and str(part).isidentifier() and part not in _TYPES
        is_form = index == 1 and part in _FORMS_OF.get(loc[0], ())
        if ((*path, part) in lines or is_missing) and not is_form:
            path = (*path, part)
    return path


def _find_model(loc: tuple[str | int, ...], model: Model) -> Model:
    """The section that the last part of a location is a key of."""
    for index, part in enumerate(loc[:-1]):
        forms = _FORMS_OF.get(loc[0], {})
        if index == 0 and forms:
            model = next(iter(forms.values()))
        elif index == 1 and part in forms:
            model = forms[str(part)]
        elif isinstance(part, str) and part in model.model_fields:
            model = _find_section(model.model_fields[part].annotation) or model
    return model


def _did_you_mean(loc: tuple[str | int, ...], model: Model) -> str:
    known = _list_keys(_find_model(loc, model))
    word = _SHORT.get(str(loc[-1]), str(loc[-1]))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"


def _list_keys(model: Model) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _find_section(annotation: Any) -> Model | None:
    """The section in `Section | None`, or the section itself; `None` for a plain value."""
    choices = (*get_args(annotation), annotation)
    return next((a for a in choices if isinstance(a, type) and issubclass(a, BaseModel)), None)


def join_path(path: tuple[str | int, ...]) -> str:
    """`training.epochs` for (training, epochs)."""
    return ".".join(str(p) for p in path)


def suggest_recipes(path: Path) -> str:
    """What to give in place of a recipe that is not there: one whose name is close, or those that there are."""
    folders = (path, path / "recipes") if path.is_dir() else (path.parent, path.parent / "recipes")
    found = [p for folder in folders for p in sorted(folder.glob("*.yaml")) if p != path and p.name not in _NO_RECIPES]
    close = difflib.get_close_matches(path.stem, [p.stem for p in found], n=1)
    if close:
        return f"did you mean {next(p for p in found if p.stem == close[0])}?"
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    listed = ", ".join(map(str, found[:_LISTED]))
    return f"there is {listed}{more}" if found else "give the path of a recipe, a *.yaml"


def map_lines(node: Any, lines: Lines, path: tuple[str | int, ...]) -> list[tuple[int, str]]:
    """Fill `lines` with the line of every key path; return duplicate keys as (line, fault)."""
    faults = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            if here in lines:
                faults.append((key.start_mark.line + 1, f"key {join_path(here)} is given twice; keep one"))
            lines[here] = key.start_mark.line + 1
            faults += map_lines(value, lines, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, index)] = value.start_mark.line + 1
            faults += map_lines(value, lines, (*path, index))
    return faults
