"""Laws of the account of memory: what it says that a layer keeps of a token is what autograd saves of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_silent_failures import build_architecture
from test_training import make_job
from tiny import make_recipe, write_base

from appliance.model.shapes import read_sizes, read_weight_shapes
from appliance.model.weights import compute_as_trained
from appliance.plan.activations import Activations, count_activations, select_kind
from appliance.training.fused import fuse_lora
from appliance.training.levers import select_levers
from appliance.training.methods import build_model

CPU = torch.device("cpu")
TOKENS = 251  # no width has it, so it tells what is of tokens
SIZES = {
    "hidden_size": 128, "head_dim": 64, "num_key_value_heads": 1, "intermediate_size": 304, "sliding_window": 4096,
}  # fmt: skip
ARCHITECTURES = ("Llama", "Qwen3", "Gemma3Text")
METHODS: dict[str, dict[str, Any]] = {
    "fused": {"type": "lora", "rank": 1},
    "lora": {"type": "lora", "rank": 1, "dropout": 0.0},
    "dora": {"type": "lora", "rank": 1, "variant": "dora"},
    "qlora": {"type": "qlora", "rank": 1},
    "qlora on CUDA": {"type": "qlora", "rank": 1},
    "ia3": {"type": "ia3"},
    "prompt-tuning": {"type": "prompt-tuning", "tokens": 1},
    "full": {"type": "full"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def count_saved(model: Any, precision: Any) -> int:
    """Bytes that a forward pass saves of its tokens, weights left out, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights and {TOKENS, TOKENS + 1} & set(tensor.shape):
            saved[place] = tensor
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), compute_as_trained(precision, device=CPU):
        model(input_ids=torch.arange(TOKENS)[None])
    return sum(t.untyped_storage().nbytes() for t in saved.values())


@pytest.mark.parametrize("norm", ["auto", "standard"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_layer_keeps_what_the_plan_counts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, name: str, method: str, precision: str, norm: str
) -> None:
    """Whatever its widths, its norms, and what is trained in it: within 3%, by two layers more.

    Gemma norms queries and keys in fp32, which full training keeps: 6% there.
    """
    on_gpu = method.endswith("on CUDA")
    if on_gpu:  # asked without a device, torch speaks of CUDA
        asked = torch.is_autocast_enabled
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": asked(device))
    speed = {"norm": norm, **({"lora": "standard"} if method == "lora" else {})}
    recipe = make_recipe(method=METHODS[method], training={"precision": precision, "packing": False, "speed": speed})
    counted, saved = 0.0, []
    for layers in (1, 3):
        folder = shutil.copytree(base, tmp_path / f"base-{layers}")
        build_architecture(base, name, **SIZES, num_hidden_layers=layers).save_pretrained(folder)
        job = make_job(folder, tmp_path / f"job-{layers}", recipe)
        levers = select_levers(job.training, method=job.method, on_cuda=False)
        model = build_model(job, levers=levers, precision=precision, device=CPU)  # type: ignore[arg-type]
        if levers.lora == "fused":
            assert bool(fuse_lora(model)) == (method == "fused")
        saved.append(count_saved(model, precision))
        width = 2.0 if precision == "bf16" else 4.0
        kind = select_kind(recipe, on_gpu=on_gpu)
        counted = count_activations(
            kind, read_sizes(folder), read_weight_shapes(folder), width=width, fused_norms=norm == "auto"
        ).kept
    assert (saved[1] - saved[0]) / 2 / TOKENS == pytest.approx(
        counted, rel=0.07 if (name, method) == ("Gemma3Text", "full") else 0.03
    )


@pytest.mark.parametrize(
    ("told", "inner"),
    [
        ({"intermediate_size": 304}, 304),
        ({"intermediate_size": [128, 304, 128]}, 304),
        ({}, 448),
        ({"intermediate_size": 304, "moe_intermediate_size": 32, "num_experts_per_tok": 2}, 64),
        ({"moe_intermediate_size": 32, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 100}, 164),
    ],
)
def test_the_inner_width_is_what_a_token_meets(tmp_path: Path, told: dict[str, Any], inner: int) -> None:
    """Of the widest layer where a configuration has a list of them, which is no damage: Gemma 3n's has."""
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 128, "num_attention_heads": 4, **told}))
    assert read_sizes(tmp_path).inner == inner


def test_checkpointing_keeps_what_layers_hand_on_and_one_layer() -> None:
    """Copies of weights are made in the forward pass, a layer is computed again in the backward pass: never both."""
    found = Activations(layers=10, kept=100.0, handed_on=4.0, passing=50.0)
    assert found.estimate(2, checkpointing=False, copies=7.0) == 2 * (10 * 100 + 50) + 7
    assert found.estimate(2, checkpointing=True, copies=7.0) == 2 * (10 * 4 + 150)
    assert found.estimate(2, checkpointing=True, copies=1000.0) == 2 * 10 * 4 + 1000
