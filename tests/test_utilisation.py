"""Laws of MFU: the model's own arithmetic over the datasheet's peak, and no figure where either is not known."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_monitor import make_event
from test_plan import WITH_VISION, save_with_vision
from test_training import make_job, run_in_process
from tiny import make_recipe, write_base

from appliance.method import FullMethod, LoraMethod, QloraMethod
from appliance.model.shapes import ModelSizes, read_sizes, read_weight_shapes
from appliance.training import utilisation
from appliance.training.board import open_board
from appliance.training.utilisation import PEAK_FLOPS, Yardstick, count_flops, count_matrices, find_yardstick
from appliance.training.view import Status, render_line, render_view

LORA, H100 = LoraMethod(type="lora"), "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model: a tied head."""
    return write_base(tmp_path_factory.mktemp("base"))


def make_llama_8b() -> tuple[dict[str, tuple[int, ...]], ModelSizes]:
    """Names and shapes of Llama 3.1 8B."""
    matrices = {
        "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }  # fmt: skip
    layers = {f"model.layers.{i}.{n}.weight": s for i in range(32) for n, s in matrices.items()}
    norms = {f"model.layers.{i}.input_layernorm.weight": (4096,) for i in range(32)}
    ends = {"model.embed_tokens.weight": (128256, 4096), "lm_head.weight": (128256, 4096)}
    return {**layers, **norms, **ends}, ModelSizes(hidden=4096, layers=32, vocabulary=128256, keys=1024)


def test_the_count_is_that_of_the_model_itself(base: Path) -> None:
    """Every linear layer that torch would run, and the head once although it shares the embeddings' weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert count_matrices(read_weight_shapes(base), read_sizes(base)) == sum(m.weight.numel() for m in linears)


@pytest.mark.parametrize("name", WITH_VISION)
def test_a_tower_for_images_costs_a_text_nothing(base: Path, tmp_path: Path, name: str) -> None:
    """The count is that of the language model in it and the head."""
    from appliance.model.weights import load_model

    folder = save_with_vision(shutil.copytree(base, tmp_path / "base"), name)
    model = load_model(folder, precision="fp32", device=torch.device("cpu"))
    linears = [m.weight for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings().weight
    assert count_matrices(read_weight_shapes(folder), read_sizes(folder)) == sum(w.numel() for w in (*linears, head))


def test_the_figures_of_a_known_model() -> None:
    """Golden: Llama 3.1 8B has 8.03e9 parameters, of which 7.50e9 multiply every token; 12,000 tokens/s on an H200."""
    matrices = count_matrices(*make_llama_8b())
    assert matrices == 7_504_658_432
    assert count_flops(matrices, method="lora") == 30_018_633_728
    assert count_flops(matrices, method="full") == 45_027_950_592
    yardstick = Yardstick(count_flops(matrices, method="lora"), PEAK_FLOPS["NVIDIA H200"])
    assert yardstick.measure(12_000) == 0.3642
    assert yardstick.to_json(12_000) == {"mfu": 0.3642, "flops_per_token": 30_018_633_728, "peak_flops": 989e12}


def test_a_frozen_base_costs_two_thirds(base: Path) -> None:
    """6 a weight for full training; 4 where the base has no gradient of its own, quantised or not."""
    found = [
        find_yardstick(base, method=m, device_name=H100, precision="bf16")
        for m in (FullMethod(type="full"), LORA, QloraMethod(type="qlora"))
    ]
    costs = [y.flops_per_token for y in found if y is not None]
    assert costs == [costs[0], costs[0] * 2 / 3, costs[0] * 2 / 3]


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "NVIDIA L40",  # neither an L4 nor an L40S
        "NVIDIA GH200 480GB",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",  # a part of one
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_an_unknown_device_has_no_figure(base: Path, name: str) -> None:
    """A name that only resembles a known one is not known."""
    assert find_yardstick(base, method=LORA, device_name=name, precision="bf16") is None


def test_what_the_table_does_not_cover_has_no_figure(base: Path, tmp_path: Path) -> None:
    """fp32 (the peaks are of bf16), a mixture of experts, headers without linear layers or sizes."""
    weights, sizes = make_llama_8b()
    assert find_yardstick(base, method=LORA, device_name=H100, precision="fp32") is None
    assert count_matrices({**weights, "model.layers.0.mlp.experts.0.up_proj.weight": (8, 8)}, sizes) is None
    assert count_matrices({}, sizes) is None
    assert count_matrices(weights, ModelSizes(hidden=4096, layers=32, vocabulary=0, keys=1)) is None
    (tmp_path / "config.json").write_text("{}")
    assert find_yardstick(tmp_path, method=LORA, device_name=H100, precision="bf16") is None


@pytest.mark.parametrize("peak", [None, 1e9], ids=["unknown", "known"])
def test_a_run_says_its_mfu_where_the_peak_is_known(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peak: float | None
) -> None:
    """Each step and the summary, by the tokens that were computed; on a CPU as it is, the word does not occur."""
    if peak is not None:
        monkeypatch.setitem(utilisation.PEAK_FLOPS, "cpu", peak)
    job = make_job(base, tmp_path, make_recipe(training={"epochs": 1, "precision": "bf16"}))
    summary = run_in_process(job)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    steps = [r for r in records if "loss" in r]
    if peak is None:
        assert not any("mfu" in r for r in [*records, summary])
        return
    cost = count_flops(count_matrices(read_weight_shapes(base), read_sizes(base)) or 0, method="lora")
    assert (summary["flops_per_token"], summary["peak_flops"]) == (cost, peak)
    assert summary["tokens_computed"] < summary["tokens"], "rows share a prefix, which is computed once"
    assert summary["mfu"] == pytest.approx(summary["tokens_computed"] / summary["seconds"] * cost / peak, abs=2e-3)
    for before, record in pairwise([{"tokens": 0, "tokens_computed": 0}, *steps]):
        share = (record["tokens_computed"] - before["tokens_computed"]) / (record["tokens"] - before["tokens"])
        assert record["mfu"] == pytest.approx(record["tokens_per_second"] * share * cost / peak, rel=1e-2)
    assert not any("mfu" in r for r in records if "validation_loss" in r)
    with open_board(tmp_path / "board", journal=tmp_path / "metrics.jsonl", note=print) as copy:
        copy()
    (events,) = (tmp_path / "board").iterdir()
    assert events.read_bytes().count(b"\x03mfu") == len(steps), "and to TensorBoard"


@pytest.mark.parametrize("more", [{}, {"mfu": 0.4123}], ids=["unknown", "known"])
def test_the_view_shows_mfu_where_there_is_one(more: dict[str, float]) -> None:
    """Behind the tokens a second, on a terminal and in a log; nothing else is moved or cut."""
    status = Status()
    status.take(make_event(1, **more))
    for text in (render_line(status), "\n".join(render_view(status, width=80))):
        assert ("268 tokens/s  MFU 41.2%" in text) == bool(more)
        assert ("MFU" in text) == bool(more)
        assert "1.50 GiB" in text
