"""The chat template, rendered here once for checks, training and generation alike.

Rendering needs jinja2 and tokenizers only, not torch. What the families of templates disagree on
is found out when a template is loaded (`appliance.model.probes`): the form of contents, tool calls
and thoughts, whether thinking can be switched, and what is written around an answer. The mask of
trained tokens is in `appliance.model.mask`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from appliance.digest import digest_bytes, digest_json
from appliance.errors import ModelError, TrainingError
from appliance.example import Example, Message
from appliance.model.calls import CALL_FORMS, CallForm, build_call, read_tools
from appliance.model.environment import compile_template
from appliance.model.probes import NEVER, NO_FRAME, Contents, Frame, Thoughts, probe_template
from appliance.thinking import begins_thinking, join_thinking, split_thinking

Thinking = Literal["fixed", "off", "on"]
"""Whether a run's answers think or not; fixed where the template tells neither apart."""


@dataclass(frozen=True)
class ChatTemplate:
    """The compiled templates (with and without tools) and the tokenizer of one base model.

    `digest` is the SHA-256 of the bytes that templates and tokenizer were made from; `parting` are the added tokens
    at which the tokenizer parts a text, `longest_token` the characters of the longest one; `control` matches the
    control tokens; `switch` names the variable that turns thinking on and off, empty where there is none; `ends` are
    the stop tokens of an answer and of a call whose end is the next turn's beginning.
    """

    compiled: Any
    compiled_tools: Any
    tokenizer: Any
    constants: dict[str, str]
    stop_ids: frozenset[int]
    added_ids: frozenset[int]
    bos_id: int | None
    source: str
    digest: str
    parting: frozenset[int] = frozenset()
    longest_token: int = 0
    calls: CallForm | None = None
    switch: str = ""
    thinking: Thinking = "fixed"
    control: re.Pattern[str] = NEVER
    contents: Contents = "text"
    thoughts: Thoughts = "content"
    frame: Frame = NO_FRAME
    ends: tuple[int | None, int | None] = (None, None)

    def render(self, messages: Sequence[Message], *, prompt: bool, tools: str | None = None) -> str:
        """The conversation as text; with `prompt`, ending where the assistant begins to speak."""
        from jinja2 import TemplateError

        definitions = read_tools(tools)
        turns = self._build_turns(messages)
        switch = {self.switch: self.thinking == "on"} if self.switch else {}
        try:
            text = (self.compiled_tools if definitions else self.compiled).render(
                messages=turns, add_generation_prompt=prompt, tools=definitions, **self.constants, **switch
            )
        except (TemplateError, TypeError, ValueError) as fault:
            raise TrainingError(
                f"the chat template refused a conversation: {fault} (template of {self.source}); "
                "give the rows the turns that it knows, or choose another base model"
            ) from fault
        return str(text)

    def encode(self, text: str) -> Any:
        """Token ids and character offsets of rendered text; special tokens come from the text alone."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def find_tokens(self, text: str) -> list[str]:
        """The control tokens in a text of a row, in order: the model reads them as structure, not as text."""
        return self.control.findall(text)

    def read_answer(self, text: str) -> str:
        """What an assistant said, as a row has it: without the frame, a thought of it in `<think>...</think>`."""
        frame = self.frame
        said = text.removesuffix(frame.after)
        if frame.between and said.startswith(frame.opening) and frame.between in said:
            thought, _, answer = said.removeprefix(frame.opening).partition(frame.between)
            return join_thinking(thought, answer)
        return said.removeprefix(frame.before)

    def encode_prompt(
        self, messages: Sequence[Message], *, tools: str | None = None, is_direct: bool = False
    ) -> list[int]:
        """The token ids that generation starts from; `is_direct` begins the answer, where thinking is off.

        A base model that was not told to answer at once would think first in a channel (gpt-oss), and be cut off.
        """
        begun = self.frame.before if is_direct and self.thinking != "on" else ""
        return list(self.encode(self.render(messages, prompt=True, tools=tools) + begun).ids)

    def _build_turns(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as the template expects them: calls in one shape with ids, and tool turns that name their call."""
        form = self.calls or CALL_FORMS[0]
        turns: list[dict[str, Any]] = []
        waiting: list[dict[str, Any]] = []
        count = 0
        for message in messages:
            turn: dict[str, Any] = {"role": message.role} | self._build_content(message)
            if message.tool_calls:
                waiting = [
                    build_call(c, form=form, number=count + i) for i, c in enumerate(message.tool_calls, start=1)
                ]
                count += len(waiting)
                turn["tool_calls"] = list(waiting)
                if not message.content and form.empty == "none":
                    turn["content"] = None
            elif message.role == "tool" and waiting:
                call = waiting.pop(0)
                turn |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
            turns.append(turn)
        return turns

    def _build_content(self, message: Message) -> dict[str, Any]:
        """The content in the template's form, and the thought in its field where it has one."""
        content = message.content
        more: dict[str, str] = {}
        if self.thoughts != "content" and message.role == "assistant" and begins_thinking(content):
            thought, content = split_thinking(content)
            more[self.thoughts] = thought
        return {"content": [{"type": "text", "text": content}] if self.contents == "parts" else content, **more}


def load_template(folder: Path) -> ChatTemplate:
    """The template, tokenizer and stop tokens of a model folder, thinking off. Raises `ModelError`."""
    from tokenizers import Tokenizer

    config = _read_json(folder / "tokenizer_config.json")
    try:
        written = (folder / "tokenizer.json").read_bytes()
        tokenizer = Tokenizer.from_buffer(written)
    except Exception as fault:  # tokenizers raises bare Exception
        raise ModelError(f"{folder / 'tokenizer.json'}: cannot be read ({fault}); copy the model again") from fault
    tokenizer.no_truncation()
    tokenizer.no_padding()
    names = {n: _token_text(config.get(n)) for n in ("bos_token", "eos_token", "pad_token", "unk_token")}
    constants = {n: t for n, t in names.items() if t is not None}
    bos = constants.get("bos_token")
    plain, with_tools = _read_templates(folder, config)
    added = tokenizer.get_added_tokens_decoder()
    template = ChatTemplate(
        compiled=compile_template(plain),
        compiled_tools=compile_template(with_tools),
        tokenizer=tokenizer,
        constants=constants,
        stop_ids=_read_stop_ids(folder, tokenizer=tokenizer, eos=constants.get("eos_token")),
        added_ids=frozenset(added),
        bos_id=tokenizer.token_to_id(bos) if bos else None,
        source=str(folder),
        digest=digest_json([digest_bytes(written), plain, with_tools]),
        parting=frozenset(i for i, t in added.items() if not (t.normalized or t.lstrip or t.single_word)),
        longest_token=max((len(t.content) for t in added.values()), default=0),
    )
    return probe_template(template)


def fit_template(template: ChatTemplate, examples: Sequence[Example]) -> ChatTemplate:
    """Thinking on when an answer of the rows begins with a thinking block, else off; without the switch no change.

    Decided once for all prompts of a run, because a prompt must not depend on the answer to come.
    """
    thinks = any(begins_thinking(m.content) for e in examples for m in e.messages if m.role == "assistant")
    return set_thinking(template, "on" if thinks else "off")


def set_thinking(template: ChatTemplate, thinking: str | None) -> ChatTemplate:
    """The template with thinking "on", or else off; one without the switch stays as it is."""
    return template if template.thinking == "fixed" else replace(template, thinking="on" if thinking == "on" else "off")


def _read_templates(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """The default template and the one for rows with tools, which is mostly the same."""
    file = folder / "chat_template.jinja"
    text = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    named: dict[str, Any] = {}
    if isinstance(text, list):
        named = {str(t.get("name")): t.get("template") for t in text if isinstance(t, dict)}
        text = named.get("default")
    if not isinstance(text, str) or not text.strip():
        raise ModelError(f"{folder}: no chat template; use an instruction-tuned base model, or add chat_template.jinja")
    extra = folder / "additional_chat_templates" / "tool_use.jinja"
    with_tools = extra.read_text("utf-8") if extra.is_file() else named.get("tool_use")
    return text, with_tools if isinstance(with_tools, str) else text


def _read_stop_ids(folder: Path, *, tokenizer: Any, eos: str | None) -> frozenset[int]:
    """What ends generation: `generation_config.json`, else the tokenizer's EOS token."""
    value = _read_json(folder / "generation_config.json").get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not ids and eos is not None:
        ids = [tokenizer.token_to_id(eos)]
    if not ids or None in ids:
        raise ModelError(
            f"{folder}: no eos_token_id in generation_config.json and no eos_token; the model could not stop"
        )
    return frozenset(ids)


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as fault:
        raise ModelError(f"{path}: not JSON ({fault}); copy the model again") from fault
    return value if isinstance(value, dict) else {}
