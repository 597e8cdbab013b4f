"""What the families of chat templates disagree on, found out by rendering small conversations, never from names."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from appliance.errors import TrainingError
from appliance.example import Message
from appliance.model.calls import CALL_FORMS, CallForm, holds_call
from appliance.thinking import CLOSED, OPENED, join_thinking

if TYPE_CHECKING:
    from appliance.model.template import ChatTemplate

Contents = Literal["text", "parts"]
"""How a template wants contents: as text, or, with images in mind, as a list of parts."""

Thoughts = Literal["content", "reasoning_content", "thinking"]
"""Where a template looks for reasoning: in the content between tags, or in a field of its own."""

_SAID, _THOUGHT = "7316049258", "9064185327"
_CALL = {"name": "probe_tool", "arguments": {"city": "Paris", "days": 2}}
_TOOL = {"name": "probe_tool", "description": "d", "parameters": {"type": "object", "properties": {}}}
_ASKED, _CALLED, _RETURNED, _ANSWERED = (
    Message("user", "u"),
    Message("assistant", "", [_CALL]),
    Message("tool", "t"),
    Message("assistant", "a"),
)
NEVER = re.compile(r"(?!)")


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template writes around an answer besides white space and the tags of thinking.

    gpt-oss opens a channel `before` it, Command A puts tokens before and `after` it. `opening` stands before a thought
    and `between` a thought and the answer. All is empty for templates that write the answer and nothing else.
    """

    before: str = ""
    after: str = ""
    opening: str = ""
    between: str = ""


NO_FRAME = Frame()


def probe_template(template: ChatTemplate) -> ChatTemplate:
    """The template with all that rendering tells of it."""
    template = replace(template, contents=_find_contents(template))
    template = replace(template, calls=_find_calls(template), control=_find_control(template))
    if switch := _find_switch(template):
        template = replace(template, switch=switch, thinking="off")
    template = replace(template, thoughts=_find_thoughts(template))
    template = replace(template, frame=_find_frame(template), ends=_find_ends(template))
    return replace(template, thinking="off") if template.frame.between else template


def _render(template: ChatTemplate, *turns: Message, prompt: bool = False, tools: bool = False) -> str:
    """The rendering, empty where the template refuses the conversation."""
    try:
        return template.render(turns, prompt=prompt, tools=json.dumps([_TOOL]) if tools else None)
    except TrainingError:
        return ""


def _find_contents(template: ChatTemplate) -> Contents:
    """Text, unless only parts are shown."""
    for form in ("text", "parts"):
        text = _render(replace(template, contents=form), Message("user", _SAID), Message("assistant", _THOUGHT))
        if _SAID in text and _THOUGHT in text:
            return form
    return "text"


def _find_calls(template: ChatTemplate) -> CallForm | None:
    """The first form in which the template shows a probe call whole; `None` when it shows no calls."""
    turns = (_ASKED, _CALLED, _RETURNED, _ANSWERED)
    shown = (f for f in CALL_FORMS if holds_call(_render(replace(template, calls=f), *turns, tools=True), _CALL))
    return next(shown, None)


def _find_switch(template: ChatTemplate) -> str:
    """The variable that lets a prompt read differently with thinking on and off; empty where none does."""
    for name in ("enable_thinking", "thinking"):
        off, on = (_render(replace(template, switch=name, thinking=t), _ASKED, prompt=True) for t in ("off", "on"))
        if off and on and off != on:
            return name
    return ""


def _find_control(template: ChatTemplate) -> re.Pattern[str]:
    """Special tokens, stop tokens, and the added tokens that the template writes around a plain exchange.

    The last, because not all turn tokens are marked special (DeepSeek's are not). The tags of thinking are
    what a row writes itself, as those of tools are; white space is text (Gemma has added tokens of it).
    """
    added = template.tokenizer.get_added_tokens_decoder()
    exchange = _render(template, _ASKED, _ANSWERED) + _render(template, _ASKED, prompt=True)
    written = set(template.encode(exchange).ids)
    texts = {t.content for i, t in added.items() if t.special or i in written}
    texts |= {template.decode([i]) for i in template.stop_ids}
    found = sorted((t for t in texts - {OPENED, CLOSED} if t.strip()), key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, found))) if found else NEVER


def _find_thoughts(template: ChatTemplate) -> Thoughts:
    """The content, unless a field of its own is shown in another way: then the tags would be text to the template."""
    if template.thinking != "fixed":
        template = replace(template, thinking="on")
    turn = Message("assistant", join_thinking(_THOUGHT, _SAID))
    plain = _render(template, _ASKED, turn)
    for field in ("reasoning_content", "thinking"):
        text = _render(replace(template, thoughts=field), _ASKED, turn)
        if _THOUGHT in text and text != plain:
            return field
    return "content"


def _find_frame(template: ChatTemplate) -> Frame:
    """From the renderings of an answer and, where thoughts have a field, of one with a thought.

    A template that writes no generation prompt has none: what stands before an answer is then the turn's own head.
    """
    if _render(template, _ASKED, prompt=True) == _render(template, _ASKED):
        return NO_FRAME
    before, _, rest = _render_tail(template, Message("assistant", _SAID)).partition(_SAID)
    after = re.split("|".join(re.escape(template.decode([i])) for i in template.stop_ids), rest, maxsplit=1)[0]
    opening = between = ""
    if template.thoughts != "content":
        tail = _render_tail(template, Message("assistant", join_thinking(_THOUGHT, _SAID)))
        opening, _, rest = tail.partition(_THOUGHT)
        between = rest.partition(_SAID)[0]
    return Frame(*(text if template.find_tokens(text) else "" for text in (before, after, opening, between)))


def _render_tail(template: ChatTemplate, answer: Message) -> str:
    """What the template adds to the prompt for this answer; empty where it writes the prompt otherwise then."""
    prompt, whole = _render(template, _ASKED, prompt=True), _render(template, _ASKED, answer)
    return whole[len(prompt) :] if whole.startswith(prompt) else ""


def _find_ends(template: ChatTemplate) -> tuple[int | None, int | None]:
    """The stop tokens that begin the turn after an answer and after a call: GLM ends a turn with the next one."""

    def find(turn: Message, following: Message) -> int | None:
        own = _render(template, _ASKED, turn, tools=bool(turn.tool_calls))
        both = _render(template, _ASKED, turn, following, tools=bool(turn.tool_calls))
        ids = template.encode(both[len(own) :]).ids if own and both.startswith(own) else []
        return ids[0] if ids and ids[0] in template.stop_ids else None

    return find(_ANSWERED, _ASKED), find(_CALLED, _RETURNED)
