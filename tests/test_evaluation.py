"""Laws of evaluation: strict scorers, demonstrations from train only, the same answers after any interruption."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from families import FAMILIES, call, write_family
from families import make_example as make_row
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tiny import write_base, write_tokenizer

from appliance.command import WorkerEnd
from appliance.contract import Contract, JsonContract, TextContract
from appliance.errors import EvaluationError, InterruptedRunError
from appliance.evaluation import (
    Arm,
    GenerationJob,
    Output,
    Result,
    build_arms,
    build_prompts,
    decode_outputs,
    generate,
    score_outputs,
    worker,
)
from appliance.evaluation.arms import Prompt, _index_rows, _select_nearest, _words
from appliance.evaluation.outputs import read_said
from appliance.example import Example, Message, normalise_text
from appliance.model import ChatTemplate, TokenRow, fit_template, load_template, render_rows
from appliance.recipe import EvaluationSection
from appliance.thinking import drop_thinking

TICKET = JsonContract.model_validate(
    {
        "type": "json",
        "schema": {
            "type": "object",
            "required": ["item", "n"],
            "properties": {"item": {"type": "string"}, "n": {"type": "integer"}},
            "additionalProperties": False,
        },
    }
)
LABELS: Contract = TypeAdapter(Contract).validate_python({"type": "labels", "labels": ["red", "blue"]})


def make_example(number: int = 0, *, ask: str | None = None, answer: str = '{"item": "lamp", "n": 2}') -> Example:
    """A row with a system prompt."""
    messages = (
        Message("system", "Short."),
        Message("user", ask or f"question {number}"),
        Message("assistant", answer),
    )
    return Example(f"t{number}", messages, provenance="program")


def make_output(text: str, *, number: int = 0, arm: str = "candidate") -> Output:
    """One answer."""
    return Output(id=f"t{number}", arm=arm, output=text, stop="eos", tokens=1, prompt_tokens=1, seconds=0.0)


Score = Callable[[list[Output], list[Example], Contract], tuple[Result, ...]]


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory) -> Score:
    """Scoring with a plain chat template."""
    folder = tmp_path_factory.mktemp("plain")
    write_tokenizer(folder)
    return partial(score_outputs, template=load_template(folder))


@pytest.mark.parametrize(
    ("text", "exact", "keeps", "fields"),
    [
        ('{"item": "lamp", "n": 2}', 1, 1, 1.0),
        ('  {"n": 2, "item": "lamp"}\n', 1, 1, 1.0),  # the order of keys and white space at the ends do not count
        ('{"item": "lamp", "n": 3}', 0, 1, 0.5),
        ('{"item": "lamp", "n": 2.0}', 0, 1, 0.5),  # JSON Schema calls 2.0 an integer; a strict reader does not
        ('{"item": "lamp", "n": true}', 0, 0, 0.5),
        ('{"item": "lamp", "n": 2, "n": 2}', 0, 0, 0.0),
        ('{"item": "lamp", "n": 2, "x": 1}', 0, 0, 0.8),
        ('```json\n{"item": "lamp", "n": 2}\n```', 0, 0, 0.0),
        ('Here you are: {"item": "lamp", "n": 2}', 0, 0, 0.0),
        ('{"item": "lamp", "n": NaN}', 0, 0, 0.0),
        ("[" * 5000, 0, 0, 0.0),
        ('["lamp", 2]', 0, 0, 0.0),
        ("", 0, 0, 0.0),
    ],
)
def test_the_json_scorer_shows_no_mercy(score: Score, text: str, exact: int, keeps: int, fields: float) -> None:
    """What would break a program that reads the answer scores nothing."""
    (result,) = score([make_output(text)], [make_example()], TICKET)
    assert result.scores == {"exact_match": exact, "contract_valid": keeps, "field_f1": pytest.approx(fields)}


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ('<think>\nanother way\n</think>\n\n{"item": "lamp", "n": 2}', 1),
        ('{"item": "lamp", "n": 2}', 1),
        ('<think>\nand on and on {"item": "lamp", "n": 2}', 0),
        ('so </think> {"item": "lamp", "n": 2}', 0),
    ],
)
def test_thinking_is_not_compared_where_references_think(score: Score, text: str, exact: int) -> None:
    """It is trained, and a program that reads the answer does not see it; where no reference thinks it is prose."""
    reference = '<think>\nwell\n</think>\n\n{"item": "lamp", "n": 2}'
    thinking, plain = make_example(answer=reference), make_example()
    assert thinking.answer == plain.answer
    assert not TICKET.find_faults(thinking.answer)
    (result,) = score([make_output(text)], [thinking], TICKET)
    assert (result.scores["exact_match"], result.scores["contract_valid"]) == (exact, exact)
    assert result.output == text, "the card shows what was said"
    (result,) = score([make_output(text)], [plain], TICKET)
    assert result.scores["exact_match"] == float("think" not in text)


@pytest.mark.parametrize("name", ["deepseek-r1", "qwen3"])
def test_an_answer_that_goes_on_from_a_thinking_block_is_read_whole(tmp_path: Path, name: str) -> None:
    """The block that a prompt opened belongs to what the model said; a closed one does not."""
    family = next(f for f in FAMILIES if f.name == name)
    template = load_template(write_family(tmp_path, family))
    asked = template.encode_prompt((Message("user", "q"),))
    said = template.encode("well\n</think>\n\nred").ids
    read = read_said(said, asked=asked, template=template)
    assert (drop_thinking(read) == "red") is (name == "deepseek-r1")
    assert read.endswith("well\n</think>\n\nred")


CALLS = [
    *((f.name, "") for f in FAMILIES if "tools" in f.can),
    *((name, "Let me look.") for name in ("qwen2.5", "qwen3", "deepseek-v3", "command-r")),
    ("qwen3", "<think>\nwell\n</think>\n\nLet me look."),
]


@pytest.mark.parametrize(("name", "text"), CALLS)
def test_a_call_is_compared_as_the_template_writes_it(tmp_path: Path, name: str, text: str) -> None:
    """What the candidate is trained to say scores 1; the text beside the call alone, or another call, scores 0."""
    family = next(f for f in FAMILIES if f.name == name)
    rows = [make_row(("user", "q"), Message("assistant", text, [call(city)]), tools=True) for city in ("Paris", "Oslo")]
    template = fit_template(load_template(write_family(tmp_path, family)), rows)
    said = [read_last(render_rows(row, template)[-1], template) for row in rows]
    outputs = [
        Output("r1", arm, answer, stop="eos", tokens=1, prompt_tokens=1, seconds=0.0)
        for arm, answer in (("candidate", f" {said[0]}\n"), ("few_shot", said[1]), ("zero_shot", text))
    ]
    results = score_outputs(outputs, rows[:1], TextContract(), template=template)
    assert [r.scores["exact_match"] for r in results] == [1.0, 0.0, 0.0]


def read_last(row: TokenRow, template: ChatTemplate) -> str:
    """What a candidate says that has learned the last turn by heart."""
    start, end = row.spans[-1]
    return read_said(row.input_ids[start : end - 1], asked=row.input_ids[:start], template=template)


def test_labels_are_compared_after_trimming(score: Score) -> None:
    """`red` is red, `Red` is not."""
    row = make_example(answer="red")
    scores = [score([make_output(t)], [row], LABELS)[0].scores["exact_match"] for t in (" red\n", "Red", "reds")]
    assert scores == [1.0, 0.0, 0.0]


NAME = "Zu\u0308rich"  # in two characters, as some systems write it
SCHEMA = {"type": "object", "properties": {NAME: {"enum": [NAME]}}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("contract", "reference"),
    [
        ({"type": "text"}, NAME),
        ({"type": "labels", "labels": [NAME, "Bern"]}, NAME),
        ({"type": "json", "schema": SCHEMA}, json.dumps({NAME: NAME}, ensure_ascii=False)),
        ({"type": "json", "schema": SCHEMA}, json.dumps({NAME: NAME})),
    ],
)
def test_composed_characters_are_those_they_are_made_of(
    score: Score, contract: dict[str, object], reference: str
) -> None:
    """A tokenizer that composes them (NFC) trains other bytes than the row has; they are the same text."""
    known: Contract = TypeAdapter(Contract).validate_python(contract)
    row = make_example(answer=reference)
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, reference)
        assert not known.find_faults(text)
        assert set(score([make_output(text)], [row], known)[0].scores.values()) == {1.0}


@given(text=st.text(max_size=300))
def test_no_output_can_crash_a_scorer(score: Score, text: str) -> None:
    """A model may say anything."""
    (result,) = score([make_output(text)], [make_example()], TICKET)
    assert all(0 <= s <= 1 for s in result.scores.values())


def test_a_missing_a_double_or_an_unknown_answer_is_an_error(score: Score) -> None:
    """An arm that lacks rows must not look good on the others."""
    rows = [make_example(0), make_example(1)]
    both = [make_output("x", number=n, arm=a) for a in ("zero_shot", "candidate") for n in (0, 1)]
    assert len(score(both, rows, TICKET)) == 4
    for bad in (both[:-1], [*both, both[-1]], [*both, make_output("x", number=9)]):
        with pytest.raises(EvaluationError, match="evaluate again"):
            score(bad, rows, TICKET)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def test_the_base_gets_the_best_prompt_and_the_tuned_its_own(base: Path) -> None:
    """The recipe's system prompt replaces the rows' own for the base alone; few-shot adds turns from train."""
    section = EvaluationSection(system_prompt="Best prompt.", few_shot=2)
    arms = build_arms(section, base=base, artifact=base, is_adapter=True, champion=None)
    assert [a.name for a in arms] == ["zero_shot", "few_shot", "candidate"]
    template = load_template(base)
    train = [make_example(n, ask=f"red car number {n}") for n in range(5)] + [make_example(9, ask="blue boat now")]
    row = make_example(20, ask="blue boat please")
    texts = {
        a.name: template.decode(build_prompts(a, [row], section=section, train=train, template=template)[0].input_ids)
        for a in arms
    }
    assert "Best prompt." in texts["zero_shot"]
    assert "Short." not in texts["zero_shot"]
    assert "Short." in texts["candidate"]
    assert "Best prompt." not in texts["candidate"]
    assert texts["few_shot"].count("<|im_start|>user") == 3
    assert texts["few_shot"].index("blue boat now") > texts["few_shot"].index("red car"), "the nearest comes last"
    assert all(t.endswith("<|im_start|>assistant\n") for t in texts.values())


REQUESTS = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=5).map(" ".join), min_size=1, max_size=40)


@given(REQUESTS, st.lists(st.sampled_from("abcdxyz"), max_size=5).map(" ".join), st.integers(1, 16), st.randoms())
def test_demonstrations_are_the_nearest_rows_by_the_plain_definition(
    asks: list[str], ask: str, count: int, chance: random.Random
) -> None:
    """Jaccard of the words against every training row, ties by id, rows without a common word too, nearest last."""

    def far(row: Example) -> tuple[float, str]:
        both, either = _words(row) & words, _words(row) | words
        return -len(both) / len(either) if either else 0.0, row.id

    train = [
        Example(f"t{chance.randrange(60)}", (Message("user", a), Message("assistant", str(n))), provenance="human")
        for n, a in enumerate(asks)
    ]
    example = make_example(ask=ask) if ask else Example("q", (Message("assistant", "x"),), provenance="human")
    words = _words(example)
    expected = sorted(train, key=far)[:count][::-1]
    assert list(_select_nearest(example, _index_rows(train), count=count)) == expected


# what is asked, what is near it, and what is not but has the lower id
UNSPACED = {
    "chinese": ("打印机坏了请派人来看看", "打印机坏了请派人来修理", "请把会议改到星期五下午"),
    "japanese": ("プリンターが壊れた見て", "プリンターが壊れたので修理", "会議を金曜日に変更"),
    "thai": ("เครื่องพิมพ์เสียช่วยดูให้หน่อย", "เครื่องพิมพ์เสียส่งช่างมาซ่อม", "ขอเลื่อนประชุมเป็นวันศุกร์"),
    "lao": ("ເຄື່ອງພິມເພຊ່ວຍເບິ່ງ", "ເຄື່ອງພິມເພສົ່ງຊ່າງ", "ຂໍເລື່ອນປະຊຸມ"),
    "khmer": ("ម៉ាស៊ីនបោះពុម្ពខូចសូមមើល", "ម៉ាស៊ីនបោះពុម្ពខូចសូមជួសជុល", "សូមប្តូរការប្រជុំ"),
    "burmese": ("ပရင်တာပျက်နေတယ်ကြည့်ပေးပါ", "ပရင်တာပျက်နေတယ်ပြင်ပေးပါ", "အစည်းအဝေးရွှေ့ချင်တယ်"),
}


@pytest.mark.parametrize("language", UNSPACED)
def test_the_nearest_row_is_found_where_words_have_no_spaces(language: str) -> None:
    """A clause is no word: what two requests share is pairs of characters."""
    ask, near, far = UNSPACED[language]
    train = [make_example(1, ask=far), make_example(2, ask=near)]
    (shot,) = _select_nearest(make_example(0, ask=ask), _index_rows(train), count=1)
    assert shot.request == near


@given(st.text(st.characters(max_codepoint=0x0DFF)))
def test_words_between_spaces_are_words(text: str) -> None:
    """Latin, Greek, Cyrillic, Arabic, the scripts of India: the same words as ever; Korean is written with spaces."""
    assert _words(make_example(ask=text)) == set(re.findall(r"\w+", normalise_text(text or "question 0")))
    assert _words(make_example(ask="프린터가 고장 났어요 iPhone 12")) == {"프린터가", "고장", "났어요", "iphone", "12"}
    assert _words(make_example(ask="iPhoneを買う。好")) == {"iphone", "を買", "買う", "好"}


def test_without_few_shot_the_arm_is_left_out(base: Path) -> None:
    """`few_shot: 0` asks for no such arm; a champion adds its own."""
    section = EvaluationSection(few_shot=0)
    arms = build_arms(section, base=base, artifact=base, is_adapter=False, champion=base)
    assert [a.name for a in arms] == ["zero_shot", "champion", "candidate"]
    assert arms[2].adapter is None


def write_adapter(folder: Path, base: Path) -> Path:
    """A LoRA adapter with random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def make_job(base: Path, folder: Path, adapter: Path, **changes: object) -> tuple[GenerationJob, list[Prompt]]:
    """A job of two arms with prompts of different lengths."""
    template = load_template(base)
    arms = (Arm("zero_shot", base, None, is_prompted=True), Arm("candidate", base, adapter, is_prompted=False))
    rows = [make_example(n, ask="x" * (n % 7 + 1)) for n in range(30)]
    section = EvaluationSection(few_shot=0)
    prompts = [p for a in arms for p in build_prompts(a, rows, section=section, train=(), template=template)]
    values: dict[str, object] = {
        "folder": folder,
        "arms": arms,
        "stop_ids": tuple(template.stop_ids),
        "max_new_tokens": 8,
        "batch": 4,
        "precision": "fp32",
        "threads": 1,
    }
    return GenerationJob.model_validate({**values, **changes}), prompts


def without_seconds(outputs: tuple[Output, ...]) -> list[tuple[str, ...]]:
    """What must be equal between two runs."""
    return sorted((o.id, o.arm, o.output, o.stop, str(o.tokens)) for o in outputs)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_generation_goes_on_where_it_was_killed_with_the_same_answers(
    base: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Killed or stopped after some batches, a torn last line: the next call adds what is missing, changes nothing."""
    adapter = write_adapter(tmp_path / "adapter", base)
    job, prompts = make_job(base, tmp_path / "whole", adapter)
    whole = generate(job, prompts, note=lambda _: None)
    assert Counter(o.arm for o in whole) == {"zero_shot": 30, "candidate": 30}
    assert any(
        a.output != b.output
        for a in whole
        for b in whole
        if a.id == b.id and a.arm == "zero_shot" and b.arm == "candidate"
    ), "the adapter changes something"

    lines = (tmp_path / "whole" / "outputs.jsonl").read_bytes().splitlines(keepends=True)
    job, prompts = make_job(base, tmp_path / "torn", adapter)
    killed_after(job, prompts, lines=8, number=number)
    with (tmp_path / "torn" / "outputs.jsonl").open("ab") as stream:
        stream.write(lines[20][: len(lines[20]) // 2])
    kept = (tmp_path / "torn" / "outputs.jsonl").read_bytes().splitlines(keepends=True)[:-1]
    again = generate(job, prompts, note=lambda _: None)
    assert without_seconds(again) == without_seconds(whole)
    assert (tmp_path / "torn" / "outputs.jsonl").read_bytes().splitlines(keepends=True)[: len(kept)] == kept


def killed_after(job: GenerationJob, prompts: list[Prompt], *, lines: int, number: signal.Signals) -> None:
    """Run the job in a process of its own and send the worker a signal once it has written `lines` lines."""
    code = (
        "import sys, pickle; from appliance.evaluation import generate\n"
        "job, prompts = pickle.load(sys.stdin.buffer)\n"
        "generate(job, prompts, note=lambda _: None)\n"
    )
    import pickle

    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdin is not None
    parent.stdin.write(pickle.dumps((job, prompts)))
    parent.stdin.close()
    file = job.folder / "outputs.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not file.is_file() or file.read_bytes().count(b"\n") < lines):
        time.sleep(0.005)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), number)
    assert parent.wait(timeout=60) != 0


def test_a_changed_job_does_not_continue_old_answers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another limit, or other weights in the same folder: all is answered anew. The worker's program, here."""

    def run(argv: list[str], **_options: object) -> WorkerEnd:
        return WorkerEnd(worker.main(Path(argv[-1])), "")

    monkeypatch.setattr(sys.modules[generate.__module__], "run_worker", run)
    monkeypatch.setattr("appliance.child.signal.signal", lambda *_: None)
    adapter = write_adapter(tmp_path / "adapter", base)
    job, prompts = make_job(base, tmp_path / "job", adapter)
    generate(job, prompts[:4], note=lambda _: None)
    shorter, _ = make_job(base, tmp_path / "job", adapter, max_new_tokens=3)
    assert all(o.tokens <= 3 for o in generate(shorter, prompts[:4], note=lambda _: None))
    kept = job.folder / "outputs.jsonl"
    kept.write_bytes(marked := kept.read_bytes().replace(b'"output":"', b'"output":"of old '))
    generate(shorter, prompts[:4], note=lambda _: None)
    assert kept.read_bytes() == marked, "nothing changed, nothing is done"
    generate(shorter.model_copy(update={"weights": ("another",)}), prompts[:4], note=lambda _: None)
    assert b"of old" not in kept.read_bytes()


def test_a_failed_child_is_one_message_with_its_log(base: Path, tmp_path: Path) -> None:
    """No traceback of the child reaches the user; the place of the log does."""
    job, prompts = make_job(base, tmp_path / "job", tmp_path / "adapter")
    with pytest.raises(EvaluationError, match=r"adapter_config\.json: cannot be read"):
        generate(job, prompts, note=lambda _: None)
    (write_adapter(tmp_path / "adapter", base) / "adapter_model.safetensors").unlink()
    with pytest.raises(EvaluationError, match=r"worker\.log"):
        generate(job, prompts, note=lambda _: None)


def test_damaged_outputs_are_told(tmp_path: Path) -> None:
    """A line in the middle that is no answer is not skipped."""
    good = json.dumps({k: getattr(make_output("x"), k) for k in Output.__struct_fields__})
    with pytest.raises(EvaluationError, match="damaged"):
        decode_outputs(f"{good}\nrubbish\n{good}\n".encode())
    assert len(decode_outputs(f"{good}\n{good[:9]}".encode())) == 1
    assert not decode_outputs(b"")
    assert InterruptedRunError.exit_code == 33
