"""Laws of merging: the model that is written is the adapter on its base, or there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_training import make_job, run_in_process
from tiny import make_recipe, write_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from appliance.answers import Pulled, merge
from appliance.errors import ModelError
from appliance.model import Base
from appliance.model.merge import merge as merge_weights
from appliance.model.weights import load_model

CPU = torch.device("cpu")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4},
    "dora": {"type": "lora", "rank": 4, "variant": "dora"},
    "pissa": {"type": "lora", "rank": 4, "variant": "pissa"},
    "mica": {"type": "lora", "rank": 4, "variant": "mica"},
    "qlora": {"type": "qlora", "rank": 4},
    "ia3": {"type": "ia3"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model, in bf16."""
    folder = write_base(tmp_path_factory.mktemp("base"))
    load_model(folder, precision="bf16", device=CPU).save_pretrained(folder)
    return folder


def make_pulled(folder: Path, *, method: dict[str, Any] | None = None) -> Pulled:
    """A version in `folder`, as far as merging asks."""
    recipe = make_recipe(**({"method": method} if method else {}))
    return Pulled(
        folder=folder,
        label="v1",
        revision="r1",
        recipe=recipe,
        system_prompt=None,
        thinking=None,
        four_bit=False,
    )


def write_adapter(base: Path, folder: Path, *, size: float) -> Path:
    """A LoRA adapter of random weights whose change is about `size` times that of a trained one."""
    torch.manual_seed(3)
    model = load_model(base, precision="bf16", device=CPU)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1 * size)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_is_the_adapter_on_its_base(base: Path, tmp_path: Path, method: str) -> None:
    """By plain transformers, with the base's tokenizer and template; every kind that changes weights."""
    job = make_job(base, tmp_path / "job", make_recipe(method=METHODS[method]))
    run_in_process(job)
    figures = merge_weights(base, job.adapter, tmp_path / "merged")
    assert 0 <= figures["drift"] < 0.3 * figures["effect"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(load_model(base, precision="fp32", device=CPU), str(job.adapter))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        tuned = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            plain = adapted(input_ids=ids).logits
        found = merged(input_ids=ids).logits
    assert float((found - tuned).norm()) < 0.3 * float((plain - tuned).norm())
    turn = [{"role": "user", "content": "x"}]
    texts = [
        AutoTokenizer.from_pretrained(f).apply_chat_template(turn, tokenize=False) for f in (base, tmp_path / "merged")
    ]
    assert texts[0] == texts[1]
    assert (tmp_path / "merged" / "generation_config.json").is_file()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_a_change_that_rounding_loses_is_no_model(base: Path, tmp_path: Path) -> None:
    """Below the last bit of bf16 merged weights are the base's, whatever they are called."""
    adapter = write_adapter(base, tmp_path / "adapter", size=1e-3)
    with pytest.raises(ModelError, match=r"lost in the rounding of bf16 weights; serve the adapter"):
        merge_weights(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    wide = shutil.copytree(base, tmp_path / "wide")
    load_model(base, precision="fp32", device=CPU).save_pretrained(wide)
    figures = merge_weights(wide, adapter, tmp_path / "merged")
    assert figures["drift"] < 0.1 * figures["effect"], "fp32 weights hold it"


def test_what_cannot_be_merged_is_refused_in_words(base: Path, tmp_path: Path) -> None:
    """Full models, virtual tokens, a folder that is there, a damaged adapter: and nothing is left behind."""
    here, quiet = Base(folder=base, model="./base", revision="r1"), lambda _: None
    target = tmp_path / "out" / "model"
    for method, words in (
        ({"type": "full"}, "a model of its own; serve"),
        ({"type": "prompt-tuning"}, "prompt-tuning has no change of weights; serve it with transformers and PEFT"),
    ):
        with pytest.raises(ModelError, match=words):
            merge(make_pulled(tmp_path, method=method), target, base=here, note=quiet)
    with pytest.raises(ModelError, match="is there already; name another folder"):
        merge(make_pulled(tmp_path), tmp_path, base=here, note=quiet)
    adapter = write_adapter(base, tmp_path / "adapter", size=1.0)
    (adapter / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"v1: cannot be merged into \./base: .*[Hh]eader"):
        merge(make_pulled(adapter), target, base=here, note=quiet)
    assert list(target.parent.iterdir()) == []


def test_merging_appears_whole_and_says_of_what(base: Path, tmp_path: Path) -> None:
    """As the verb does it, in a child."""
    adapter = write_adapter(base, tmp_path / "adapter", size=1.0)
    here = Base(folder=base, model="./base", revision="r1")
    said: list[str] = []
    figures = merge(make_pulled(adapter), tmp_path / "model", base=here, note=said.append)
    facts = json.loads((tmp_path / "model" / "merged.json").read_bytes())
    assert facts == {"version": "v1", "base": {"model": "./base", "revision": "r1"}, "method": "lora", **figures}
    assert said == ["merging v1 into ./base"]
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "model", tmp_path / "model" / "model.safetensors")} == {
        0o755, 0o644,
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "model"]
