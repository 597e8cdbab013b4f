"""Template and mask: what is trained is exactly the assistant's turns and their stop tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import SPECIAL, TEMPLATE, write_tokenizer

from appliance.errors import ModelError, TrainingError
from appliance.example import Example, Message
from appliance.model import load_template, render_row

LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def make_example(*turns: tuple[str, str]) -> Example:
    """An example from (role, content) pairs."""
    return Example("r1", tuple(Message(r, c) for r, c in turns), provenance="human")


def read_spans(folder: Path, example: Example) -> list[str]:
    """The trained text, span by span."""
    template = load_template(folder)
    row = render_row(example, template)
    return [template.decode(row.input_ids[a:b]) for a, b in row.spans]


@pytest.mark.parametrize(
    ("template", "bos", "eos"),
    [(TEMPLATE, *SPECIAL), (LLAMA, "<|begin|>", "<|eot_id|>"), (MISTRAL, "<s>", "</s>")],
    ids=["chatml", "llama3", "mistral"],
)
def test_the_trained_text_is_the_assistant_turns_and_their_stop_tokens(
    tmp_path: Path, template: str, bos: str, eos: str
) -> None:
    """Without any generation marker in the template, every assistant turn is found, and nothing else."""
    write_tokenizer(tmp_path, template=template, bos=bos, eos=eos)
    example = make_example(("user", "a?"), ("assistant", "one"), ("user", "b?"), ("assistant", "two é"))
    spans = [s.strip() for s in read_spans(tmp_path, example)]
    assert spans == [f"one{eos}", f"two é{eos}"]


def test_the_rendering_is_that_of_transformers(tmp_path: Path) -> None:
    """Our own renderer and `apply_chat_template` give the same tokens."""
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, template=LLAMA, bos="<|begin|>", eos="<|eot_id|>")
    messages = [{"role": "system", "content": "s <é> & 'q'"}, {"role": "user", "content": " hi "}]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )
    ours = load_template(tmp_path).encode_prompt([Message(m["role"], m["content"]) for m in messages])
    assert ours == theirs["input_ids"]


@pytest.mark.parametrize(
    ("template", "rule"),
    [
        (TEMPLATE.replace("{% if add_gen", "{% if false and add_gen"), "not the answer"),
        (TEMPLATE.replace("'<|im_end|>\n'", "'\n'"), "no stop token ends turn 2"),
        ("{{ messages | length }}" + TEMPLATE, "is not a prefix of the whole rendering"),
        ("{{ bos_token }}" + TEMPLATE, "two BOS tokens"),
        ("{{ raise_exception('no system here') }}", "chat template refused"),
    ],
    ids=["no-generation-prompt", "no-stop", "rewrites-the-past", "double-bos", "raises"],
)
def test_a_template_that_would_train_the_wrong_tokens_is_refused(tmp_path: Path, template: str, rule: str) -> None:
    """Each silent failure is an error that names the row and the rule."""
    write_tokenizer(tmp_path, template=template)
    with pytest.raises(TrainingError, match=rule):
        read_spans(tmp_path, make_example(("user", "a?"), ("assistant", "one")))


def test_an_answer_that_holds_the_stop_token_is_refused(tmp_path: Path) -> None:
    """A target that stops in its middle would teach to stop too early."""
    write_tokenizer(tmp_path)
    with pytest.raises(TrainingError, match="is 'on', not the answer"):
        read_spans(tmp_path, make_example(("user", "a?"), ("assistant", "on<|im_end|>e")))


def test_a_model_without_a_chat_template_or_a_stop_token_is_refused(tmp_path: Path) -> None:
    """A base model that cannot hold a conversation is named as such."""
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no eos_token_id"):
        load_template(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 257}')
    with pytest.raises(ModelError, match="no chat template"):
        load_template(tmp_path)
