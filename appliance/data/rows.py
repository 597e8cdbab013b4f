"""Reading a dataset folder: `*.jsonl` rows and `dataset.yaml`, every fault with its line.

Bytes are read line by line, so that a broken row never hides the ones after it. What is returned
has the right types; whether the rows are fit to train on is for the checks.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.contract import Contract, TextContract
from appliance.data.findings import Finding, Rule
from appliance.digest import digest_bytes, digest_file, digest_json, list_files
from appliance.document import decode_document
from appliance.errors import DatasetError
from appliance.example import Example, Message, Provenance, Role
from appliance.faults import Lines, describe_fault, map_lines

_SHOWN = 20
_UNKNOWN = re.compile(r"Object contains unknown field `(.+?)`")
_LACKING = re.compile(r"Object missing required field `(.+?)`")
_WRONG = re.compile(r"Expected `(\w+)(?: \| null)?`(?:, got `(\w+)`| of length >= 1)")
_PLACE = re.compile(r" - at `\$\.?(?:messages\[(\d+)\]\.?)?(.*)`$")
_KINDS = {"str": "text", "array": "a list", "object": "an object", "int": "a number", "float": "a number"}
_ROWS = re.compile(r"\.(jsonl?|ndjson)(\.\w+)?$", re.IGNORECASE)
_ROW_KEYS = tuple(f'"{key}"'.encode() for key in Example.__struct_fields__)
_TURN_KEYS = tuple(f'"{key}"'.encode() for key in Message.__struct_fields__)
_CHOICES = {"role": Role, "provenance": Provenance}
_REMEDIES = {  # by msgspec's words; the first two are what OpenAI's format holds
    r"got `array`.*\.content`": "join its parts into one text",
    r"got `null`.*\.content`": 'write "" where the turn calls a tool, else its text',
    r"got `array`.*\.tools`": "write the list as one text of JSON",
    r"`str.*got `(int|float|bool)`": "put it in quotes",
}
# Keys of rows as other trainers read them: prompt and completion, Alpaca, ShareGPT.
_FOREIGN = {
    *("prompt", "completion", "response", "instruction", "input", "output", "question", "answer", "text"),
    *("conversations", "conversation", "from", "value"),
}


class DatasetCard(BaseModel):
    """`dataset.yaml`: what the rows are for and what every answer must look like."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1)
    description: str = ""
    licence: str = ""
    contract: Contract = TextContract()
    categories: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """An example and the place it was read from."""

    example: Example
    file: str
    line: int

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Dataset:
    """A folder of rows; `digest` covers every file in it, and card and rows as they were read."""

    folder: Path
    card: DatasetCard
    rows: tuple[Row, ...]
    digest: str

    @property
    def examples(self) -> tuple[Example, ...]:
        """The rows without their places, in file and line order."""
        return tuple(r.example for r in self.rows)


def read_dataset(folder: Path) -> tuple[Dataset | None, tuple[Finding, ...]]:
    """The rows that can be read, and a finding for everything that cannot; no dataset without a card."""
    if folder.is_file():
        fix = f"name the folder that it is in, {folder.parent}"
        return None, (_fault("missing", folder, "a file, expected the folder of a dataset", fix),)
    if not folder.is_dir():
        fix = "run `dvc pull`, correct dataset.path in the recipe, or start in the repository's root (--root)"
        return None, (_fault("missing", folder, "no such folder", fix),)
    read: dict[str, str] = {}
    card, findings = _read_card(folder / "dataset.yaml", read)
    files = sorted(f for f in folder.glob("*.jsonl") if not f.name.startswith("."))  # as in `digest_folder`
    if not files and (inner := sorted({str(p.parent) for p in folder.glob("*/*.jsonl")})):
        return None, (_fault("missing", folder, "no rows, but folders of rows", f"name one: {', '.join(inner)}"),)
    if not files:
        others = ", ".join(sorted(p.name for p in folder.iterdir() if p.name != "dataset.yaml")[:_SHOWN])
        message = f"no *.jsonl file, only {others}" if others else "no *.jsonl file"
        findings.append(_fault("missing", folder, message, "add rows, one JSON object a line"))
    else:
        findings += _find_unread(folder)
    rows: list[Row] = []
    for file in files:
        count = len(rows)
        found = _read_file(file, rows, read)
        findings += found
        if not found and len(rows) == count:
            findings.append(_fault("empty", file, "the file has no rows", "add rows or delete the file"))
    if card is None:
        return None, tuple(findings)
    return Dataset(folder, card, tuple(rows), _digest_read(folder, read)), tuple(findings)


def _digest_read(folder: Path, read: Mapping[str, str]) -> str:
    """`digest_folder`, with what was `read` as it was then: somebody may have written to it since."""
    others = [n for n in list_files(folder) if n not in read and ("/" in n or not n.endswith(".jsonl"))]
    return digest_json(sorted({**{n: digest_file(folder / n) for n in others}, **read}.items()))


def _read_card(file: Path, read: dict[str, str]) -> tuple[DatasetCard | None, list[Finding]]:
    """The card, and what is wrong with it; the digest of its bytes goes into `read`."""
    try:
        content = file.read_bytes()
        read[file.name] = digest_bytes(content)
        document = decode_document(content, source=str(file), error=DatasetError)
    except FileNotFoundError:
        fix = "add it with name, description, licence and contract"
        return None, [_fault("card", file, "no dataset.yaml beside the rows", fix)]
    except OSError as fault:
        return None, [_fault("card", file, f"cannot be read ({fault})", "correct the file")]
    except DatasetError as fault:
        return None, [_find_card_fault(str(fault))]
    lines: Lines = {}
    faults = [f"{file}:{line}: {text}" for line, text in map_lines(document.root, lines, ())]
    card = None
    try:
        card = DatasetCard.model_validate(document.values)
    except ValidationError as invalid:
        faults += [describe_fault(e, model=DatasetCard, lines=lines, source=str(file)) for e in invalid.errors()]
    return (None if faults else card), [_find_card_fault(words) for words in dict.fromkeys(faults)]


def _find_card_fault(said: str) -> Finding:
    """The finding of a fault `file:line: what; next action`."""
    where, _, words = said.partition(": ")
    message, separator, fix = words.rpartition("; ")
    return Finding("error", "card", where, message if separator else words, fix if separator else "correct it")


def _find_unread(folder: Path) -> list[Finding]:
    """A doubt about files that look like rows and are not read, because of their name or place."""
    names = [n for n in list_files(folder) if _ROWS.search(n) and ("/" in n or not n.endswith(".jsonl"))]
    if not names:
        return []
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    message = f"{shown} are not read, though they count in the digest: rows are in *.jsonl beside dataset.yaml"
    return [Finding("warning", "unread", str(folder), message, "rename or move them, or take them out of the folder")]


def _read_file(file: Path, rows: list[Row], read: dict[str, str]) -> list[Finding]:
    """Append the readable rows of one file to `rows`, put its digest into `read`; return findings for other rows."""
    decoder, digest = msgspec.json.Decoder(Example), hashlib.sha256()
    findings = []
    try:
        stream = file.open("rb")
    except OSError as fault:
        fix = "put a file of rows in its place, or remove it"
        return [_fault("missing", file, f"cannot be read ({fault.strerror})", fix)]
    with stream:
        if stream.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return [Finding("error", "encoding", f"{file}:1", "not UTF-8 but UTF-16", "save the file as UTF-8")]
        for number, line in enumerate(stream, start=1):
            digest.update(line)
            if not line.strip():
                continue
            try:
                row = Row(decoder.decode(line), str(file), number)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
                findings.append(_describe_row_fault(f"{file}:{number}", line, fault))
                continue
            if repeat := _find_repeat(line, len(row.example.messages)):
                findings.append(Finding("error", "schema", row.where, repeat, "keep one", id=row.example.id))
            else:
                rows.append(row)
    read[file.name] = digest.hexdigest()
    return findings


def _find_repeat(line: bytes, turns: int) -> str | None:
    """A key of the row or of a turn that is given twice, of which decoding keeps the last.

    Python's decoder, which tells them, is five times as slow: only rows with more of a key's name than they
    have keys are shown to it.
    """
    names = [line.count(name) for name in _ROW_KEYS]
    turn_names = [line.count(name) for name in _TURN_KEYS]
    if max(names) < 2 and max(turn_names) <= turns:
        return None
    try:
        row = json.loads(line, object_pairs_hook=list)
    except RecursionError:  # more levels in `meta` than Python's decoder goes down
        return None
    messages = next(value for key, value in row if key == "messages")
    for place, pairs in enumerate([row, *messages]):
        repeats = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeats:
            return f"{f'turn {place}: ' if place else ''}the key {repeats[0]} is given twice"
    return None


def _describe_row_fault(where: str, line: bytes, fault: Exception) -> Finding:
    """A schema fault names the row and the key; anything else is a broken line."""
    if line.startswith(codecs.BOM_UTF8):
        return Finding("error", "encoding", where, "it begins with a BOM", "save it as UTF-8 without byte-order mark")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as bad:
        return Finding("error", "encoding", where, f"not UTF-8 at byte {bad.start + 1}", "save the file as UTF-8")
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError) as broken:  # what begins as something else may be no JSON at all
        return Finding("error", "json", where, f"not one JSON object: {broken}", "write each row as one line of JSON")
    found = value.get("id") if isinstance(value, dict) else None
    row = found if isinstance(found, str) and found else None
    return Finding("error", "schema", where, _say_fault(str(fault)), _suggest(str(fault)), id=row)


def _say_fault(fault: str) -> str:
    """A schema fault of msgspec's in this project's words: place, found, expected."""
    place = _PLACE.search(fault)
    turn, key = (place[1], place[2]) if place else (None, "")
    where = f"turn {int(turn) + 1}: " if turn else ""
    if unknown := _UNKNOWN.match(fault):
        return f"{where}unknown key {unknown[1]}"
    if lacking := _LACKING.match(fault):
        return f"{where}key {lacking[1]} is missing"
    where += f"{key}: " if key else ""
    if wrong := _WRONG.match(fault):
        wanted, got = (_KINDS.get(kind or "", kind) for kind in wrong.groups())
        return f"{where}found {got}, expected {wanted}" if got else f"{where}empty"
    return where + _PLACE.sub("", fault).replace("Invalid enum value", "found")


def _suggest(fault: str) -> str:
    """What to do about a schema fault, by msgspec's words for it."""
    kind, keys = ("turn", Message.__struct_fields__) if "$.messages[" in fault else ("row", Example.__struct_fields__)
    unknown = _UNKNOWN.search(fault)
    if unknown:
        close = difflib.get_close_matches(unknown[1], keys, n=1)
        if close:
            return f"did you mean {close[0]}?"
        if unknown[1] in _FOREIGN:
            return "a row has messages of {role, content}: the script in the appliance's docs/data.md makes them of it"
        return f"a {kind} has {', '.join(keys)}"
    for words, fix in _REMEDIES.items():
        if re.search(words, fault):
            return fix
    if "missing required field" in fault:
        return "a turn needs role and content" if kind == "turn" else "a row needs id, messages and provenance"
    choices = next((get_args(c) for key, c in _CHOICES.items() if f".{key}`" in fault), ())
    return f"use one of {', '.join(choices)}" if choices else f"a {kind} has {', '.join(keys)}"


def _fault(rule: Rule, where: Path, message: str, fix: str) -> Finding:
    return Finding("error", rule, str(where), message, fix)
