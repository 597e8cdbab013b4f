"""The dataset check: one pass, every fault with file, line, row, rule and fix.

Errors keep a dataset from being trained on; warnings are doubts that a person should weigh. A new
rule is one function from the rows to findings, added to `_RULES`.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from appliance.contract import TextContract
from appliance.data.findings import Finding, Rule, Severity, find_in_fault
from appliance.data.near import find_near_copies
from appliance.data.rows import Dataset, Row, read_dataset
from appliance.data.split import Side, select_side
from appliance.digest import digest_json
from appliance.errors import TrainingError
from appliance.example import Example, normalise_text
from appliance.model import read_tools
from appliance.recipe import GateSection, SplitSection
from appliance.statistics import count_test_rows, smallest_gain

_SMALLEST = 10
_IMBALANCE = 20
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Report:
    """What the check found; `dataset` is `None` when it could not be read at all."""

    dataset: Dataset | None
    findings: tuple[Finding, ...]
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What keeps the dataset from being trained on."""
        return tuple(f for f in self.findings if f.severity == "error")

    def shorten(self, root: Path) -> Report:
        """The same, with every place below `root` named from there, as people in the repository name it."""

        def cut(text: str) -> str:
            return text.replace(f"{root}/", "")

        found = (replace(f, where=cut(f.where), message=cut(f.message), fix=cut(f.fix)) for f in self.findings)
        return replace(self, findings=tuple(found))

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What a person should weigh."""
        return tuple(f for f in self.findings if f.severity == "warning")


def check_dataset(folder: Path, *, split: SplitSection | None = None, gates: GateSection | None = None) -> Report:
    """Check the dataset in `folder` by the rules that need no base model; `masks` has the others.

    Which rows are tested on, and whether they are enough, is known by a recipe's `split` and `gates` alone.
    """
    dataset, unreadable = read_dataset(folder)
    if dataset is None:
        return Report(None, unreadable)
    findings = list(unreadable)
    for rule in _RULES:
        findings += rule(dataset)
    counts = _count(dataset, split)
    if any(f.severity == "error" for f in unreadable):  # how many rows there are is known once they can be read
        return Report(dataset, tuple(findings), counts)
    findings += _check_volume(dataset)
    if split is not None and gates is not None:
        findings += _check_test_rows(dataset, split, gates=gates)
    return Report(dataset, tuple(findings), counts)


def _error(row: Row, rule: Rule, message: str, fix: str) -> Finding:
    return Finding("error", rule, row.where, message, fix, id=row.example.id)


def _check_roles(dataset: Dataset) -> Iterator[Finding]:
    """Optional system, then user and assistant in turn, ending with the assistant; tools after calls."""
    for row in dataset.rows:
        fault = _find_role_fault(row.example)
        if fault:
            yield _error(row, "roles", fault, "order the turns as system?, user, assistant, ..., assistant")


def _find_role_fault(example: Example) -> str | None:
    roles = [m.role for m in example.messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns[-1] != "assistant":
        return f"the last turn is {roles[-1] if roles else 'missing'}, expected assistant"
    expected = {"user"}
    for index, role in enumerate(turns):
        if role not in expected:
            return f"turn {len(roles) - len(turns) + index + 1} is {role}, expected {' or '.join(sorted(expected))}"
        calls = example.messages[len(roles) - len(turns) + index].tool_calls
        expected = {"user": {"assistant"}, "tool": {"assistant", "tool"}}.get(role) or ({"tool"} if calls else {"user"})
    return None


def _check_text(dataset: Dataset) -> Iterator[Finding]:
    """No empty turn, no control characters."""
    for row in dataset.rows:
        for number, message in enumerate(row.example.messages, start=1):
            if not message.content.strip() and not message.tool_calls:
                yield _error(row, "empty", f"turn {number} ({message.role}) is empty", "fill it in or remove the row")
            control = _CONTROL.search(message.content)
            if control is not None:
                yield _error(row, "control", f"turn {number} has the control character {control[0]!r}", "remove it")


def _check_tools(dataset: Dataset) -> Iterator[Finding]:
    """Definitions of tools that a template can be given; many rows have the same, which are read once."""
    faults: dict[str | None, TrainingError | None] = {}
    for row in dataset.rows:
        tools = row.example.tools
        if tools not in faults:
            faults[tools] = _read_tools(tools)
        if (fault := faults[tools]) is not None:
            yield find_in_fault("error", "schema", row.where, fault, id=row.example.id)


def _read_tools(tools: str | None) -> TrainingError | None:
    try:
        read_tools(tools)
    except TrainingError as fault:
        return fault
    return None


def _check_contract(dataset: Dataset) -> Iterator[Finding]:
    """Every reference answer keeps the contract, which is of text: a call of a tool has none to keep."""
    is_text = isinstance(dataset.card.contract, TextContract)
    for row in dataset.rows:
        if row.example.messages[-1].tool_calls:
            if not is_text:
                message = "the answer calls a tool, and the contract of dataset.yaml is for answers in text"
                yield _error(row, "contract", message, "remove the row, or leave the contract out")
            continue
        for fault in dataset.card.contract.find_faults(row.example.answer):
            yield _error(row, "contract", f"the answer breaks the contract: {fault}", "correct the answer")


def _check_ids(dataset: Dataset) -> Iterator[Finding]:
    """One id, one row."""
    yield from _find_repeats(dataset.rows, "id", key=lambda e: e.id, words="the id", fix="give the row its own id")


def _check_duplicates(dataset: Dataset) -> Iterator[Finding]:
    """No content twice."""
    yield from _find_repeats(
        dataset.rows, "duplicate", key=lambda e: e.content_hash, words="the content", fix="remove one"
    )


def _find_repeats(
    rows: Iterable[Row], rule: Rule, *, key: Callable[[Example], str], words: str, fix: str
) -> Iterator[Finding]:
    first: dict[str, Row] = {}
    for row in rows:
        seen = first.setdefault(key(row.example), row)
        if seen is not row:
            yield _error(row, rule, f"{words} is that of row {seen.example.id} at {seen.where}", fix)


def _check_prompts(dataset: Dataset) -> Iterator[Finding]:
    """A prompt has one group, or it could stand in train and in test, and one answer."""
    first: dict[str, Row] = {}
    same: dict[str, Row] = {}
    alike: dict[str, Row] = {}
    for row in dataset.rows:
        seen = first.setdefault(row.example.normalised_prompt, row)
        if seen is row or seen.example.content_hash == row.example.content_hash:
            continue
        if seen.example.group_key != row.example.group_key:
            place = f"row {seen.example.id} at {seen.where}"
            message = f"the prompt is that of {place} in another group, so it could stand in train and in test"
            yield _error(row, "shared-prompt", message, "give both rows the same group, or remove one")
        for one in (seen, row):
            same.setdefault(_hash_request(one.example, _trim), one)
            alike.setdefault(_hash_request(one.example, normalise_text), one)
        yield from _compare_answers(
            row, same[_hash_request(row.example, _trim)], alike[_hash_request(row.example, normalise_text)]
        )


def _compare_answers(row: Row, same: Row, alike: Row) -> Iterator[Finding]:
    """The answer against that of the first row with the same request, and the first with one that reads alike."""
    if same.example.answer.strip() != row.example.answer.strip():
        message = f"the prompt is that of row {same.example.id} at {same.where}, with another answer"
        yield _error(row, "contradiction", message, "keep the right answer")
    elif same is row and alike.example.answer.strip() != row.example.answer.strip():
        place = f"row {alike.example.id} at {alike.where}"
        message = f"the prompt is that of {place} but for case, spaces or forms of characters, with another answer"
        fix = "where both ask the same, keep the right answer"
        yield Finding("warning", "contradiction", row.where, message, fix, id=row.example.id)


def _hash_request(example: Example, read: Callable[[str], str]) -> str:
    """What a row asks: its tools, its system prompt and its turns as `read` takes them."""
    turns = [[m.role, (_trim if m.role == "system" else read)(m.content), m.tool_calls] for m in example.prompt]
    return digest_json([example.tools, turns])


def _trim(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _check_turns(dataset: Dataset) -> Iterator[Finding]:
    """No turn before the last has the prompt of a row in another group: every turn is trained on."""
    several = [r for r in dataset.rows if sum(m.role == "assistant" for m in r.example.messages) > 1]
    asked: dict[bytes, Row] = {}
    for row in dataset.rows if several else ():
        asked.setdefault(_start_hash(row.example.normalised_prompt).digest(), row)
    for row in several:
        for turn, prompt in _list_earlier(row.example):
            seen = asked.get(prompt)
            if seen is not None and seen.example.group_key != row.example.group_key:
                place = f"row {seen.example.id} at {seen.where}"
                message = (
                    f"the prompt of turn {turn} is that of {place} in another group, so it could be trained on "
                    "here and tested there"
                )
                yield _error(row, "shared-prompt", message, "give both rows the same group, or remove one")


def _check_exchanges(dataset: Dataset) -> Iterator[Finding]:
    """What a row asks last, and is answered, is said in no other group's conversation: it is trained on there."""
    several = [r for r in dataset.rows if sum(m.role == "assistant" for m in r.example.messages) > 1]
    last: dict[str, Row] = {}
    for row in dataset.rows if several else ():
        for _, exchange in list(_hash_exchanges(row.example))[-1:]:
            last.setdefault(exchange, row)
    found = [
        (row, turn, last[exchange])
        for row in several
        for turn, exchange in _hash_exchanges(row.example)
        if exchange in last and last[exchange].example.group_key != row.example.group_key
    ]
    if found:
        row, turn, seen = found[0]
        message = (
            f"turn {turn} and the one before are the last two of row {seen.example.id} at {seen.where} in another "
            f"group, so the answer could be trained on in one and tested in the other ({len(found)} turns like it)"
        )
        fix = "give both rows the same group, or leave it where such an answer is a courtesy"
        yield Finding("warning", "shared-prompt", row.where, message, fix, id=row.example.id)


def _hash_exchanges(example: Example) -> Iterator[tuple[int, str]]:
    """Each assistant's turn by number, with the hash of it and of the turn before it, normalised."""
    for number, (before, message) in enumerate(pairwise(example.messages), start=2):
        if message.role == "assistant":
            said = [normalise_text(before.content), normalise_text(message.content), message.tool_calls]
            yield number, digest_json(said)


def _list_earlier(example: Example) -> Iterator[tuple[int, bytes]]:
    """The assistant's turns before the last one, by number, with the hash of the normalised prompt of each."""
    hashed: hashlib.blake2b | None = None
    for number, message in enumerate(example.prompt, start=1):
        if message.role == "assistant" and hashed is not None:
            yield number, hashed.digest()
        if message.role != "system":
            text = normalise_text(message.content)
            if hashed is None:
                hashed = _start_hash(text)
            else:
                hashed.update(f"\n{text}".encode("utf-8", "surrogatepass"))


def _start_hash(text: str) -> hashlib.blake2b:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)


def _check_provenance(dataset: Dataset) -> Iterator[Finding]:
    """Model-generated rows need a person's review; there is no review record that could show one."""
    for row in dataset.rows:
        if row.example.provenance == "general":
            message = "a general row in a reviewed dataset"
            yield _error(row, "unreviewed", message, "move it to the folder of forgetting.replay.path")
        if row.example.provenance == "synthetic":
            message = "a synthetic row without a review"
            yield _error(row, "unreviewed", message, "have a person verify it and mark it human, or remove it")


def _check_categories(dataset: Dataset) -> Iterator[Finding]:
    """Categories are the declared ones, each is covered, none drowns the others."""
    declared = dataset.card.categories
    if not declared:
        return
    counted = Counter(r.example.category for r in dataset.rows)
    for row in dataset.rows:
        if row.example.category not in declared:
            message = f"category {row.example.category!r} is not in dataset.yaml"
            yield _error(row, "category", message, f"use one of {', '.join(declared)}")
    place = str(dataset.folder)
    for name in (c for c in declared if not counted[c]):
        yield Finding("warning", "coverage", place, f"category {name} has no rows", "add rows of it")
    present = [counted[c] for c in declared if counted[c]]
    if present and max(present) > _IMBALANCE * min(present):
        message = f"the largest category has {max(present)} rows, the smallest {min(present)}"
        yield Finding("warning", "imbalance", place, message, "add rows to the small ones")


_RULES: tuple[Callable[[Dataset], Iterator[Finding]], ...] = (
    _check_roles,
    _check_text,
    _check_tools,
    _check_contract,
    _check_ids,
    _check_duplicates,
    _check_prompts,
    _check_turns,
    _check_exchanges,
    _check_provenance,
    _check_categories,
)


def _check_volume(dataset: Dataset) -> Iterator[Finding]:
    """Rows against the guide's 100 and 500."""
    rows, place = len(dataset.rows), str(dataset.folder)
    severity: Severity = "error" if rows < _SMALLEST else "warning"
    if rows < 100:
        message = (
            f"{rows} rows; at least {_SMALLEST} are needed and 100 for a simple task (500 to 1,000 for a complex one)"
        )
        yield Finding(severity, "volume", place, message, "collect more, or prompt with a few examples instead")


def _check_test_rows(dataset: Dataset, split: SplitSection, *, gates: GateSection) -> Iterator[Finding]:
    """Which test rows the verdict will not count, and what the others can show by the test that will judge."""
    sides: dict[Side, list[Row]] = {"train": [], "validation": [], "test": []}
    for row in dataset.rows:
        sides[select_side(row.example.group_key, split)].append(row)
    test, train = sides["test"], sides["train"]
    copies = find_near_copies([r.example for r in test], [r.example for r in train])
    for place, other in copies.items():
        trained = f"training row {train[other].example.id} at {train[other].where}"
        message = f"asks nearly what {trained} asks and has its answer, so the verdict does not count it"
        fix = "give both rows the same group, or remove one"
        yield Finding("warning", "near-copy", test[place].where, message, fix, id=test[place].example.id)
    if test and len(copies) == len(test):
        message = "every test row is a near copy of a row that is trained on, so there would be none to judge by"
        yield Finding("error", "near-copy", str(dataset.folder), message, "give near copies one group, or add rows")
    keys = [r.example.group_key for place, r in enumerate(test) if place not in copies]
    groups = len(set(keys))
    if len(dataset.rows) >= _SMALLEST and groups < gates.min_test_rows:
        gain = smallest_gain(groups, alpha=gates.alpha)
        finds = f"find only gains of {gain * 100:.0f} points or more" if gain else "hardly show any gain"
        counted = f", {len(copies)} near copies not counted" if copies else ""
        message = (
            f"{count_test_rows(len(keys), groups)}{counted}; the gate wants {gates.min_test_rows}: a test at "
            f"{gates.alpha:g} on so few can {finds}, the verdict will be inconclusive"
        )
        yield Finding("warning", "test-size", str(dataset.folder), message, "add rows or raise dataset.split.test")


def _count(dataset: Dataset, split: SplitSection | None) -> dict[str, Any]:
    sides = Counter(select_side(r.example.group_key, split) for r in dataset.rows) if split is not None else {}
    counts: dict[str, Any] = {
        "rows": len(dataset.rows),
        **({side: sides[side] for side in ("train", "validation", "test")} if split is not None else {}),
        "provenance": dict(sorted(Counter(r.example.provenance for r in dataset.rows).items())),
    }
    categories = Counter(r.example.category for r in dataset.rows if r.example.category is not None)
    return counts | ({"categories": dict(sorted(categories.items()))} if categories else {})


def describe_lengths(lengths: Sequence[int]) -> dict[str, Any]:
    """The counts of the token lengths of the rows, at least one."""
    ordered = sorted(lengths)
    picks = {"median": 0.5, "p95": 0.95, "longest": 1.0}
    return {"tokens": {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in picks.items()}}
