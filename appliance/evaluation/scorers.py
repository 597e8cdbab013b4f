"""Scorers: each output against its reference and the dataset's contract, without mercy.

An answer in a code fence, with prose around it or with a key too many would break the program that
reads it, so it scores 0. Nothing is stripped but white space at the ends and, where references think,
the thinking that an answer begins with: it is trained, and nobody compares it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from appliance.contract import Contract, JsonContract, compose, parse_json
from appliance.errors import EvaluationError
from appliance.evaluation.outputs import Output, Result, read_said
from appliance.example import Example
from appliance.model import ChatTemplate, render_rows
from appliance.thinking import drop_thinking

_LIMIT = 100_000


def score_outputs(
    outputs: Sequence[Output], examples: Sequence[Example], contract: Contract, *, template: ChatTemplate
) -> tuple[Result, ...]:
    """One result per output, in the outputs' order.

    Raises `EvaluationError` when an arm lacks a row, answers one twice, or answers an unknown one.
    """
    known = {e.id: (e, _find_reference(e, template)) for e in examples}
    _check_complete(outputs, set(known))
    read = drop_thinking if any(e.thinks for e in examples) else str
    return tuple(_score(o, read(o.output), *known[o.id], contract=contract) for o in outputs)


def _find_reference(example: Example, template: ChatTemplate) -> str:
    """What answers are compared with: the row's own, or, where it calls tools, all that the template writes for it."""
    if not example.messages[-1].tool_calls:
        return example.answer
    row = render_rows(example, template)[-1]
    start, end = row.spans[-1]
    return drop_thinking(read_said(row.input_ids[start : end - 1], asked=row.input_ids[:start], template=template))


def _check_complete(outputs: Sequence[Output], ids: set[str]) -> None:
    for arm in sorted({o.arm for o in outputs}):
        answered = [o.id for o in outputs if o.arm == arm]
        wrong = sorted(set(answered) ^ ids)
        if wrong or len(answered) != len(ids):
            what = f"row {wrong[0]} is missing or unknown" if wrong else "a row has two answers"
            raise EvaluationError(f"arm {arm}: {what} ({len(answered)} answers, {len(ids)} rows); evaluate again")


def _score(output: Output, answer: str, example: Example, reference: str, *, contract: Contract) -> Result:
    scores = {
        "exact_match": float(is_exact(answer, reference, contract)),
        "contract_valid": float(keeps_contract(answer, contract)),
    }
    if isinstance(contract, JsonContract):
        scores["field_f1"] = score_fields(answer, reference)
    return Result(
        id=output.id,
        arm=output.arm,
        output=output.output,
        stop=output.stop,
        tokens=output.tokens,
        prompt_tokens=output.prompt_tokens,
        seconds=output.seconds,
        category=example.category,
        group=example.group_key,
        scores=scores,
    )


def keeps_contract(text: str, contract: Contract) -> bool:
    """Whether the output keeps the contract as it stands."""
    return len(text) <= _LIMIT and not contract.find_faults(text.strip())


def is_exact(text: str, reference: str, contract: Contract) -> bool:
    """Equal after trimming, in composed characters; for JSON contracts equal as values, whatever the order of keys.

    Types count: 1, 1.0 and true differ.
    """
    expected = _parse(reference) if isinstance(contract, JsonContract) else None
    if expected is None:
        return bool(compose(text.strip()) == compose(reference.strip()))
    found = _parse(text)
    return found is not None and _canonical(found[0]) == _canonical(expected[0])


def score_fields(text: str, reference: str) -> float:
    """F1 over top-level (key, value) pairs; 0 when either is no object."""
    found, expected = _parse(text), _parse(reference)
    if found is None or expected is None or not isinstance(found[0], dict) or not isinstance(expected[0], dict):
        return 0.0
    ours = {(k, _canonical(v)) for k, v in found[0].items()}
    theirs = {(k, _canonical(v)) for k, v in expected[0].items()}
    return 2 * len(ours & theirs) / (len(ours) + len(theirs)) if ours or theirs else 1.0


def _parse(text: str) -> tuple[Any] | None:
    """The value of an answer in JSON, in a tuple; `None` for what the contract would not read."""
    try:
        return (parse_json(text.strip()),) if len(text) <= _LIMIT else None
    except ValueError:
        return None


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
