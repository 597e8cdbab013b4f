"""The mask: which tokens of a conversation carry loss.

The law: what is trained at a turn is exactly what inference would have to produce there. The
tokens before it are those of the inference prompt, byte for byte; the tokens of the turn are what
the template adds for the answer, up to and with the stop token. No generation markers are needed.

Templates rewrite history: they strip the thinking of earlier turns, or move the system text into
the last user turn. Then one sequence cannot hold every turn as inference would see it, and the
conversation becomes several token rows; every assistant turn is trained exactly once. What cannot
be brought under the law is refused with its reason.
"""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from appliance.errors import TrainingError
from appliance.example import Example, Message
from appliance.model.calls import holds_call, read_tools
from appliance.model.growing import GrowingText
from appliance.model.template import ChatTemplate
from appliance.thinking import CLOSED, OPENED, SCAFFOLD, begins_thinking, opens_thinking, split_thinking

_EMPTY_THINKING = re.compile(r"\s*<think>\s*</think>\s*")
_THINKING = re.compile(r"\s*(?:<think>)?\s*(.*?</think>\s*)", re.DOTALL)
_MARK = "7316049258{:04}"

Encode = Callable[[str], list[int]]


class TokenRow(msgspec.Struct, frozen=True):
    """One sequence of tokens; `spans` are the trained half-open ranges, in order; `id` is the example's."""

    id: str
    input_ids: list[int]
    spans: list[tuple[int, int]]

    @property
    def trained(self) -> int:
        """How many tokens carry loss."""
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True, slots=True)
class _Turn:
    """One assistant turn: the tokens inference starts from, and those it must produce."""

    prompt: list[int]
    answer: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.answer


def render_rows(example: Example, template: ChatTemplate) -> tuple[TokenRow, ...]:
    """Token rows in which every assistant turn of the example is trained once; mostly one row.

    Raises `TrainingError` naming the row and the rule that it breaks.
    """
    try:
        _check_forged(example, template)
        _check_shown(example, template)
        numbers = [i for i, m in enumerate(example.messages) if m.role == "assistant"]
        left = _build_turns(example, numbers, template)
    except TrainingError as fault:
        raise fault if str(fault).startswith("row ") else TrainingError(f"row {example.id}: {fault}") from fault
    if not left:
        raise _refuse(example, "no assistant turn, so nothing would be trained", template)
    rows: list[TokenRow] = []
    while left:
        ids = left[-1].ids
        held = [t for t in left if ids[: len(t.ids)] == t.ids]
        spans = [(len(t.prompt), len(t.ids)) for t in held]
        row = TokenRow(id=example.id, input_ids=ids, spans=spans)
        _check_row(example, row, template)
        rows.insert(0, row)
        left = [t for t in left if t not in held]
    return tuple(rows)


def render_row(example: Example, template: ChatTemplate) -> TokenRow:
    """The token row of an example that needs only one. Raises `TrainingError`, also when it needs several."""
    row, *more = render_rows(example, template)
    if more:
        raise _refuse(example, "the template rewrites earlier turns, so that one token row cannot hold them", template)
    return row


def _build_turns(example: Example, numbers: Sequence[int], template: ChatTemplate) -> list[_Turn]:
    """The assistant turns. Of several, what they begin with alike is encoded once, and proven for the longest."""
    if len(numbers) > 1:
        grown = GrowingText(template)
        with contextlib.suppress(TrainingError):  # it is raised again below, or was none
            turns = [_build_turn(example, n, template, encode=grown.encode) for n in numbers]
            if grown.is_exact():
                return turns
    return [_build_turn(example, n, template, encode=lambda text: list(template.encode(text).ids)) for n in numbers]


def _build_turn(example: Example, number: int, template: ChatTemplate, *, encode: Encode) -> _Turn:
    """The tokens of one assistant turn, as inference would meet it."""
    stops = (template.decode([s]) for s in sorted(template.stop_ids))
    held = next((s for s in stops if s and s in example.messages[number].content), None)
    if held is not None:
        raise _refuse(example, f"the answer of turn {number + 1} holds the stop token {held!r} in its text", template)
    before = template.render(example.messages[:number], prompt=True, tools=example.tools)
    tail = _find_tail(example, number, prompt=before, template=template)
    prompt = encode(before)
    joined = encode(before + tail)
    answer = _part_answer(example, number, prompt=prompt, joined=joined, tail=tail, template=template)
    stop = next((i for i, token in enumerate(answer) if token in template.stop_ids), None)
    end = template.ends[bool(example.messages[number].tool_calls)]
    if stop is None and end is not None:
        stop, answer = len(answer), [*answer, end]
    if stop is None:
        raise _refuse_ending(example, number, answer, template)
    _check_said(example, number, answer[:stop], opened=opens_thinking(before), template=template)
    return _Turn(prompt=prompt, answer=answer[: stop + 1])


def _find_tail(example: Example, number: int, *, prompt: str, template: ChatTemplate) -> str:
    """What the template adds to the prompt for this turn, up to the end of the rendering.

    A template may show system text only while a user turn is the last one (Mistral): then the same
    conversation without it says how the answer is written, and the prompt stays what inference sees.
    """
    messages = example.messages[: number + 1]
    own = template.render(messages, prompt=False, tools=example.tools)
    if own.startswith(prompt):
        return own[len(prompt) :]
    if messages[0].role == "system" and number > 1:
        bare = template.render(messages[1:-1], prompt=True, tools=example.tools)
        own_bare = template.render(messages[1:], prompt=False, tools=example.tools)
        if own_bare == own and own.startswith(bare):
            return own_bare[len(bare) :]
    return _continue_thinking(example, number, prompt=prompt, own=own, template=template)


def _continue_thinking(example: Example, number: int, *, prompt: str, own: str, template: ChatTemplate) -> str:
    """The answer after a prompt that ends with a thinking block.

    The template leaves that block out once the answer is there: an empty one (Qwen 3), or an open
    one whose thinking it throws away (DeepSeek R1). Inference sees it, so it stays in the prompt.
    """
    content, turn = example.messages[number].content, f"turn {number + 1}"
    scaffold = SCAFFOLD.search(prompt)
    if scaffold is None or not own.startswith(prompt[: scaffold.start()]):
        raise _refuse(example, f"the prompt of {turn} is not a prefix of the rendering of that turn", template)
    rest = own[scaffold.start() :]
    thinks = bool(split_thinking(content, opened=template.thinking == "fixed" and scaffold[1] is None)[0])
    if scaffold[1] is not None:
        if thinks:
            raise _refuse(example, f"the prompt of {turn} closes the thinking block, but the answer thinks", template)
        empty = _EMPTY_THINKING.match(rest)
        return rest[empty.end() :] if empty else rest
    if not thinks:
        what = (
            f"the prompt of {turn} opens a thinking block, but the answer does not think: inference would think first; "
            "let the answer begin with <think>...</think>"
        )
        raise _refuse(example, what, template)
    if CLOSED in rest:
        return rest.lstrip().removeprefix("<think>").lstrip()
    kept = _THINKING.match(content)
    return (kept[1] if kept else "") + rest.lstrip()


def _part_answer(
    example: Example, number: int, *, prompt: list[int], joined: list[int], tail: str, template: ChatTemplate
) -> list[int]:
    """The tokens after the prompt's; where a merge would cross the border, the answer's are made apart.

    Inference cannot change the tokens of the prompt, so a token that holds both is never trained.
    """
    if joined[: len(prompt)] == prompt:
        return joined[len(prompt) :]
    text = template.decode(joined)
    mark = template.decode([min(template.stop_ids)])
    for apart in (list(template.encode(tail).ids), list(template.encode(mark + tail).ids)[1:]):
        if template.decode(prompt + apart) == text:
            return apart
    what = f"the tokenizer cannot part the answer of turn {number + 1} from its prompt"
    raise _refuse(example, what, template)


def _check_said(example: Example, number: int, said: list[int], *, opened: bool, template: ChatTemplate) -> None:
    """The trained tokens, decoded, are the answer: its thinking, its text and its tool calls."""
    message, text = example.messages[number], template.read_answer(template.decode(said))
    goes_on = opened and template.thinking == "fixed"  # with a switch, thinking is what begins with the tag
    wanted, spoken = (
        tuple(unicodedata.normalize("NFC", part) for part in split_thinking(t, opened=is_open))
        for t, is_open in ((message.content, goes_on), (text, opened))
    )
    if not message.tool_calls:
        if spoken == wanted:
            return
        if wanted[1] and spoken[1].startswith(wanted[1]) and any(t in template.added_ids for t in said):
            raise _refuse_ending(example, number, said, template)
        what = f"the trained text of turn {number + 1} is {text[:60]!r}, not the answer"
        raise _refuse(example, _find_tag(message.content, number, opened=goes_on) or what, template)
    if spoken[0] != wanted[0] or wanted[1] not in spoken[1]:
        what = f"the text beside the tool calls of turn {number + 1} is not trained"
        raise _refuse(example, _find_tag(message.content, number, opened=goes_on) or what, template)
    whole = unicodedata.normalize("NFC", text)
    for call in message.tool_calls:
        if not holds_call(whole, call):
            what = (
                f"the trained text of turn {number + 1} is {text[:60]!r}, without the tool call {json.dumps(call)[:60]}"
            )
            raise _refuse(example, what, template)


def _find_tag(content: str, number: int, *, opened: bool) -> str | None:
    """What is wrong with an answer that a template took apart at a tag in its text; `None` without such a tag."""
    if CLOSED not in content or opened or begins_thinking(content):
        return None
    return (
        f"the template takes what stands before {CLOSED!r} in the answer of turn {number + 1} for thinking; "
        f"let the answer begin with {OPENED}...{CLOSED}, or write the tag in another way"
    )


def _check_forged(example: Example, template: ChatTemplate) -> None:
    """No text of the row makes a turn that is none of its own: a turn takes a stop token and another control token."""
    stops = {template.decode([i]) for i in template.stop_ids}
    for number, message in enumerate(example.messages, start=1):
        found = dict.fromkeys(template.find_tokens(message.content))
        if len(found) > 1 and not stops.isdisjoint(found):
            what = (
                f"turn {number} ({message.role}) holds {' and '.join(map(repr, found))} in its text: the model would "
                "see a turn there that the row does not have; make it one of the row, or write the tokens otherwise"
            )
            raise _refuse(example, what, template)


def _check_shown(example: Example, template: ChatTemplate) -> None:
    """Nothing that the row tells the model is left out by the template without a word.

    Each content and each name of a tool is rendered with a mark of its own behind it: without one, words that
    stand in another turn too, or in the template itself, would be found though they were left out. Marks are
    digits, which no template trims, folds or escapes; they follow, because templates ask how a content begins.
    """
    last = max((i for i, m in enumerate(example.messages) if m.role == "assistant"), default=0)
    turns = [_mark_turn(m, number) for number, m in enumerate(example.messages[:last], start=1)]
    given = read_tools(example.tools) or []
    tools = [_mark_tool(t, last + number) for number, t in enumerate(given, start=1)]
    text = template.render(turns, prompt=True, tools=json.dumps(tools, ensure_ascii=False) if tools else None)
    for number, turn in enumerate(turns, start=1):
        said = turn.content.lstrip()
        if turn.role != "assistant" and said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
            raise _refuse(example, f"the template leaves out turn {number} ({turn.role}) at turn {last + 1}", template)
    if any(m.tool_calls for m in example.messages) and template.calls is None:
        raise _refuse(example, "the template renders no tool calls", template)
    for tool, marked in zip(given, tools, strict=True):
        if (name := _read_name(marked)) is None or name not in text:
            raise _refuse(example, f"the template leaves out the definition of tool {_read_name(tool)}", template)


def _mark_turn(message: Message, number: int) -> Message:
    """The turn with a mark at its end; an empty one says nothing, and answers have a check of their own."""
    if message.role == "assistant" or not message.content.strip():
        return message
    return msgspec.structs.replace(message, content=message.content + _MARK.format(number))


def _mark_tool(tool: dict[str, Any], number: int) -> dict[str, Any]:
    """The definition with a mark at the end of its name, if it has one."""
    name = _read_name(tool)
    return tool if name is None else {**tool, "function": {**tool["function"], "name": name + _MARK.format(number)}}


def _read_name(tool: dict[str, Any]) -> str | None:
    function = tool["function"]
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _check_row(example: Example, row: TokenRow, template: ChatTemplate) -> None:
    ids = row.input_ids
    if template.bos_id is not None and ids[:2] == [template.bos_id, template.bos_id]:
        raise _refuse(example, "two BOS tokens lead the row", template)
    if row.spans[0][0] < 1:
        raise _refuse(example, "no token, or every token, would be trained: the prompt is empty", template)


def _refuse_ending(example: Example, number: int, answer: list[int], template: ChatTemplate) -> TrainingError:
    """No token ends the turn at which generation would stop; name the one that the template ends it with."""
    place = max((i for i, token in enumerate(answer) if token in template.added_ids), default=None)
    what = f"no stop token ends turn {number + 1}"
    if place is not None and not template.decode(answer[place + 1 :]).strip():
        what += (
            f": the template ends it with {template.decode([answer[place]])!r} (token {answer[place]}), where nothing "
            f"would stop; eos_token_id in generation_config.json is {sorted(template.stop_ids)}: add {answer[place]}"
        )
    return _refuse(example, what, template)


def _refuse(example: Example, what: str, template: ChatTemplate) -> TrainingError:
    return TrainingError(
        f"row {example.id}: {what} (template of {template.source}); "
        "training on it would teach the wrong tokens: correct the row or choose a base model with a plain chat template"
    )
