"""Every prompt of an evaluation, made before anything is spent: what fails here would fail after the training."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from appliance.errors import EvaluationError, TrainingError
from appliance.evaluation.arms import Arm, Prompt, build_arms, build_prompts
from appliance.example import Example, Message
from appliance.model import ChatTemplate
from appliance.recipe import EvaluationSection

_MARK = " 7316049258"
_NOWHERE = Path()
_REMEDIES = {
    "zero_shot": "leave out evaluation.system_prompt, or choose a base model whose template has a system turn",
    "few_shot": "write evaluation.few_shot: 0",
    "candidate": "give the rows the turns that it knows, or choose another base model",
}


def rehearse_prompts(
    section: EvaluationSection, *, test: Sequence[Example], train: Sequence[Example], template: ChatTemplate
) -> int:
    """The longest prompt, in tokens, of all arms but the champion's, which is the candidate's.

    The light core has no numpy to find demonstrations with, and leaves those prompts to the run. Raises
    `EvaluationError` where the chat template refuses an arm's prompt, or leaves the system prompt out.
    """
    if find_spec("numpy") is None:
        section = section.model_copy(update={"few_shot": 0})
    arms = build_arms(section, base=_NOWHERE, artifact=_NOWHERE, is_adapter=True, champion=None)
    prompts = [p for arm in arms for p in _build(arm, section=section, test=test, train=train, template=template)]
    if section.system_prompt is not None and test:
        _check_shown(section.system_prompt, test[0], template)
    return max((len(p.input_ids) for p in prompts), default=0)


def _build(
    arm: Arm,
    *,
    section: EvaluationSection,
    test: Sequence[Example],
    train: Sequence[Example],
    template: ChatTemplate,
) -> tuple[Prompt, ...]:
    try:
        return build_prompts(arm, test, section=section, train=train, template=template)
    except TrainingError as fault:
        said = str(fault).partition(";")[0]
        raise EvaluationError(f"evaluation: the prompts of {arm.name}: {said}; {_REMEDIES[arm.name]}") from fault


def _check_shown(system: str, example: Example, template: ChatTemplate) -> None:
    """The base model without its best prompt would be an easy one to beat."""
    rest = (m for m in example.prompt if m.role != "system")
    if _MARK not in template.render((Message("system", system + _MARK), *rest), prompt=True, tools=example.tools):
        raise EvaluationError(
            f"evaluation.system_prompt: the chat template of {template.source} leaves it out, so the base model would "
            f"not have its best prompt; {_REMEDIES['zero_shot']}"
        )
