"""Template and mask: what is trained at a turn is exactly what inference would have to produce there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from families import DEEPSEEK_NONE, FAMILIES, QWEN3, TOOL, Family, call, make_example, write_family
from tiny import TEMPLATE, write_tokenizer

from appliance.errors import ModelError, TrainingError
from appliance.evaluation import Arm, build_prompts
from appliance.example import Example, Message
from appliance.model import ChatTemplate, fit_template, load_template, render_row, render_rows, set_thinking
from appliance.model.calls import CallForm
from appliance.recipe import EvaluationSection
from appliance.thinking import split_thinking

BY_NAME = {f.name: f for f in FAMILIES}
THINK = "<think>\nwell\n</think>\n\n"
LEADS: dict[str, list[tuple[str, str]]] = {"plain": [], "system": [("system", "Be <brief> & kind.")]}


def list_cases(family: Family) -> Iterator[tuple[str, Example, int]]:
    """Name, example and expected number of token rows of every case that the family can hold."""
    think = THINK if "reasons" in family.can else ""
    for lead_name, lead in LEADS.items():
        if lead and "system" not in family.can:
            continue
        moves_system = bool(lead) and "system" in family.splits
        single = make_example(*lead, ("user", "q1"), ("assistant", f"{think} one é\n"))
        yield f"{lead_name} single", single, 1
        turns = [t for n in "123" for t in (("user", f"q{n}"), ("assistant", f"{think}a{n}\n\nmore"))]
        yield f"{lead_name} multi", make_example(*lead, *turns), 3 if moves_system or "turns" in family.splits else 1
        if "thinks" in family.can:
            thought = [("user", "q1"), ("assistant", f"{THINK}one"), ("user", "q2"), ("assistant", f"{THINK}two")]
            yield f"{lead_name} thinking", make_example(*lead, *thought), 1 if family.name == "smollm3" else 2
        if "tools" in family.can and not moves_system:
            yield from _list_tool_cases(family, lead_name, lead)


def _list_tool_cases(family: Family, name: str, lead: list[tuple[str, str]]) -> Iterator[tuple[str, Example, int]]:
    """A call as the answer; a call, its result and an answer; two rounds of that; two calls in one turn."""
    thinks = "thinks" in family.can
    ask, asked = ("user", "weather?"), Message("assistant", "", [call("Paris")])
    yield f"{name} call", make_example(*lead, ask, asked, tools=True), 1
    told = (asked, ("tool", '{"t": 3}'), ("assistant", "cold"))
    yield f"{name} tools", make_example(*lead, ask, *told, tools=True), 2 if thinks else 1
    again = (("user", "again?"), Message("assistant", "", [call("Rom")]), ("tool", "warm"), ("assistant", "warm"))
    rounds = 4 if thinks else 2 if "tools" in family.splits else 1
    yield f"{name} tools twice", make_example(*lead, ask, *told, *again, tools=True), rounds
    if "parallel" in family.can:
        both = Message("assistant", "", [call("Paris"), call("Rom")])
        turns = (ask, both, ("tool", "3"), ("tool", "4"), ("assistant", "mild"))
        yield f"{name} two calls", make_example(*lead, *turns, tools=True), 2 if thinks else 1


def as_sent(messages: Sequence[Message], template: ChatTemplate) -> list[dict[str, Any]]:
    """The messages as a client of the family's servers sends them, written here and not by our renderer."""
    sent: list[dict[str, Any]] = []
    names: list[str] = []
    for message in messages:
        parts = [{"type": "text", "text": message.content}]
        turn: dict[str, Any] = {
            "role": message.role, "content": parts if template.contents == "parts" else message.content
        }  # fmt: skip
        if message.tool_calls and template.calls:
            turn["tool_calls"] = []
            for made in message.tool_calls:
                names.append(f"call{len(names) + 1:05d}")
                arguments = made["function"]["arguments"]
                said = arguments if template.calls.arguments == "text" else json.loads(arguments)
                function = {"name": "get_weather", "arguments": said}
                turn["tool_calls"].append({"id": names[-1], "type": "function", "function": function})
        if message.role == "tool":
            turn["tool_call_id"] = names[-1]
            if sent[-1]["role"] == "assistant" and len(sent[-1]["tool_calls"]) > 1:
                turn["tool_call_id"] = names[-2]
        sent.append(turn)
    return sent


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_turn_is_trained_once_on_the_tokens_that_inference_would_see(tmp_path: Path, family: Family) -> None:
    """Before each trained span stands, token for token, what `apply_chat_template` gives a server for that turn.

    The span is the answer (or the call) and the stop token, and nothing else; every assistant turn
    has one. Single and multi turn, with and without system text, tools, calls and thinking.
    """
    from transformers import AutoTokenizer

    write_family(tmp_path, family)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    loaded = load_template(tmp_path)
    for name, example, count in list_cases(family):
        template = fit_template(loaded, [example])
        rows = render_rows(example, template)
        assert len(rows) == count, name
        turns = [i for i, m in enumerate(example.messages) if m.role == "assistant"]
        spans = sorted(((row.input_ids[:a], row.input_ids[a:b]) for row in rows for a, b in row.spans), key=measure)
        assert len(spans) == len(turns), name
        for turn, (before, said) in zip(turns, spans, strict=True):
            prompt = theirs.apply_chat_template(
                as_sent(example.messages[:turn], template),
                tools=[TOOL] if example.tools else None,
                add_generation_prompt=True,
                return_dict=True,
                date_string="26 Jul 2024",
                **({template.switch: template.thinking == "on"} if template.switch else {}),
            )
            if "current date" not in loaded.decode(before):  # transformers' clock goes on
                assert before == prompt["input_ids"], name
            check_said(template.decode(said), example.messages[turn], family=family, prompt=template.decode(before))


def measure(span: tuple[list[int], list[int]]) -> int:
    """Prompts of later turns are longer."""
    return len(span[0])


def check_said(said: str, message: Message, *, family: Family, prompt: str) -> None:
    """The trained text is what the row says, whatever the template trims, and ends where the turn ends."""
    stop = family.stops[0]
    assert said.endswith(stop)
    text = said.removesuffix(stop)
    assert stop not in text
    if message.tool_calls:
        for made in message.tool_calls:
            assert "".join(made["function"]["arguments"].split()) in "".join(text.split())
        assert text.count("get_weather") == len(message.tool_calls)
        return
    opened = "<think>\n" if prompt.endswith("<think>\n") else ""
    assert (opened + text).split() == message.content.split()


REAL_FILES = sorted(f.name.removesuffix(".jinja") for f in resources.files("trl").joinpath("chat_templates").iterdir())
REAL = [n for n in REAL_FILES if not n.endswith(("_training", ".md"))]
REAL_TOKEN = re.compile(
    r"""<\|[^|>\s]{1,40}\|>|</?[a-z_]{2,20}>|<\|[a-z_"]{1,20}>|<[a-z_"]{1,20}\|>|\[/?[A-Z_]{3,25}\]"""
    r"""|<｜[^>]{1,40}｜>|</?s>|<[A-Z_]{3,20}>"""  # noqa: RUF001
)
REAL_STOPS = {
    "qwen": "<|im_end|>", "lfm2": "<|im_end|>", "nemo": "<|im_end|>", "llam": "<|eot_id|>", "gemma": "<end_of_turn>",
    "gemma4": "<turn|> <|tool_response>", "diff": "<turn|> <|tool_response>", "phi3": "<|end|>", "llava": "</s>",
    "glm4": "<|user|> <|observation|> <|endoftext|>", "gptoss": "<|return|> <|call|>", "muse": "<|eot|>",
    "cohe": "<|END_OF_TURN_TOKEN|>", "idef": "<end_of_utterance>", "smol": "<end_of_utterance>",
    "deep": "<｜end▁of▁sentence｜>",  # noqa: RUF001
}  # fmt: skip
NO_SYSTEM, NO_TOOLS = ("gemma",), ("gemma", "gemma3", "phi3", "phi3_5", "cohere", "cohere2", "llama3", "lfm2")
NO_TOOLS += ("qwen2_5_vl", "idefics3", "smolvlm", "llava_next", "deepseekv3", "deepseek_r1_distill", "diffusion_gemma")
MUST_THINK = ("deepseekv3", "deepseek_r1_distill")
DROPS_THOUGHTS = ("qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "gptoss")


def write_real(folder: Path, name: str) -> ChatTemplate:
    """A template as its makers published it (TRL carries the files), on a tokenizer with its tokens."""
    text = resources.files("trl").joinpath("chat_templates", f"{name}.jinja").read_text("utf-8")
    stops = REAL_STOPS[max((n for n in REAL_STOPS if name.startswith(n)), key=len)].split()
    tokens = tuple(dict.fromkeys([*stops, "<bos>", *REAL_TOKEN.findall(text)]))
    bos = "<bos>" if "bos_token" in text else None
    return load_template(write_family(folder, Family(name, text, bos, tuple(stops), tokens)))


@pytest.mark.parametrize("name", REAL)
def test_the_families_own_templates_are_masked_or_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    """Every turn once, behind the tokens that a server starts from; what a template does not know is refused."""
    from transformers import AutoTokenizer

    template = write_real(tmp_path, name)
    think = THINK if name in MUST_THINK else ""
    turns = [t for n in "123" for t in (("user", f"q{n}"), ("assistant", f"{think}a{n}"))]
    chat = make_example(*([] if name in NO_SYSTEM else [("system", "Be brief.")]), *turns)
    rows = render_rows(chat, template)
    assert len(rows) == (3 if name in (*DROPS_THOUGHTS, *MUST_THINK) else 1)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    switch = {template.switch: False} if template.switch else {}
    spans = sorted(((r.input_ids[:a], r.input_ids[a:b]) for r in rows for a, b in r.spans), key=measure)
    for number, (before, said) in enumerate(spans, start=1):
        messages = as_sent(chat.messages[: -2 * (3 - number) - 1], template)
        assert before == theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, date_string="26 Jul 2024", **switch
        )["input_ids"] or "urrent date" in template.decode(before)  # transformers' clock goes on  # fmt: skip
        assert template.read_answer(template.decode(said[:-1])).split()[-1] == f"a{number}"
        assert said[-1] in template.stop_ids


@pytest.mark.parametrize("name", REAL)
def test_calls_in_the_families_own_templates_are_masked_or_refused(tmp_path: Path, name: str) -> None:
    """A call, its result and the answer, each ended by a token at which a server stops."""
    template = write_real(tmp_path, name)
    told = (Message("assistant", "", [call("Paris")]), ("tool", '{"t": 3}'), ("assistant", "cold"))
    tools = make_example(("user", "weather?"), *told, tools=True)
    if name in NO_TOOLS:
        with pytest.raises(TrainingError, match=r"^row r1: "):
            render_rows(tools, template)
        return
    rows = render_rows(tools, template)
    spans = sorted(((r.input_ids[:a], r.input_ids[a:b]) for r in rows for a, b in r.spans), key=measure)
    said, answer = (template.decode(s) for _, s in spans)
    assert "get_weather" in said
    assert "Paris" in said
    assert "cold" in answer


FRAMED = {
    "gptoss": (
        "<|channel|>final<|message|>a<|return|>",
        "<|channel|>analysis<|message|>well<|end|><|start|>assistant<|channel|>final<|message|>a<|return|>",
    ),
    "muse_glimmer": (
        " to=user<|message|>a<|eot|>",
        " to=self<|message|>well<|eom|><|start|>assistant to=user<|message|>a<|eot|>",
    ),
    "cohere2": ("a<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", None),
    "gemma4_v5": ("a<turn|>", "<|channel>thought\nwell\n<channel|>a<turn|>"),
    "glm4moe": ("\na<|user|>", "\n<think>well</think>\na<|user|>"),
    "qwen3_8": ("a<|im_end|>", "well\n</think>\n\na<|im_end|>"),
    "smolvlm": (" a<end_of_utterance>", None),
}


@pytest.mark.parametrize("name", FRAMED)
def test_what_a_template_writes_around_an_answer_is_trained_and_not_read(tmp_path: Path, name: str) -> None:
    """Channels, tokens around a response, thoughts in a field of their own, a turn that the next one ends."""
    loaded = write_real(tmp_path, name)
    for content, expected in zip(("a", f"{THINK}a"), FRAMED[name], strict=True):
        if expected is None:
            continue
        example = make_example(("user", "q"), ("assistant", content))
        template = fit_template(loaded, [example])
        (row,) = render_rows(example, template)
        ((start, end),) = row.spans
        assert template.decode(row.input_ids[start:end]) == expected
        read = template.read_answer(template.decode(row.input_ids[start : end - 1]))
        if "<think>" not in template.decode(row.input_ids[:start]):  # else the thought goes on from there
            assert split_thinking(read) == split_thinking(content)
            assert template.thinking != "fixed" or content == "a"


def test_a_base_model_answers_at_once_where_the_run_does_not_think(tmp_path: Path) -> None:
    """gpt-oss would think in a channel, be cut off and lose to any candidate; told how to begin, it does not."""
    template = write_real(tmp_path, "gptoss")
    asked = (Message("user", "q"),)
    plain, direct = (template.encode_prompt(asked, is_direct=d) for d in (False, True))
    assert template.decode(direct) == template.decode(plain) + "<|channel|>final<|message|>"
    section, rows = (
        EvaluationSection(few_shot=0),
        [make_example(("user", "q"), ("assistant", "a"), tools=t) for t in (0, 1)],
    )
    prompted, tuned = (
        build_prompts(
            Arm(n, tmp_path, None, is_prompted=n == "zero_shot"), rows, section=section, train=(), template=template
        )
        for n in ("zero_shot", "candidate")
    )
    begun = [a.input_ids[len(b.input_ids) :] for a, b in zip(prompted, tuned, strict=True)]
    assert [template.decode(b) for b in begun] == ["<|channel|>final<|message|>", ""], "a call would begin otherwise"
    thinking = set_thinking(template, "on")
    assert thinking.encode_prompt(asked, is_direct=True) == thinking.encode_prompt(asked)


@pytest.mark.parametrize("name", ["qwen2.5", "deepseek-v3", "llama3", "command-r"])
def test_a_call_is_the_same_tokens_however_the_row_writes_it(tmp_path: Path, name: str) -> None:
    """Arguments as JSON text, as an object, or without the wrapper: never encoded twice, never a Python repr."""
    template = load_template(write_family(tmp_path, BY_NAME[name]))
    rows = [
        render_row(
            make_example(("user", "q"), Message("assistant", "", [call("Zürich", shape=s)]), tools=True), template
        )
        for s in ("openai", "object", "bare")
    ]
    assert rows[0] == rows[1] == rows[2]
    said = template.decode(rows[0].input_ids[rows[0].spans[0][0] :])
    assert '{"city":"Zürich","days":2}' in "".join(said.split())


def test_a_template_that_wants_no_content_beside_a_call_gets_none(tmp_path: Path) -> None:
    """Older DeepSeek files drop the calls of a turn whose content is an empty text: found out by rendering one."""
    none = replace(BY_NAME["deepseek-v3"], template=DEEPSEEK_NONE)
    template = load_template(write_family(tmp_path / "none", none))
    assert template.calls == CallForm("text", "none")
    example = make_example(("user", "q"), Message("assistant", "", [call("Paris")]), tools=True)
    assert render_row(example, template) == render_row(
        example, load_template(write_family(tmp_path / "any", BY_NAME["deepseek-v3"]))
    )


def test_the_template_for_tools_is_used_for_rows_with_tools(tmp_path: Path) -> None:
    """A model with named templates (Command-R) gets the one that shows the tools, and only then."""
    template = load_template(write_family(tmp_path, BY_NAME["command-r"]))
    with_tools = template.render([Message("user", "q")], prompt=True, tools=json.dumps([TOOL]))
    assert "Available Tools" in with_tools
    assert "Available Tools" not in template.render([Message("user", "q")], prompt=True)
    listed = [{"name": "default", "template": BY_NAME["command-r"].template}]
    listed += [{"name": "tool_use", "template": BY_NAME["command-r"].tools_template or ""}]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": listed}))
    again = load_template(tmp_path)
    assert again.render([Message("user", "q")], prompt=True, tools=json.dumps([TOOL])) == with_tools


def test_a_merge_never_crosses_from_the_prompt_into_the_answer(tmp_path: Path) -> None:
    """Training tokens are the prompt's tokens and then the answer's, also where the text would merge.

    In the history of a later turn the text is whole, so there it is merged, as inference meets it:
    one token row cannot hold both.
    """
    template_text = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q:' + m.content + '\nA:' }}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    family = Family("border", template_text, None, ("<|im_end|>",), ("<|im_end|>",))
    template = load_template(write_family(tmp_path, family, merges=[(":", ")"), ("o", "k")]))
    example = make_example(("user", "fine?"), ("assistant", ") ok"), ("user", "sure?"), ("assistant", "ok"))
    rows = render_rows(example, template)
    first = rows[0]
    prompt = template.encode_prompt(example.messages[:1])
    (start, end), joined = first.spans[0], template.encode(template.decode(first.input_ids)).ids
    assert joined[: len(prompt)] != prompt, "the fixture has a merge across the border"
    assert first.input_ids[:start] == prompt
    assert template.decode(first.input_ids[start:end]) == ") ok<|im_end|>"
    assert len(first.input_ids) > len(joined)
    assert rows[1].input_ids[: len(joined)] == joined, "history is tokenised whole"
    assert [template.decode(r.input_ids[a:b]) for r in rows for a, b in r.spans] == [") ok<|im_end|>", "ok<|im_end|>"]


def test_a_tokenizer_that_prepends_a_space_is_masked_at_the_same_place(tmp_path: Path) -> None:
    """SentencePiece-like tokenizers mark words by a leading space; no such mark is invented for an answer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    text = (
        "{% for m in messages %}{{ m.role[0] + ': ' + m.content + ('</s>' if m.role[0] == 'a' else '') + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
    )
    write_tokenizer(tmp_path, template=text)
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz:? ▁\n"})
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[], byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "generation_config.json").unlink()
    template = load_template(tmp_path)
    row = render_row(make_example(("user", "who?"), ("assistant", "me and you")), template)
    start, end = row.spans[0]
    assert row.input_ids[:start] == template.encode_prompt([Message("user", "who?")])
    assert [tokenizer.id_to_token(t) for t in row.input_ids[start:end]] == [*"▁me▁and▁you", "</s>"]


@pytest.mark.parametrize("name", ["llama3", "gemma2", "mistral-v0.3", "deepseek-v3"])
def test_there_is_one_bos_though_tokenizer_and_template_both_add_it(tmp_path: Path, name: str) -> None:
    """The tokenizer's post-processor adds a BOS to plain text; rendered text has its own, and keeps only that."""
    template = load_template(write_family(tmp_path, BY_NAME[name]))
    assert template.tokenizer.encode("hi").ids[0] == template.bos_id, "the post-processor is there"
    row = render_row(make_example(("user", "q"), ("assistant", "a")), template)
    assert row.input_ids.count(template.bos_id or -1) == 1
    assert row.input_ids[0] == template.bos_id


def test_nothing_is_trained_or_kept_after_the_stop_token(tmp_path: Path) -> None:
    """The line break that templates write after a turn is history, never a target."""
    template = load_template(write_family(tmp_path, BY_NAME["gemma3"]))
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = render_row(make_example(*turns), template)
    assert [row.input_ids[end - 1] for _, end in row.spans] == [min(template.stop_ids)] * 2
    assert row.input_ids[-1] == min(template.stop_ids)
    assert template.decode([row.input_ids[row.spans[0][1]]]) == "\n"


def test_thinking_is_one_setting_for_all_prompts_of_a_run(tmp_path: Path) -> None:
    """On when an answer of the rows thinks, else off; a prompt never depends on the answer that is to come."""
    template = load_template(write_family(tmp_path, BY_NAME["qwen3"]))
    plain = make_example(("user", "q"), ("assistant", "a"))
    thought = make_example(("user", "q"), ("assistant", f"{THINK}a"))
    assert template.thinking == fit_template(template, [plain]).thinking == "off"
    on = fit_template(template, [plain, thought])
    assert on.thinking == "on"
    assert on.encode_prompt(plain.prompt) == on.encode_prompt(thought.prompt)
    said = [on.decode(r.input_ids[r.spans[0][0] :]) for r in (render_row(plain, on), render_row(thought, on))]
    assert said == ["<think>\n\n</think>\n\na<|im_end|>", f"{THINK}a<|im_end|>"]
    with pytest.raises(TrainingError, match="closes the thinking block, but the answer thinks"):
        render_row(thought, template)
    fixed = load_template(write_family(tmp_path, BY_NAME["qwen2.5"]))
    assert fit_template(fixed, [thought]).thinking == "fixed"


@pytest.mark.parametrize(("name", "switch"), [("qwen3", "enable_thinking"), ("deepseek", "thinking"), ("none", "")])
def test_the_switch_is_the_variable_that_the_template_reads(tmp_path: Path, name: str, switch: str) -> None:
    """Servers are told its name on the card; DeepSeek's later templates have another one than Qwen's."""
    family = BY_NAME["qwen2.5" if name == "none" else "qwen3"]
    text = family.template.replace("enable_thinking", "thinking") if name == "deepseek" else family.template
    template = load_template(write_family(tmp_path, replace(family, template=text)))
    assert template.switch == switch
    assert (template.thinking == "off") is bool(switch)


def test_a_template_without_a_switch_may_still_tell_thoughts_apart(tmp_path: Path) -> None:
    """gpt-oss writes them in a channel: the run has a setting, and there is nothing to serve with."""
    template = write_real(tmp_path, "gptoss")
    assert (template.switch, template.thinking) == ("", "off")


MENTIONS = "write `</think>` at the end"


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_an_answer_that_mentions_the_tag_does_not_change_the_other_rows(tmp_path: Path, name: str) -> None:
    """Only an answer that begins with a thinking block thinks: the plain row keeps its prompt and its tokens."""
    template = load_template(write_family(tmp_path, BY_NAME[name]))
    plain = make_example(("user", "q"), ("assistant", "Paris"))
    others = [make_example(("user", "q"), ("assistant", t)) for t in (MENTIONS, "</think>", "<think> opens it")]
    fitted = fit_template(template, [plain, *others])
    assert fitted.thinking == "off"
    assert render_row(plain, fitted) == render_row(plain, fit_template(template, [plain]))
    assert fit_template(template, [make_example(("user", "q"), ("assistant", f"\n{THINK}a"))]).thinking == "on"


@pytest.mark.parametrize("thinking", ["off", "on"])
@pytest.mark.parametrize("calls", [None, [call("Paris")]], ids=["text", "call"])
@pytest.mark.parametrize("content", [MENTIONS, "a\n</think>\n\nb"])
def test_an_answer_that_the_template_would_take_apart_is_refused(
    tmp_path: Path, thinking: str, calls: list[Any] | None, content: str
) -> None:
    """Qwen 3 splits any answer at `</think>`: text before the tag would be trained as thinking, also beside a call."""
    template = set_thinking(load_template(write_family(tmp_path, BY_NAME["qwen3"])), thinking)
    example = ask(Message("assistant", content, calls), tools=calls is not None)
    with pytest.raises(TrainingError, match=r"^row r1: .*'</think>' in the answer of turn 2.*; let the answer begin"):
        render_rows(example, template)


def test_a_prompt_that_opens_the_block_by_a_switch_takes_no_mention_for_thinking(tmp_path: Path) -> None:
    """Qwen 3.5: beside rows that think, an answer that mentions the tag would be trained as thinking, too."""
    opening = QWEN3.replace("enable_thinking is false %}", "enable_thinking is true %}{{- '<think>\\n' }}{%- else %}")
    template = load_template(write_family(tmp_path, replace(BY_NAME["qwen3"], template=opening)))
    mention, thought = ask(("assistant", MENTIONS)), ask(("assistant", f"{THINK}one"))
    fitted = fit_template(template, [mention, thought])
    assert fitted.encode_prompt(thought.prompt)[-2:] == list(fitted.encode("<think>\n").ids)
    assert fitted.decode(render_row(thought, fitted).input_ids).endswith(f"{THINK}one<|im_end|>")
    with pytest.raises(TrainingError, match=r"'</think>' in the answer of turn 2.*; let the answer begin"):
        render_row(mention, fitted)


@pytest.mark.parametrize("name", ["qwen2.5", "smollm3", "deepseek-v3"])
def test_the_tag_is_text_where_the_template_leaves_it_alone(tmp_path: Path, name: str) -> None:
    """The whole answer is trained, tag and all, behind the same prompt as ever."""
    template = load_template(write_family(tmp_path, BY_NAME[name]))
    row = render_row(ask(("assistant", MENTIONS)), template)
    (start, end) = row.spans[0]
    assert row.input_ids[:start] == template.encode_prompt([Message("user", "a?")])
    assert template.decode(row.input_ids[start : end - 1]) == MENTIONS


def test_an_answer_goes_on_from_the_thinking_block_that_its_prompt_opens(tmp_path: Path) -> None:
    """DeepSeek R1: with or without the opening tag in the row, the same tokens are trained.

    It was so before the tag had to lead an answer; here so that it stays.
    """
    template = load_template(write_family(tmp_path, BY_NAME["deepseek-r1"]))
    rows = [
        render_row(ask(("assistant", t)), template) for t in ("<think>\nwell\n</think>\n\na", "well\n</think>\n\na")
    ]
    assert rows[0] == rows[1]


def test_the_clock_of_a_template_stands_still(tmp_path: Path) -> None:
    """The same rows give the same tokens tomorrow, whether the template asks for the date kindly or not."""
    for name in ("llama3", "mistral-tekken"):
        template = load_template(write_family(tmp_path, BY_NAME[name]))
        assert "2024" in template.render([Message("user", "q")], prompt=True)


def test_generation_markers_are_neither_needed_nor_trusted(tmp_path: Path) -> None:
    """Markers around the last turn only change nothing: both turns are trained, as without markers."""
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    example = make_example(("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two"))
    write_tokenizer(tmp_path / "marked", template=marked)
    write_tokenizer(tmp_path / "plain")
    with_markers = render_row(example, load_template(tmp_path / "marked"))
    assert with_markers == render_row(example, load_template(tmp_path / "plain"))
    assert len(with_markers.spans) == 2


def ask(*turns: tuple[str, str] | Message, tools: bool = False) -> Example:
    """A row with a plain question first."""
    return make_example(("user", "a?"), *turns, tools=tools)


ONE = ask(("assistant", "one"))
SILENT = TEMPLATE.replace("{{ '<|im_start|>'", "{% if message.role != 'system' %}{{ '<|im_start|>'").replace(
    "{% endfor %}", "{% endif %}{% endfor %}"
)
ANSWERS_ONLY = "{% for m in messages %}{{ m.content + '<|im_end|>' if m.role == 'assistant' else '' }}{% endfor %}"
REFUSED: dict[str, tuple[str, Example, str]] = {
    "no-generation-prompt": (TEMPLATE.replace("{% if add_gen", "{% if false and add_gen"), ONE, "not the answer"),
    "no-stop": (TEMPLATE.replace("'<|im_end|>\n'", "'\n'"), ONE, "no stop token ends turn 2"),
    "rewrites-its-own-prompt": ("{{ messages | length }}" + TEMPLATE, ONE, "prompt of turn 2 is not a prefix"),
    "double-bos": ("{{ bos_token }}" + TEMPLATE, ONE, "two BOS tokens"),
    "raises": ("{{ raise_exception('no system here') }}", ONE, "refused a conversation: no system here"),
    "no-assistant": (TEMPLATE, make_example(("user", "a?")), "no assistant turn"),
    "prompt-is-empty": (ANSWERS_ONLY, make_example(("user", ""), ("assistant", "x")), "the prompt is empty"),
    "drops-the-user": (ANSWERS_ONLY, ONE, r"leaves out turn 1 \(user\)"),
    "drops-the-system-text": (
        SILENT,
        make_example(("system", "Be kind."), ("user", "a?"), ("assistant", "x")),
        r"leaves out turn 1 \(system\)",
    ),
    "no-tool-definitions": (TEMPLATE, ask(("assistant", "one"), tools=True), "the definition of tool get_weather"),
    "no-calls": (TEMPLATE, ask(Message("assistant", "", [call("Paris")])), "renders no tool calls"),
    "half-an-answer": (
        TEMPLATE.replace("message['content']", "message['content'][:3 if message['role'] == 'assistant' else none]"),
        make_example(("user", "a?"), ("assistant", "four")),
        "is 'fou', not the answer",
    ),
    "stop-in-the-answer": (TEMPLATE, ask(("assistant", "on<|im_end|>e")), "holds the stop token '<.im_end.>'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_train_the_wrong_tokens_is_refused(tmp_path: Path, case: str) -> None:
    """Each is an error that names the row, the turn and the rule."""
    template, example, rule = REFUSED[case]
    write_tokenizer(tmp_path, template=template)
    with pytest.raises(TrainingError, match=f"^row r1: .*{rule}"):
        render_rows(example, load_template(tmp_path))


HIDDEN: dict[str, tuple[str, Example, int]] = {
    "in-the-user-turn": (SILENT, make_example(("system", "Be kind."), ("user", "Be kind. a?"), ("assistant", "x")), 1),
    "in-an-answer": (
        SILENT,
        make_example(("system", "red"), ("user", "a?"), ("assistant", "red"), ("user", "b?"), ("assistant", "x")),
        1,
    ),
    "a-word-of-the-template": (SILENT, make_example(("system", "user"), ("user", "a?"), ("assistant", "x")), 1),
    "a-letter": (SILENT, make_example(("system", "a"), ("user", "a?"), ("assistant", "x")), 1),
    "white-space-around": (SILENT, make_example(("system", " a\n"), ("user", "a?"), ("assistant", "x")), 1),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_text_that_is_left_out_is_not_found_elsewhere(tmp_path: Path, case: str) -> None:
    """Words of a turn that is not shown may stand in another turn or in the template: that shows nothing."""
    template, example, turn = HIDDEN[case]
    write_tokenizer(tmp_path, template=template)
    with pytest.raises(TrainingError, match=rf"^row r1: .*leaves out turn {turn} \(system\)"):
        render_rows(example, load_template(tmp_path))


def test_a_tool_named_like_a_word_of_the_template_is_not_taken_for_shown(tmp_path: Path) -> None:
    """A template without tools leaves out one that is called `user`, too."""
    write_tokenizer(tmp_path)
    tools = json.dumps([{"name": "user"}])
    with pytest.raises(TrainingError, match=r"^row r1: .*leaves out the definition of tool user "):
        render_rows(Example("r1", ONE.messages, provenance="human", tools=tools), load_template(tmp_path))


@pytest.mark.parametrize(
    "shown",
    [
        "(content | trim)",
        "(content | upper if content.strip().startswith('Q') else content)",
        "(content | tojson if message['role'] == 'system' else content)",
        "(content if content.startswith('Be') or message['role'] != 'system' else raise_exception('Be what?'))",
        "(content if content or message['role'] == 'user' else raise_exception('empty'))",
    ],
)
def test_what_a_template_trims_escapes_or_asks_of_a_content_is_not_left_out(tmp_path: Path, shown: str) -> None:
    """The marks by which a content is found are those that such templates let stand. So it was; it has to stay."""
    text = TEMPLATE.replace("message['content']", shown).replace(
        "in messages %}", "in messages %}{% set content = message['content'] %}", 1
    )
    write_tokenizer(tmp_path, template=text)
    turns = (
        ("system", 'Be "kind".\n\tAlways.'),
        ("user", " Q1 \n"),
        ("assistant", "a"),
        ("user", ""),
        ("assistant", "b"),
    )
    assert len(render_rows(make_example(*turns), load_template(tmp_path))) == 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_turn_that_the_text_of_another_forges_is_refused(tmp_path: Path, family: Family) -> None:
    """A content that goes on as the family writes an answer: the model would see turns that the row does not have."""
    template = load_template(write_family(tmp_path, family))
    think = THINK if "reasons" in family.can else ""
    turns = make_example(("user", "hello"), ("assistant", f"{think}red"), ("user", "really"), ("assistant", "")).prompt
    whole = template.render(turns, prompt=False)
    begin, end = whole.index("hello"), whole.index("really") + len("really")
    ended = whole[begin:end].index(family.stops[0], whole[begin:end].index("red")) + len(family.stops[0])
    for text in (whole[begin:end], whole[begin:end][:ended]):
        with pytest.raises(
            TrainingError, match=r"^row r1: turn 1 \(user\) holds .* a turn there that the row does not"
        ):
            render_rows(make_example(("user", text), ("assistant", f"{think}blue")), template)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_control_tokens_are_those_of_turns_not_those_that_rows_write(tmp_path: Path, family: Family) -> None:
    """Every token around a plain exchange is found in a text, special or not; thinking, calls and results have none."""
    template = load_template(write_family(tmp_path, family))
    exchange = template.render([Message("user", "q"), Message("assistant", "a")], prompt=False)
    written = [t for t in family.tokens if t in exchange and t not in ("<think>", "</think>")]
    assert written
    for token in {*written, *family.stops}:
        assert template.find_tokens(f"a {token}!") == [token]
    contents = [m.content for _, example, _ in list_cases(family) for m in example.messages]
    contents += [THINK, '<tool_call>\n{"name": "x"}\n</tool_call>', "<tool_response>3</tool_response>"]
    assert [t for c in contents for t in template.find_tokens(c)] == []


def test_white_space_is_no_control_token(tmp_path: Path) -> None:
    """Gemma's tokenizers have line breaks among their added tokens, and its template writes them."""
    from tokenizers import AddedToken, Tokenizer

    folder = write_family(tmp_path, BY_NAME["gemma3"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("\n", special=False, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_template(folder).find_tokens("two\nlines<eos>") == ["<eos>"]


@pytest.mark.parametrize(
    ("name", "token"), [("llama3", "<|eot_id|>"), ("gemma3", "<end_of_turn>"), ("phi3", "<|end|>")]
)
def test_a_turn_that_ends_where_no_server_stops_is_refused_with_the_token_to_add(
    tmp_path: Path, name: str, token: str
) -> None:
    """The model would learn an ending that is not in `eos_token_id`: the message says which id to add there."""
    family = BY_NAME[name]
    template = load_template(write_family(tmp_path, family, stops=[s for s in family.stops if s != token]))
    number = template.tokenizer.token_to_id(token)
    with pytest.raises(TrainingError, match=f"no stop token ends turn 2: .*\\(token {number}\\).*: add {number}"):
        render_row(ONE, template)


def test_an_answer_without_thinking_for_a_model_that_must_think_is_refused(tmp_path: Path) -> None:
    """DeepSeek R1's prompt opens the thinking block itself: a row without thinking would teach to skip it."""
    template = load_template(write_family(tmp_path, BY_NAME["deepseek-r1"]))
    with pytest.raises(TrainingError, match="opens a thinking block, but the answer does not think"):
        render_row(ONE, template)


def test_system_text_that_mistral_would_not_show_after_a_tool_result_is_refused(tmp_path: Path) -> None:
    """Its template shows system text only beside a last user turn; the row's author must know."""
    template = load_template(write_family(tmp_path, BY_NAME["mistral-v0.3"]))
    asked = Message("assistant", "", [call("Paris")])
    turns = (("system", "Be kind."), ("user", "w?"), asked, ("tool", "3"), ("assistant", "cold"))
    with pytest.raises(TrainingError, match=r"leaves out turn 1 \(system\) at turn 5"):
        render_rows(make_example(*turns, tools=True), template)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"tools": "{"}, "tools is not JSON"),
        ({"tools": '{"name": "x"}'}, "expected a JSON list of tool definitions"),
        ({"messages": (Message("user", "q"), Message("assistant", "", [{"function": {}}]))}, "no name; expected"),
        ({"messages": (Message("user", "q"), Message("assistant", "", ["get_weather"]))}, "no name; expected"),
    ],
    ids=["broken-tools", "tools-no-list", "call-without-name", "call-is-text"],
)
def test_malformed_tools_are_named(tmp_path: Path, changes: dict[str, Any], rule: str) -> None:
    """What is wrong with a definition or a call is said, with the row."""
    template = load_template(write_family(tmp_path, BY_NAME["qwen2.5"]))
    with pytest.raises(TrainingError, match=f"^row r1: .*{rule}"):
        render_rows(Example(**{"id": "r1", "messages": ONE.messages, "provenance": "human", **changes}), template)


def test_a_conversation_that_was_split_is_no_single_row(tmp_path: Path) -> None:
    """`render_row` never leaves turns out without a word."""
    template = load_template(write_family(tmp_path, BY_NAME["qwen3"]))
    with pytest.raises(TrainingError, match="rewrites earlier turns"):
        render_row(make_example(*ONE.messages, ("user", "b?"), ("assistant", "two")), template)


def test_a_model_without_a_chat_template_or_a_stop_token_is_refused(tmp_path: Path) -> None:
    """A base model that cannot hold a conversation is named as such."""
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no eos_token_id"):
        load_template(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 257}')
    (tmp_path / "chat_template.jinja").write_text("{% for m in %}")
    with pytest.raises(ModelError, match="chat template: "):
        load_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load_template(tmp_path)
