"""The chat template, rendered here once for checks, training and generation alike.

Rendering needs jinja2 and tokenizers only, not torch. The mask of trained tokens does not depend
on generation markers in the template: an assistant turn is what the rendering of a conversation
adds to the rendering of its prompt. Whatever breaks that rule is refused, never guessed:

* the inference prompt must be a prefix of the training text, byte for byte and token for token;
* every assistant turn must give one trained span that contains its content;
* every trained span must end with a stop token, or the model never learns to stop.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from appliance.errors import ModelError, TrainingError
from appliance.example import Example, Message


class TokenRow(msgspec.Struct, frozen=True):
    """One example as tokens; `spans` are the trained half-open ranges, in order."""

    id: str
    input_ids: list[int]
    spans: list[tuple[int, int]]

    @property
    def trained(self) -> int:
        """How many tokens carry loss."""
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True)
class ChatTemplate:
    """The compiled template and tokenizer of one base model."""

    compiled: Any
    tokenizer: Any
    constants: dict[str, str]
    stop_ids: frozenset[int]
    bos_id: int | None
    source: str

    def render(self, messages: Sequence[Message], *, prompt: bool, tools: str | None = None) -> str:
        """The conversation as text; with `prompt`, ending where the assistant begins to speak."""
        from jinja2 import TemplateError

        turns = [{k: v for k, v in msgspec.to_builtins(m).items() if v is not None} for m in messages]
        try:
            text = self.compiled.render(
                messages=turns,
                add_generation_prompt=prompt,
                tools=json.loads(tools) if tools else None,
                **self.constants,
            )
        except (TemplateError, TypeError, ValueError) as fault:
            raise TrainingError(f"{self.source}: chat template refused a conversation: {fault}") from fault
        return str(text)

    def encode(self, text: str) -> Any:
        """Token ids and character offsets of rendered text; special tokens come from the text alone."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def encode_prompt(self, messages: Sequence[Message], *, tools: str | None = None) -> list[int]:
        """The token ids that generation starts from."""
        return list(self.encode(self.render(messages, prompt=True, tools=tools)).ids)


def load_template(folder: Path) -> ChatTemplate:
    """The template, tokenizer and stop tokens of a model folder. Raises `ModelError`."""
    from tokenizers import Tokenizer

    config = _read_json(folder / "tokenizer_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as fault:  # tokenizers raises bare Exception
        raise ModelError(f"{folder / 'tokenizer.json'}: cannot be read ({fault}); copy the model again") from fault
    tokenizer.no_truncation()
    tokenizer.no_padding()
    names = {n: _token_text(config.get(n)) for n in ("bos_token", "eos_token", "pad_token", "unk_token")}
    constants = {n: t for n, t in names.items() if t is not None}
    stops = _stop_ids(folder, tokenizer=tokenizer, eos=constants.get("eos_token"))
    bos = constants.get("bos_token")
    return ChatTemplate(
        compiled=_compile(_template_text(folder, config)),
        tokenizer=tokenizer,
        constants=constants,
        stop_ids=stops,
        bos_id=tokenizer.token_to_id(bos) if bos else None,
        source=str(folder),
    )


def render_row(example: Example, template: ChatTemplate) -> TokenRow:
    """Tokens and trained spans of one example. Raises `TrainingError` naming the row and the rule."""
    full = template.render(example.messages, prompt=False, tools=example.tools)
    encoding = template.encode(full)
    ids = list(encoding.ids)
    turns = [i for i, m in enumerate(example.messages) if m.role == "assistant"]
    spans = [_find_span(example, turn, template=template, full=full, encoding=encoding) for turn in turns]
    _check_bos(example, ids, template)
    prompt = template.encode_prompt(example.prompt, tools=example.tools)
    if ids[: len(prompt)] != prompt:
        raise _refuse(example, "the tokens of the inference prompt are not a prefix of the training tokens", template)
    if not spans or sum(end - start for start, end in spans) >= len(ids):
        raise _refuse(example, "no token, or every token, would be trained", template)
    return TokenRow(id=example.id, input_ids=ids, spans=spans)


def _find_span(example: Example, turn: int, *, template: ChatTemplate, full: str, encoding: Any) -> tuple[int, int]:
    """The token range of one assistant turn: from the end of its prompt to its stop token."""
    before = template.render(example.messages[:turn], prompt=True, tools=example.tools)
    if not full.startswith(before):
        raise _refuse(example, f"the prompt of turn {turn + 1} is not a prefix of the whole rendering", template)
    starts = [i for i, (begin, end) in enumerate(encoding.offsets) if begin >= len(before) and end > begin]
    if not starts or encoding.offsets[starts[0]][0] != len(before):
        raise _refuse(example, f"no token begins where the answer of turn {turn + 1} begins", template)
    start = starts[0]
    stop = next((i for i in range(start, len(encoding.ids)) if encoding.ids[i] in template.stop_ids), None)
    if stop is None:
        raise _refuse(example, f"no stop token ends turn {turn + 1}", template)
    said = full[len(before) : encoding.offsets[stop][0]]
    content = example.messages[turn].content
    if said.strip() != content.strip():
        raise _refuse(example, f"the trained text of turn {turn + 1} is {said[:60]!r}, not the answer", template)
    return start, stop + 1


def _check_bos(example: Example, ids: list[int], template: ChatTemplate) -> None:
    if template.bos_id is not None and ids[:2] == [template.bos_id, template.bos_id]:
        raise _refuse(example, "two BOS tokens lead the row", template)


def _refuse(example: Example, what: str, template: ChatTemplate) -> TrainingError:
    return TrainingError(
        f"row {example.id}: {what} (template of {template.source}); "
        "training on it would teach the wrong tokens: correct the row or choose a base model with a plain chat template"
    )


def _compile(text: str) -> Any:
    """The template in the sandbox and with the helpers that transformers gives to templates."""
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(text)
    except TemplateSyntaxError as fault:
        raise ModelError(f"chat template: {fault}; copy the model again") from fault


def _to_json(value: Any, indent: int | None = None, **_options: Any) -> str:
    """As transformers does it: no HTML escapes, no ASCII escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _template_text(folder: Path, config: dict[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    text = file.read_text("utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(text, list):
        text = next((t["template"] for t in text if t.get("name") == "default"), None)
    if not isinstance(text, str) or not text.strip():
        raise ModelError(f"{folder}: no chat template; use an instruction-tuned base model, or add chat_template.jinja")
    return text


def _stop_ids(folder: Path, *, tokenizer: Any, eos: str | None) -> frozenset[int]:
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
