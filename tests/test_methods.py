"""Laws of the methods: each trains for real, changes the model, is counted exactly and comes back the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_training import make_examples, make_job, run_in_process
from tiny import make_recipe, write_base

from appliance.evaluation.arms import Arm
from appliance.model import load_template
from appliance.model.shapes import read_sizes, read_weight_shapes
from appliance.plan.plan import count_trainable


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


ADAPTERS: list[dict[str, Any]] = [
    {"type": "lora", "rank": 4},
    {"type": "lora", "rank": 4, "variant": "rslora"},
    {"type": "lora", "rank": 4, "variant": "dora"},
    {"type": "lora", "rank": 4, "variant": "gaussian"},
    {"type": "lora", "rank": 4, "variant": "orthogonal"},
    {"type": "lora", "rank": 4, "variant": "pissa"},
    {"type": "lora", "rank": 4, "variant": "olora"},
    {"type": "lora", "rank": 4, "variant": "mica"},
    {"type": "lora", "rank": 4, "targets": ["self_attn.q_proj", "v_proj"], "dropout": 0.1},
    {"type": "qlora", "rank": 4},
    {"type": "qlora", "rank": 4, "variant": "rslora"},
    {"type": "qlora", "rank": 4, "variant": "dora"},
    {"type": "qlora", "rank": 4, "variant": "gaussian"},
    {"type": "qlora", "rank": 4, "variant": "orthogonal"},
    {"type": "qlora", "rank": 4, "variant": "olora"},
    {"type": "qlora", "rank": 4, "variant": "loftq"},
    {"type": "prompt-tuning", "tokens": 6},
    {"type": "prompt-tuning", "tokens": 6, "init": "random"},
    {"type": "prompt-tuning", "tokens": 12, "init": "text", "text": "colour:"},
    {"type": "prefix-tuning", "tokens": 6},
    {"type": "prefix-tuning", "tokens": 6, "init": "random", "projection": "mlp", "hidden": 24},
    {"type": "p-tuning", "tokens": 6, "hidden": 32},
    {"type": "p-tuning", "tokens": 6, "hidden": 16, "encoder": "lstm"},
    {"type": "ia3"},
    {"type": "ia3", "targets": ["q_proj", "up_proj"], "feedforward": []},
]
RATES = {"prompt-tuning": 0.1, "prefix-tuning": 0.1, "p-tuning": 0.02, "ia3": 0.1}


def name(method: dict[str, Any]) -> str:
    """A method's words, for test ids."""
    return "-".join(str(v) for v in method.values() if isinstance(v, str))


def train(base: Path, folder: Path, method: dict[str, Any], **training: Any) -> tuple[Any, dict[str, Any]]:
    """Train the tiny model and return the job and its summary."""
    rate = RATES.get(method["type"], 0.01)
    recipe = make_recipe(method=method, training={"learning_rate": rate, "precision": "fp32", **training})
    job = make_job(base, folder, recipe)
    return job, run_in_process(job)


def read_logits(model: Any, base: Path) -> Any:
    """The logits of a row's last position."""
    import torch

    ids = load_template(base).encode_prompt(make_examples(1)[0].prompt)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("method", ADAPTERS, ids=name)
def test_every_method_learns_and_comes_back_the_same(
    base: Path, tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss falls, the logits change, the count is the plan's, and evaluation loads what was trained."""
    import torch

    from appliance.evaluation.generation import load_arms, use_arm
    from appliance.training import trainer

    seen: dict[str, Any] = {}
    build = trainer.build_model

    def keep(*arguments: Any, **options: Any) -> Any:
        seen["model"] = build(*arguments, **options)
        return seen["model"]

    monkeypatch.setattr(trainer, "build_model", keep)
    job, summary = train(base, tmp_path, method)
    assert summary["last_loss"] < summary["first_loss"]
    assert summary["trainable_parameters"] == count_trainable(job.method, read_weight_shapes(base), read_sizes(base))
    arm = Arm("candidate", base, job.adapter, is_prompted=False)
    loaded = load_arms([arm], folder=base, precision="fp32")
    with use_arm(loaded, arm):
        tuned = read_logits(loaded, base)
    with use_arm(loaded, Arm("zero_shot", base, None, is_prompted=False)):
        plain = read_logits(loaded, base)
    untouched = read_logits(load_arms([], folder=base, precision="fp32"), base)
    print(name(method), summary["first_loss"], summary["last_loss"], float((tuned - plain).abs().max()), float((tuned - read_logits(seen["model"].eval(), base)).abs().max()))
    assert not torch.allclose(tuned, plain, atol=1e-4)
    assert torch.equal(plain, untouched), "the base in the same process is the base"
    if method["type"] != "qlora":
        torch.testing.assert_close(tuned, read_logits(seen["model"].eval(), base), atol=1e-4, rtol=1e-3)
    assert str(tmp_path) not in (job.adapter / "adapter_config.json").read_text()
    assert str(base) not in (job.adapter / "adapter_config.json").read_text()
