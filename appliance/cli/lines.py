"""Lines as people read them: wrapped with a hanging indent on a terminal, whole in a pipe, one error and two errors."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TextIO


def wrap(text: str, *, indent: int, stream: TextIO | None = None) -> str:
    """Each line in the width of the terminal, what follows it `indent` columns in; as it is where a program reads."""
    if not (stream or sys.stdout).isatty():
        return text
    width = max(shutil.get_terminal_size().columns, indent + 20)
    lead = " " * indent
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent=lead, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def show_example(*lines: str) -> str:
    """The end of a verb's help: commands to copy, with a word on what they do where they do not say it."""
    return "\n".join(("\b", "Example:", *(f"  {line}" for line in lines)))


def say_count(number: float, noun: str) -> str:
    """`1 error`, `2 errors`, `1.5 epochs`."""
    text = f"{number:,}".removesuffix(".0")
    return f"{text} {noun}" if number == 1 else f"{text} {noun}s"
