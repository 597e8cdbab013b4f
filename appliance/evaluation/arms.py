"""The arms of a comparison: who answers, and with which prompt.

The base model gets the best prompt the recipe knows and, in the few-shot arm, for every test row
the most similar training rows as demonstrations. The tuned arms get the rows' own, short prompt,
as they will in production. Demonstrations come from train only.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from appliance.example import Example, Message, normalise_text
from appliance.model import ChatTemplate
from appliance.recipe import EvaluationSection

ArmName = Literal["zero_shot", "few_shot", "champion", "candidate"]
# Written without spaces: Han, kana, Thai, Lao, Myanmar and Khmer; their marks belong to them, their digits do not.
_UNSPACED = (
    r"\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    r"\u3041-\u3096\u3099\u309a\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    r"\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf"
    r"\u1000-\u103f\u1050-\u108f\u109a-\u109d\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa7f"
    r"\u1780-\u17d3\u17d7\u17dc\u17dd"
)
_WORD = re.compile(rf"([{_UNSPACED}]+)|[^\W{_UNSPACED}]+")


@dataclass(frozen=True, slots=True)
class Arm:
    """One participant: a model folder, an adapter folder or none, and how it is prompted."""

    name: ArmName
    model: Path
    adapter: Path | None
    is_prompted: bool


@dataclass(frozen=True, slots=True)
class _Index:
    """Training rows in the order of their ids, how many words each request has, and the rows of every word.

    The rows of a word are their numbers, or, where one in eight has it, a mark for each row: it is added faster.
    """

    rows: tuple[Example, ...]
    sizes: Any
    numbers: dict[str, Any]
    marks: dict[str, Any]


class Prompt(msgspec.Struct, frozen=True):
    """What one arm is asked for one row, as tokens."""

    id: str
    arm: str
    input_ids: list[int]


def build_arms(
    section: EvaluationSection, *, base: Path, artifact: Path, is_adapter: bool, champion: Path | None
) -> tuple[Arm, ...]:
    """The arms a recipe asks for; `champion` is the pulled artifact behind the alias, if there is one."""
    arms = [Arm("zero_shot", base, None, is_prompted=True)]
    if section.few_shot:
        arms.append(Arm("few_shot", base, None, is_prompted=True))
    if champion is not None:
        arms.append(
            _build_tuned("champion", champion, base=base, is_adapter=(champion / "adapter_config.json").is_file())
        )
    arms.append(_build_tuned("candidate", artifact, base=base, is_adapter=is_adapter))
    return tuple(arms)


def _build_tuned(name: ArmName, artifact: Path, *, base: Path, is_adapter: bool) -> Arm:
    return Arm(name, base if is_adapter else artifact, artifact if is_adapter else None, is_prompted=False)


def build_prompts(
    arm: Arm,
    examples: Sequence[Example],
    *,
    section: EvaluationSection,
    train: Sequence[Example],
    template: ChatTemplate,
) -> tuple[Prompt, ...]:
    """The prompt of every row for one arm, in the rows' order."""
    index = _index_rows(train) if arm.name == "few_shot" and train else None
    prompts = []
    for example in examples:
        messages = example.prompt
        if arm.is_prompted:
            shots = _select_nearest(example, index, count=section.few_shot) if index else ()
            messages = _prompt_base(example, system=section.system_prompt, shots=shots)
        is_direct = arm.is_prompted and not example.tools  # an answer that was begun could be no call
        tokens = template.encode_prompt(messages, tools=example.tools, is_direct=is_direct)
        prompts.append(Prompt(example.id, arm.name, tokens))
    return tuple(prompts)


def _prompt_base(example: Example, *, system: str | None, shots: Sequence[Example]) -> tuple[Message, ...]:
    own = [m for m in example.prompt if m.role == "system"]
    lead = [Message("system", system)] if system is not None else own
    turns = [m for e in shots for m in e.messages if m.role != "system"]
    rest = [m for m in example.prompt if m.role != "system"]
    return (*lead, *turns, *rest)


def _index_rows(train: Sequence[Example]) -> _Index:
    """What the nearest rows are found by: looking at every row for every test row would take hours."""
    import numpy as np

    rows = sorted(train, key=lambda e: e.id)
    sizes = array("i")
    found: dict[str, array[int]] = {}
    for number, row in enumerate(rows):
        words = _words(row)
        sizes.append(len(words))
        for word in words:
            found.setdefault(word, array("i")).append(number)
    numbers, marks = {}, {}
    for word, held in found.items():
        if 8 * len(held) < len(rows):
            numbers[word] = np.frombuffer(held, dtype=np.intc)
        else:
            marks[word] = np.zeros(len(rows), dtype=np.uint8)
            marks[word][held] = 1
    return _Index(tuple(rows), np.frombuffer(sizes, dtype=np.intc), numbers, marks)


def _select_nearest(example: Example, index: _Index, *, count: int) -> tuple[Example, ...]:
    """The training rows whose requests share most words (Jaccard), the nearest last, ties by id."""
    import numpy as np

    likeness = _measure_likeness(_words(example), index)
    count = min(count, len(index.rows))
    least = np.partition(likeness, -count)[-count]
    above = np.flatnonzero(likeness > least)
    nearest = above[np.argsort(-likeness[above], kind="stable")]
    tied = np.flatnonzero(likeness == least)[: count - len(nearest)]
    return tuple(index.rows[i] for i in (*tied[::-1], *nearest[::-1]))


def _measure_likeness(words: frozenset[str], index: _Index) -> Any:
    """Jaccard of every row with these words: those shared over those that either has; 0 where neither has any."""
    import numpy as np

    shared = np.zeros(len(index.rows), dtype=np.intc)
    for word in words:
        if (numbers := index.numbers.get(word)) is not None:
            shared[numbers] += 1
        elif (marks := index.marks.get(word)) is not None:
            shared += marks
    return shared / np.maximum(index.sizes + len(words) - shared, 1)


def _words(example: Example) -> frozenset[str]:
    """The words of the request; where a script has no spaces between them, its pairs of neighbouring characters."""
    found: set[str] = set()
    for match in _WORD.finditer(normalise_text(example.request)):
        run = match[0]
        found.update((run[i : i + 2] for i in range(max(1, len(run) - 1))) if match[1] else (run,))
    return frozenset(found)
