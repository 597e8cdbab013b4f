"""The arms of a comparison: who answers, and with which prompt.

The base model gets the best prompt the recipe knows and, in the few-shot arm, for every test row
the most similar training rows as demonstrations. The tuned arms get the rows' own, short prompt,
as they will in production. Demonstrations come from train only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from appliance.example import Example, Message, normalise_text
from appliance.model import ChatTemplate
from appliance.recipe import EvaluationSection

ArmName = Literal["zero_shot", "few_shot", "champion", "candidate"]
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Arm:
    """One participant: a model folder, an adapter folder or none, and how it is prompted."""

    name: ArmName
    model: Path
    adapter: Path | None
    is_prompted: bool


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
    index = [(_words(e), e) for e in train] if arm.name == "few_shot" else []
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


def _select_nearest(
    example: Example, index: Sequence[tuple[frozenset[str], Example]], *, count: int
) -> tuple[Example, ...]:
    """The training rows whose requests share most words (Jaccard), the nearest last, ties by id."""
    words = _words(example)
    ranked = sorted(index, key=lambda item: (-_jaccard(words, item[0]), item[1].id))
    return tuple(e for _, e in reversed(ranked[:count]))


def _words(example: Example) -> frozenset[str]:
    return frozenset(_WORD.findall(normalise_text(example.request)))


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0
