"""What generation writes and what scoring makes of it: one JSON line per row and arm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from appliance.errors import EvaluationError
from appliance.model import ChatTemplate
from appliance.thinking import OPENED, opens_thinking

_SCAFFOLD_TOKENS = 16


class Output(msgspec.Struct, frozen=True):
    """One answer: its text without the stop token, and how it ended."""

    id: str
    arm: str
    output: str
    stop: Literal["eos", "length"]
    tokens: int
    prompt_tokens: int
    seconds: float


class Result(msgspec.Struct, frozen=True):
    """One scored answer; scores are between 0 and 1."""

    id: str
    arm: str
    output: str
    stop: Literal["eos", "length"]
    tokens: int
    prompt_tokens: int
    seconds: float
    category: str | None
    group: str
    scores: dict[str, float]


def read_said(said: Sequence[int], *, asked: Sequence[int], template: ChatTemplate) -> str:
    """Tokens as a row would have them, also where they go on from a thinking block that the prompt opened."""
    text = template.read_answer(template.decode(said))
    opened = opens_thinking(template.decode(asked[-_SCAFFOLD_TOKENS:]))
    return f"{OPENED}\n{text}" if opened else text


def decode_outputs(content: bytes) -> tuple[Output, ...]:
    """The outputs in a file; a last line without its newline was torn by a kill and is left out."""
    *lines, _torn = content.split(b"\n")
    try:
        return tuple(msgspec.json.decode(line, type=Output) for line in lines)
    except msgspec.DecodeError as fault:
        raise EvaluationError(
            f"outputs.jsonl is damaged ({fault}); delete it and run the same command again"
        ) from fault


def encode_results(results: Iterable[Result]) -> bytes:
    """The results as JSONL."""
    return b"".join(msgspec.json.encode(r) + b"\n" for r in results)


def decode_results(content: bytes) -> tuple[Result, ...]:
    """The results that `encode_results` wrote."""
    return tuple(msgspec.json.decode(line, type=Result) for line in content.splitlines())
