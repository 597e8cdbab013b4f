"""The chat template, rendered here once for checks, training and generation alike.

Rendering needs jinja2 and tokenizers only, not torch. What the families of templates disagree on
is found out when a template is loaded, by rendering a small conversation, and never guessed from
names: whether tool arguments go in as objects or as text, and whether thinking can be switched.
The mask of trained tokens is in `appliance.model.mask`.
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
from appliance.model.environment import compile_template

Thinking = Literal["fixed", "off", "on"]
"""Whether the template has a switch for thinking, and how it is set for every prompt of a run."""

OPENED, CLOSED = "<think>", "</think>"
_SPACE = re.compile(r"\s+")
_NEVER = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template wants tool calls: arguments as an object or as JSON text, no content as "" or none."""

    arguments: Literal["object", "text"]
    empty: Literal["text", "none"]


_FORMS = tuple(CallForm(a, e) for a in ("object", "text") for e in ("text", "none"))
_PROBE_CALL = {"name": "probe_tool", "arguments": {"city": "Paris", "days": 2}}
_PROBE_TOOL = {"name": "probe_tool", "description": "d", "parameters": {"type": "object", "properties": {}}}
_PROBE = (
    Message("user", "u"),
    Message("assistant", "", [_PROBE_CALL]),
    Message("tool", "t"),
    Message("assistant", "a"),
)


@dataclass(frozen=True)
class ChatTemplate:
    """The compiled templates (with and without tools) and the tokenizer of one base model.

    `digest` is the SHA-256 of the bytes that templates and tokenizer were made from; `control` matches the
    control tokens.
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
    calls: CallForm | None = None
    thinking: Thinking = "fixed"
    control: re.Pattern[str] = _NEVER

    def render(self, messages: Sequence[Message], *, prompt: bool, tools: str | None = None) -> str:
        """The conversation as text; with `prompt`, ending where the assistant begins to speak."""
        from jinja2 import TemplateError

        definitions = read_tools(tools)
        turns = _build_turns(messages, form=self.calls or _FORMS[0])
        switch = (
            {} if self.thinking == "fixed" else dict.fromkeys(("enable_thinking", "thinking"), self.thinking == "on")
        )
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

    def encode_prompt(self, messages: Sequence[Message], *, tools: str | None = None) -> list[int]:
        """The token ids that generation starts from."""
        return list(self.encode(self.render(messages, prompt=True, tools=tools)).ids)


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
    template = ChatTemplate(
        compiled=compile_template(plain),
        compiled_tools=compile_template(with_tools),
        tokenizer=tokenizer,
        constants=constants,
        stop_ids=_read_stop_ids(folder, tokenizer=tokenizer, eos=constants.get("eos_token")),
        added_ids=frozenset(tokenizer.get_added_tokens_decoder()),
        bos_id=tokenizer.token_to_id(bos) if bos else None,
        source=str(folder),
        digest=digest_json([digest_bytes(written), plain, with_tools]),
    )
    return replace(
        template,
        calls=_find_call_form(template),
        thinking="off" if _can_switch(template) else "fixed",
        control=_find_control(template),
    )


def fit_template(template: ChatTemplate, examples: Sequence[Example]) -> ChatTemplate:
    """Thinking on when an answer of the rows begins with a thinking block, else off; without the switch no change.

    Decided once for all prompts of a run, because a prompt must not depend on the answer to come.
    """
    thinks = any(begins_thinking(m.content) for e in examples for m in e.messages if m.role == "assistant")
    return set_thinking(template, "on" if thinks else "off")


def begins_thinking(content: str) -> bool:
    """Whether a content begins with a whole thinking block; one that mentions the tags elsewhere does not think."""
    return content.lstrip().startswith(OPENED) and CLOSED in content


def set_thinking(template: ChatTemplate, thinking: str | None) -> ChatTemplate:
    """The template with thinking "on", or else off; one without the switch stays as it is."""
    return template if template.thinking == "fixed" else replace(template, thinking="on" if thinking == "on" else "off")


def holds_call(text: str, call: Any) -> bool:
    """Whether a rendering says a tool call: its name, and its arguments as one JSON text or value by value."""
    name, arguments = _read_call(call)
    if name not in text:
        return False
    squeezed, wanted = _SPACE.sub("", text), _SPACE.sub("", json.dumps(arguments, ensure_ascii=False))
    if wanted in squeezed:
        return True
    mangled = (_SPACE.sub("", repr(arguments)), json.dumps(wanted, ensure_ascii=False)[1:-1])
    return not any(m in squeezed for m in mangled) and all(leaf in text for leaf in _list_leaves(arguments))


def _list_leaves(value: Any) -> list[str]:
    """Keys and scalars of a JSON value as a template would write them one by one."""
    if isinstance(value, dict):
        return [leaf for k, v in value.items() for leaf in (str(k), *_list_leaves(v))]
    if isinstance(value, list):
        return [leaf for v in value for leaf in _list_leaves(v)]
    return [value if isinstance(value, str) else json.dumps(value)]


def read_tools(tools: str | None) -> list[Any] | None:
    """The definitions as templates expect them, `None` without any. Raises `TrainingError` for another form."""
    try:
        value = json.loads(tools) if tools else None
    except ValueError as fault:
        raise TrainingError(f"tools is not JSON ({fault}); write a JSON list of tool definitions") from fault
    if value is not None and not (isinstance(value, list) and all(isinstance(v, dict) for v in value)):
        raise TrainingError(f"tools is {tools[:60] if tools else ''!r}; expected a JSON list of tool definitions")
    return [v if "function" in v else {"type": "function", "function": v} for v in value] if value else None


def _build_turns(messages: Sequence[Message], *, form: CallForm) -> list[dict[str, Any]]:
    """Messages as templates expect them: calls in one shape with ids, and tool turns that name their call."""
    turns: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []
    count = 0
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            waiting = [_build_call(c, form=form, number=count + i) for i, c in enumerate(message.tool_calls, start=1)]
            count += len(waiting)
            turn["tool_calls"] = list(waiting)
            if not message.content and form.empty == "none":
                turn["content"] = None
        elif message.role == "tool" and waiting:
            call = waiting.pop(0)
            turn |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
        turns.append(turn)
    return turns


def _build_call(call: Any, *, form: CallForm, number: int) -> dict[str, Any]:
    """One call in OpenAI's shape; an id of nine characters where the row has none (Mistral wants nine)."""
    name, arguments = _read_call(call)
    if form.arguments == "text" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    given = call.get("id")
    return {
        "id": given if isinstance(given, str) else f"call{number:05d}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _read_call(call: Any) -> tuple[str, Any]:
    """Name and arguments; arguments given as JSON text are read, so that no template encodes them twice."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise TrainingError(
            f"tool call {json.dumps(call)[:60]}: no name; expected "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}'
        )
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return name, arguments
    return name, arguments


def _find_call_form(template: ChatTemplate) -> CallForm | None:
    """The first form in which the template shows a probe call whole; `None` when it shows no calls."""
    for form in _FORMS:
        try:
            text = replace(template, calls=form).render(_PROBE, prompt=False, tools=json.dumps([_PROBE_TOOL]))
        except TrainingError:
            continue
        if holds_call(text, _PROBE_CALL):
            return form
    return None


def _can_switch(template: ChatTemplate) -> bool:
    """Whether a prompt reads differently with thinking on and off."""
    try:
        off, on = (replace(template, thinking=t).render(_PROBE[:1], prompt=True) for t in ("off", "on"))
    except TrainingError:
        return False
    return off != on


def _find_control(template: ChatTemplate) -> re.Pattern[str]:
    """Special tokens, stop tokens, and the added tokens that the template writes around a plain exchange.

    The last, because not all turn tokens are marked special (DeepSeek's are not). The tags of thinking are
    what a row writes itself, as those of tools are; white space is text (Gemma has added tokens of it).
    """
    added = template.tokenizer.get_added_tokens_decoder()
    try:
        exchange = template.render((_PROBE[0], _PROBE[-1]), prompt=False) + template.render(_PROBE[:1], prompt=True)
    except TrainingError:
        exchange = ""
    written = set(template.encode(exchange).ids)
    texts = {t.content for i, t in added.items() if t.special or i in written}
    texts |= {template.decode([i]) for i in template.stop_ids}
    found = sorted((t for t in texts - {OPENED, CLOSED} if t.strip()), key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, found))) if found else _NEVER


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
