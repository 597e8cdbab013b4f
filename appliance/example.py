"""One row of a dataset: a conversation whose last turn is the answer to learn.

The types are frozen and know nothing of files or models. A row is identified by the hash of its
content (`content_hash`), never by its position or its id.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Literal

import msgspec

from appliance.digest import digest_json
from appliance.thinking import begins_thinking, drop_thinking

Role = Literal["system", "user", "assistant", "tool"]
Provenance = Literal["human", "synthetic", "program", "general"]

_SPACE = re.compile(r"\s+")


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One turn of a conversation."""

    role: Role
    content: str
    tool_calls: list[Any] | None = None


class Example(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One row: `messages` ends with the assistant turn that is the reference answer."""

    id: Annotated[str, msgspec.Meta(min_length=1)]
    messages: Annotated[tuple[Message, ...], msgspec.Meta(min_length=1)]
    provenance: Provenance
    tools: str | None = None
    category: str | None = None
    group: str | None = None
    meta: dict[str, Any] = {}

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the reference answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The content of the last assistant turn, without the thinking that it may begin with."""
        return drop_thinking(self.messages[-1].content)

    @property
    def thinks(self) -> bool:
        """Whether the reference answer begins with thinking."""
        return begins_thinking(self.messages[-1].content)

    @property
    def request(self) -> str:
        """The content of the last user turn (empty when there is none)."""
        users = [m.content for m in self.prompt if m.role == "user"]
        return users[-1] if users else ""

    @property
    def content_hash(self) -> str:
        """SHA-256 of messages and tools: what the row says, whatever its id or category."""
        return digest_json([msgspec.to_builtins(self.messages), self.tools])

    @property
    def normalised_prompt(self) -> str:
        """The prompt's user and tool turns under NFKC, case folding and single spaces."""
        turns = (m.content for m in self.prompt if m.role != "system")
        return "\n".join(normalise_text(t) for t in turns)

    @property
    def group_key(self) -> str:
        """What must stay on one side of the split: the given group, else the normalised prompt."""
        return f"group:{self.group}" if self.group is not None else f"prompt:{self.normalised_prompt}"


def normalise_text(text: str) -> str:
    """NFKC, case-folded, runs of white space as one space, trimmed."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def decode_examples(content: bytes) -> tuple[Example, ...]:
    """The rows of a JSONL file this product wrote itself. Raises `msgspec.DecodeError`."""
    return tuple(msgspec.json.decode(line, type=Example) for line in content.splitlines() if line.strip())


def encode_examples(examples: tuple[Example, ...]) -> bytes:
    """The rows as JSONL, one canonical line each."""
    return b"".join(msgspec.json.encode(e) + b"\n" for e in examples)
