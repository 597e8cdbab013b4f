"""YAML that people write, read in one way: whatever is wrong with it is one error with its file and line.

Dates, `yes`, `no`, `on` and `off` stay the text that they are, as in YAML 1.2, and keys are text. Anchors may
be used, but nothing may hold itself or grow without end by them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from appliance.errors import ApplianceError

_DEPTH, _VALUES, _BITS = 64, 100_000, 4096  # Python writes no integer of more than 4300 digits
_ONE = "expected a single document in the stream"  # in PyYAML's words
_DATE, _BOOL = "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:bool"
_TRUTH = re.compile("^(?:true|True|TRUE|false|False|FALSE)$")
_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


@dataclass(frozen=True, slots=True)
class Document:
    """The values of a YAML text, and its nodes, which know their lines; both `None` for an empty one."""

    values: Any
    root: yaml.Node | None


def load_document(file: Path, *, error: type[ApplianceError]) -> Document:
    """Read a YAML file. Raises `OSError` where it cannot be opened, and `error` for what is in it."""
    return decode_document(file.read_bytes(), source=str(file), error=error)


def decode_document(content: bytes, *, source: str, error: type[ApplianceError]) -> Document:
    """Read the bytes of a YAML file; `source` is the name that messages carry. Raises `error`."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"{source}: not UTF-8 at byte {fault.start + 1}; save the file as UTF-8") from fault
    return parse_document(text, source=source, error=error)


def parse_document(text: str, *, source: str, error: type[ApplianceError]) -> Document:
    """Read YAML text; `source` is the name that messages carry. Raises `error`."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Document(None, None)
        _check_extent(root)
        return Document(loader.construct_document(root), root)
    except yaml.YAMLError as fault:
        raise error(f"{source}:{_find_line(fault, text)}: {_describe(fault)}") from fault
    except RecursionError as fault:  # while nodes are made of brackets in brackets
        line = loader.get_mark().line + 1 if loader else 1
        raise error(f"{source}:{line}: too many levels inside each other; correct it") from fault


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the dates and truths of YAML 1.2; says where a value is not what it looks like."""

    yaml_implicit_resolvers = {
        first: [(tag, _TRUTH if tag == _BOOL else pattern) for tag, pattern in found if tag != _DATE]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """One value; what Python cannot make of it is a fault of its line."""
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > _BITS:
                raise OverflowError
        except (ValueError, LookupError, AttributeError, ArithmeticError) as fault:  # of int(), float() and dates
            shown, kind = str(node.value)[:32], node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown!r} looks like a value of type {kind} and is none", node.start_mark
            ) from fault
        return value


def _check_extent(root: yaml.Node) -> None:
    """Refuse what is too deep, or too much with every anchor in its place: an anchor inside itself is without end."""
    waiting, count = [(root, 1)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > _DEPTH or count > _VALUES:
            words = f"{_DEPTH} levels inside each other" if depth > _DEPTH else f"{_VALUES:,} values"
            problem = f"more than {words} (anchors count wherever they are used)"
            raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]


def _check_keys(node: yaml.MappingNode) -> None:
    """Refuse a key that YAML reads as something else than text: nobody would ever look it up."""
    for key, _ in node.value:
        if key.tag not in _KEYS:
            kind = key.tag.rpartition(":")[2]
            is_value = isinstance(key, yaml.ScalarNode)
            words = (
                f"the key {key.value[:32]!r} is a value of type {kind}" if is_value else "a key is a list or a mapping"
            )
            raise yaml.composer.ComposerError(None, None, f"{words}, not text", key.start_mark)


def _describe(fault: yaml.YAMLError) -> str:
    """What is wrong, and what to do."""
    if getattr(fault, "context", None) == _ONE:
        return "a second document begins here, and a file is one; remove the `---`, or what follows it"
    problem = getattr(fault, "problem", None) or getattr(fault, "reason", None) or "not YAML"
    return f"{problem}; check the indentation and the quotes"


def _find_line(fault: yaml.YAMLError, text: str) -> int:
    """The line of a fault: by its mark, or by the place of a character that YAML does not allow."""
    mark = getattr(fault, "problem_mark", None)
    if mark is not None:
        return int(mark.line) + 1
    return text.count("\n", 0, getattr(fault, "position", 0)) + 1
