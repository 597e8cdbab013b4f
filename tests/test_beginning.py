"""Laws of the shared beginning of prompts: read once, it changes no answer; where it could, it is not used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_silent_failures import ARCHITECTURES, MIXING, build_architecture
from tiny import write_base

from appliance.evaluation import Prompt
from appliance.model import load_template

BEGINNING = list(b"You are asked for the colour of a thing. Answer with the colour alone. ")
ENDINGS = [list(b"red"), list(b"a blue car, seen from far away"), list(b"x"), list(b"green grass on the other side")]
PROMPTS = [Prompt(f"r{n}", "zero_shot", BEGINNING + ending) for n, ending in enumerate(ENDINGS)]
# They attend in windows or chunks, or keep a state that is not keys and values of every token.
OTHERS = {"Mistral", "Gemma2", "Gemma3Text", "GptOss", "Llama4Text", "Mamba2", "Lfm2", "FalconH1", "Qwen3_5Text"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def answer(model: Any, base: Path, beginning: Any) -> list[str]:
    """What the model says to the prompts, in one batch of rows of different lengths."""
    from appliance.evaluation.generation import generate_batch

    template = load_template(base)
    said = generate_batch(model, PROMPTS, template=template, stop_ids=[257], max_new_tokens=8, beginning=beginning)
    return [o.output for o in said]


def build(base: Path, name: str) -> Any:
    """A model as evaluation has it, whose answers depend on where a token stands: small random weights attend alike."""
    model = build_architecture(base, name, initializer_range=0.2).eval()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXING])
def test_no_class_of_model_answers_otherwise_after_a_shared_beginning(base: Path, name: str) -> None:
    """Read once or with every prompt, the answers are the same: where they could not be, each prompt is read whole."""
    from appliance.evaluation.beginning import read_beginning

    model = build(base, name)
    beginning = read_beginning(model, PROMPTS)
    assert (list(beginning.ids) if beginning is not None else []) == ([] if name in OTHERS else BEGINNING)
    assert answer(model, base, beginning) == answer(model, base, None)


def test_an_adapters_beginning_is_read_with_the_adapter(base: Path) -> None:
    """Its answers are what they are without a shared beginning, and not the base's; virtual tokens come before all."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    from appliance.evaluation.beginning import read_beginning

    plain = answer(build(base, "Llama"), base, None)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, r=8, lora_alpha=64)
    model = get_peft_model(build(base, "Llama"), config).eval()
    beginning = read_beginning(model, PROMPTS)
    assert beginning is not None
    assert answer(model, base, beginning) == answer(model, base, None) != plain
    with model.disable_adapter():
        assert answer(model, base, read_beginning(model, PROMPTS)) == plain
    prompted = get_peft_model(build(base, "Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert read_beginning(prompted.eval(), PROMPTS) is None


def test_a_model_that_counts_places_itself_reads_every_prompt_whole(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its signature says: what it computes after a beginning is compared, on each arm."""
    from appliance.evaluation.beginning import read_beginning

    model = build(base, "Llama")
    assert read_beginning(model, PROMPTS) is not None
    inner = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **given: inner(**given | {"position_ids": None}))
    assert read_beginning(model, PROMPTS) is None


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([], 0),
        ([[*BEGINNING, 1]], 0),  # one prompt shares with none
        ([[*BEGINNING, 1], [*BEGINNING, 2, 3]], len(BEGINNING)),
        ([BEGINNING, [*BEGINNING, 2]], len(BEGINNING) - 1),  # the last token is what an answer is read from
        ([[*BEGINNING, 1], [*BEGINNING[:40], 2], [*BEGINNING, 1, 1]], 40),
        ([[*BEGINNING[:15], 1], [*BEGINNING[:15], 2]], 0),  # not worth a pass
        ([[5, *BEGINNING], [6, *BEGINNING]], 0),
    ],
)
def test_what_all_prompts_begin_with_is_shared(base: Path, prompts: Sequence[list[int]], shared: int) -> None:
    """As far as all of them go together, and no further than leaves each a token."""
    from appliance.evaluation.beginning import read_beginning

    beginning = read_beginning(
        build(base, "Llama"), [Prompt(f"r{n}", "zero_shot", ids) for n, ids in enumerate(prompts)]
    )
    assert (len(beginning.ids) if beginning is not None else 0) == shared
