"""Thinking in the form that rows have: a content that begins with `<think>...</think>`."""

from __future__ import annotations

import re

OPENED, CLOSED = "<think>", "</think>"
SCAFFOLD = re.compile(r"<think>\s*(</think>\s*)?$")
"""What some templates end a prompt with: a thinking block, open or already closed."""


def begins_thinking(content: str) -> bool:
    """Whether a content begins with a whole thinking block; one that mentions the tags elsewhere does not think."""
    return content.lstrip().startswith(OPENED) and CLOSED in content


def split_thinking(content: str, *, opened: bool = False) -> tuple[str, str]:
    """The reasoning and the answer of a content, both trimmed.

    Reasoning is what a content begins with in `<think>...</think>`, or, where the prompt has `opened` the
    block, what stands before `</think>`. Elsewhere the tags are text like any other.
    """
    if not (begins_thinking(content) or (opened and CLOSED in content)):
        return "", content.strip()
    before, _, after = content.partition(CLOSED)
    return before.strip().removeprefix(OPENED).strip(), after.strip()


def join_thinking(thought: str, answer: str) -> str:
    """The content whose reasoning and answer these are."""
    return f"{OPENED}\n{thought.strip()}\n{CLOSED}\n\n{answer.strip()}"


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends within a thinking block, so that the answer goes on from it."""
    scaffold = SCAFFOLD.search(prompt)
    return scaffold is not None and scaffold[1] is None


def drop_thinking(content: str) -> str:
    """The answer alone of a content that begins with thinking; any other content as it is."""
    return split_thinking(content)[1] if begins_thinking(content) else content
