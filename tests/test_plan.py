"""Laws of the plan: it is exact where it can be, and it warns where the guide would."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_silent_failures import ARCHITECTURES, MIXING, build_architecture
from test_training import make_job, run_in_process
from tiny import build_adapted, make_recipe, write_base
from transformers import GPT2Config, GPT2LMHeadModel

from appliance.errors import ModelError, TrainingError
from appliance.method import LoraMethod
from appliance.model.shapes import list_experts, list_linears, read_sizes, read_weight_shapes
from appliance.model.weights import load_model
from appliance.plan import Machine, Plan, build_plan, plan_answering, read_machine
from appliance.plan.machine import parse_gpu
from appliance.plan.plan import count_trainable, select_micro_batch
from appliance.recipe import Recipe, count_steps
from appliance.training.arguments import build_adapter_arguments
from appliance.training.levers import select_levers
from appliance.training.methods import build_model

CPU = torch.device("cpu")
SMALL = Machine(cores=2, memory_bytes=8 << 30)
TRAINING_8B = {"effective_batch": 16, "max_length": 1024, "learning_rate": 2e-4}


def make_gpus(gib: int) -> Machine:
    """A host with GPUs of so much memory."""
    return Machine(cores=8, memory_bytes=64 << 30, gpu="a GPU", gpu_memory_bytes=gib << 30, gpus=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    return write_base(tmp_path_factory.mktemp("base"))


def plan(recipe: Recipe, base: Path, *, rows: int = 60, length: int = 50, machine: Machine = SMALL) -> Plan:
    """A plan over equal rows."""
    return build_plan(
        recipe, lengths=[length] * rows, trained_tokens=5 * rows, validation_rows=6, base=base, machine=machine
    )


@pytest.mark.parametrize(
    "method",
    [
        LoraMethod(type="lora", rank=4),
        LoraMethod(type="lora", rank=8, variant="dora"),
        LoraMethod(type="lora", rank=2, targets=("q_proj", "down_proj")),
    ],
    ids=["all", "dora", "two"],
)
def test_trained_parameters_are_those_that_peft_makes(base: Path, method: LoraMethod) -> None:
    """Counted from the headers of the weights, without torch, and exact."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**build_adapter_arguments(method)))
    assert count_trainable(method, read_weight_shapes(base), read_sizes(base)) == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    "method",
    [
        {"type": "lora", "rank": 4},
        {"type": "lora", "rank": 4, "variant": "dora"},
        {"type": "lora", "rank": 4, "variant": "mica", "targets": ["c_attn", "c_fc"]},
        {"type": "ia3", "targets": ["c_attn", "mlp.c_proj"], "feedforward": ["mlp.c_proj"]},
    ],
    ids=["lora", "dora", "mica", "ia3"],
)
def test_trained_parameters_of_matrices_kept_the_other_way_round(
    base: Path, tmp_path: Path, method: dict[str, Any]
) -> None:
    """GPT-2's files hold (in, out); what is trained there is counted by inputs and outputs all the same."""
    folder = shutil.copytree(base, tmp_path / "base")
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": read_sizes(base).vocabulary}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=257)).save_pretrained(folder)
    shutil.copy(base / "generation_config.json", folder)
    recipe = make_recipe(method=method)
    model = build_adapted(make_job(folder, tmp_path, recipe))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_trainable(recipe.method, read_weight_shapes(folder), read_sizes(folder)) == trained


@pytest.fixture(scope="module")
def experts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts, as it is saved: a file has each expert's matrices, a model one tensor of them all."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("experts") / "base")
    build_architecture(base, "Qwen3Moe").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj", "gate_proj", "up_proj", "down_proj"), ("q_proj", "v_proj")]
)
def test_trained_parameters_of_experts_are_those_that_peft_makes(
    experts: Path, tmp_path: Path, targets: str | tuple[str, ...]
) -> None:
    """Which they are in a training child, too: their names are in no layer of the model."""
    method = LoraMethod(type="lora", rank=4, targets=targets)
    job = make_job(experts, tmp_path, make_recipe(method=method.model_dump()))
    model = build_model(
        job, levers=select_levers(job.training, method=method, on_cuda=False), precision="fp32", device=CPU
    )
    counted = count_trainable(method, read_weight_shapes(experts), read_sizes(experts))
    assert counted == model.get_nb_trainable_parameters()[0]


GATED_DELTA = {
    "head_dim": 16, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
UNEVEN: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Next": {
        **GATED_DELTA, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "Llama4Text": {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 128},
    "GptOss": {"num_local_experts": 4, "head_dim": 16},
    "Mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16},
    "Qwen3_5Text": GATED_DELTA,
}  # fmt: skip
WITH_VISION = ("Gemma3", "Mistral3", "SmolVLM")  # the first a causal model to transformers, the others listed apart
NOT_ADAPTED = re.compile(r"\.gate\.|router|shared_expert_gate|vision|multi_modal|connector|(mamba|mixer)\.out_proj")


def save_with_vision(folder: Path, name: str) -> Path:
    """A model of text and images: its tower has layers of the same names."""
    import transformers

    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": read_sizes(folder).vocabulary, "pad_token_id": 257,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")()
    text["model_type"], vision["model_type"] = config.text_config.model_type, config.vision_config.model_type
    sized = type(config)(text_config=text, vision_config=vision)
    getattr(transformers, f"{name}ForConditionalGeneration")(sized).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*UNEVEN, *WITH_VISION])
def test_all_linear_layers_are_those_that_an_adapter_belongs_on(base: Path, tmp_path: Path, name: str) -> None:
    """No router, no tower for images, no gate that the rank does not fit in, and the plan counts what is there."""
    folder = shutil.copytree(base, tmp_path / "base")
    if name in WITH_VISION:
        save_with_vision(folder, name)
    else:
        build_architecture(base, name, **UNEVEN[name]).save_pretrained(folder)
    shutil.copy(base / "generation_config.json", folder)
    method = LoraMethod(type="lora", rank=8)
    recipe = make_recipe(method=method.model_dump())
    levers = select_levers(recipe.training, method=method, on_cuda=False)
    model = build_model(make_job(folder, tmp_path, recipe), levers=levers, precision="fp32", device=CPU)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert not [n for n in trained if NOT_ADAPTED.search(n)]
    counted = count_trainable(method, read_weight_shapes(folder), read_sizes(folder))
    shared = 4 * 3 * 8 * (64 + 32) if name == "Qwen3Next" else 0  # PEFT takes their names for those of experts
    assert counted - shared == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("name", ["GptOss", "Llama4Text"])
def test_experts_that_no_adapter_is_put_on_are_told(base: Path, tmp_path: Path, name: str) -> None:
    """Most of gpt-oss is in its experts: who trains it is to know what is trained, and that 4 bits save little."""
    folder = shutil.copytree(base, tmp_path / "base")
    build_architecture(base, name, **UNEVEN[name]).save_pretrained(folder)
    (left,) = (w for w in plan(make_recipe(method={"type": "lora", "rank": 4}), folder).warnings if "experts" in w)
    assert re.search(r"adapters leave the experts of this model, \d\d% of its weights, as they are", left)
    warned = plan(make_recipe(method={"type": "qlora", "rank": 4}), folder).warnings
    assert [w for w in warned if re.search(r"qlora leaves the experts .* in 16 bits", w)]
    assert not [w for w in plan(make_recipe(method={"type": "full"}), folder).warnings if "experts" in w]


def test_a_model_that_reads_images_too_trains_on_text(base: Path, tmp_path: Path) -> None:
    """Of a class that transformers lists apart from causal models the text is trained all the same."""
    folder = save_with_vision(shutil.copytree(base, tmp_path / "base"), "Mistral3")
    shutil.copy(base / "generation_config.json", folder)
    losses: list[float] = []

    def watch(**event: object) -> None:
        losses.extend([float(str(event["loss"]))] if "loss" in event else [])

    summary = run_in_process(make_job(folder, tmp_path, make_recipe(training={"epochs": 4})), emit=watch)
    assert summary["packing"], "its rows keep apart"
    assert losses[-1] < losses[0] - 0.5


def test_experts_that_peft_does_not_know_are_refused_where_they_are_asked_for(
    experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would adapt the other targets and say nothing."""
    from peft.utils import transformers_weight_conversion

    monkeypatch.setattr(transformers_weight_conversion, "_MODEL_TO_CONVERSION_PATTERN", {})
    method = LoraMethod(type="lora", rank=4, targets=("q_proj", "gate_proj"))
    job = make_job(experts, tmp_path, make_recipe(method=method.model_dump()))
    with pytest.raises(TrainingError, match=r"method\.targets: gate_proj names experts.*; name other layers"):
        build_model(job, levers=select_levers(job.training, method=method, on_cuda=False), precision="fp32", device=CPU)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"method": {"type": "lora", "rank": 4, "variant": "pissa"}}, r"method\.variant: pissa adapts single matrices"),
        ({"method": {"type": "lora", "rank": 4, "variant": "dora"}}, r"method\.variant: dora adapts single matrices"),
        ({"method": {"type": "lora", "rank": 4, "dropout": 0.1}}, r"method\.dropout: .*without dropout"),
        ({"forgetting": {"ewc": {"strength": 1.0}}}, r"forgetting\.ewc: knows what single matrices were"),
    ],
)
def test_what_experts_do_not_take_is_refused_by_the_plan(experts: Path, overrides: dict[str, Any], words: str) -> None:
    """And not by a traceback of the training child; other layers take it."""
    recipe = make_recipe(**overrides)
    with pytest.raises(TrainingError, match=words):
        plan(recipe, experts)
    method = recipe.method.model_copy(update={"targets": ("q_proj", "v_proj")})
    assert plan(recipe.model_copy(update={"method": method}), experts).trainable_parameters


def test_experts_are_not_rounded_and_the_plan_knows(base: Path, experts: Path) -> None:
    """Bitsandbytes rounds linear layers; memory is counted so, and the recipe's author is told."""
    model = load_model(experts, precision="bf16", device=CPU, four_bit=True)
    rounded = {n.removesuffix(".weight") for n, p in model.named_parameters() if hasattr(p, "quant_state")}
    weights = read_weight_shapes(experts)
    counted = list_linears(weights).keys() - list_experts(weights).keys()
    assert rounded <= counted
    assert {n.rpartition(".")[2] for n in counted - rounded} == {"gate"}, "the routers, which are small"
    qlora = make_recipe(method={"type": "qlora", "rank": 4})
    (warning,) = [w for w in plan(qlora, experts).warnings if "experts" in w]
    assert "% of its weights, in 16 bits" in warning
    assert not [w for w in plan(qlora, base).warnings if "experts" in w]


def test_steps_are_those_of_training(base: Path) -> None:
    """The plan's steps are the trainer's."""
    recipe = make_recipe(training={"epochs": 2.5, "effective_batch": 8})
    assert plan(recipe, base, rows=61).steps == count_steps(recipe.training, rows=61) == 20


@pytest.mark.parametrize(("effective", "longest", "micro"), [(8, 100, 8), (8, 1000, 4), (16, 4096, 1), (6, 1500, 2)])
def test_the_micro_batch_divides_the_effective_batch(effective: int, longest: int, micro: int) -> None:
    """Accumulation is whole, and the worst case is bounded."""
    plenty = select_micro_batch(effective, longest=longest, most=4096, wanted="auto", fits=lambda _m, _c: True)
    assert plenty == (micro, False)
    assert effective % micro == 0


@pytest.mark.parametrize(
    ("wanted", "free", "chosen"),
    [
        ("auto", 4, (4, False)),  # half the rows without recomputing
        ("auto", 1, (8, True)),  # one row of 500 tokens would leave the device idle
        ("off", 1, (1, False)),
        ("on", 8, (8, True)),
    ],
)
def test_memory_decides_between_fewer_rows_and_recomputing(wanted: str, free: int, chosen: tuple[int, bool]) -> None:
    """The micro-batch is the largest that fits; activations are recomputed only where too few rows would fit."""
    found = select_micro_batch(8, longest=500, most=4096, wanted=wanted, fits=lambda m, c: c or m <= free)
    assert found == chosen


def test_a_gpu_takes_more_tokens_and_never_holds_the_logits(base: Path) -> None:
    """The same rows: a larger micro-batch, and no memory for the logits of packed rows."""
    gpu = Machine(cores=2, memory_bytes=8 << 30, gpu="NVIDIA H100", gpu_memory_bytes=80 << 30)
    recipe = make_recipe(training={"effective_batch": 16, "max_length": 1000})
    assert plan(recipe, base, length=1000).micro_batch == 4
    assert plan(recipe, base, length=1000, machine=gpu).micro_batch == 16
    padded = make_recipe(training={"effective_batch": 16, "max_length": 1000, "packing": False})
    held = (
        plan(padded, base, length=1000, machine=gpu).peak_bytes
        - plan(recipe, base, length=1000, machine=gpu).peak_bytes
    )
    assert held == pytest.approx(1.02 * (4.0 * 16_000 * read_sizes(base).vocabulary - 2**28), rel=0.01)


@pytest.mark.parametrize(
    ("packing", "machine", "same"), [("auto", "gpu", 800), (False, "gpu", 1000), ("auto", "cpu", 1000)]
)
def test_on_a_gpu_the_largest_micro_batch_is_of_the_longest_rows(
    base: Path, packing: Any, machine: str, same: int
) -> None:
    """Packed rows are as many tokens as they are, on average 800 here; four padded ones are four of the longest."""
    where = make_gpus(80) if machine == "gpu" else SMALL
    recipe = make_recipe(training={"effective_batch": 4, "max_length": 1000, "packing": packing})
    peaks = {
        lengths: build_plan(
            recipe, lengths=lengths, trained_tokens=60, validation_rows=6, base=base, machine=where
        ).peak_bytes
        for lengths in ((1000, 100, 734, 733, 733), (same,) * 5)
    }
    found, expected = peaks.values()
    assert found == expected


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MIXING])
def test_the_plan_knows_whose_layers_carry_a_state(base: Path, tmp_path: Path, name: str) -> None:
    """Their rows are padded, so logits are held, and the recipe's author is told; a run finds out about the others."""
    folder = shutil.copytree(base, tmp_path / "base")
    build_architecture(base, name).save_pretrained(folder)
    gpu = Machine(cores=2, memory_bytes=8 << 30, gpu="NVIDIA H100", gpu_memory_bytes=80 << 30)
    left_open = plan(make_recipe(), folder, machine=gpu)
    ruled_out = plan(make_recipe(training={"packing": False}), folder, machine=gpu)
    carries = name in MIXING.keys() - {"StableLm"}
    assert (left_open.peak_bytes == ruled_out.peak_bytes) == carries
    assert any("trained padded" in w for w in left_open.warnings) == carries
    assert not any("trained padded" in w for w in ruled_out.warnings)


def test_of_several_devices_each_has_its_rows_and_its_memory(base: Path) -> None:
    """A GPU has its own memory; processes on a CPU share it. The steps are those of one device."""
    recipe = make_recipe(training={"effective_batch": 16, "max_length": 1000})
    shared = make_recipe(training={"effective_batch": 16, "max_length": 1000}, needs={"devices": 4})
    gpus = Machine(cores=8, memory_bytes=64 << 30, gpu="NVIDIA H100", gpu_memory_bytes=80 << 30, gpus=4)
    one, four = plan(recipe, base, length=1000, machine=gpus), plan(shared, base, length=1000, machine=gpus.share(4))
    assert (one.micro_batch, four.micro_batch) == (16, 4)
    assert (one.steps, one.tokens, one.budget_bytes) == (four.steps, four.tokens, four.budget_bytes)
    assert (four.devices, gpus.share(4).cores) == (4, 2)
    assert Machine(cores=2, memory_bytes=64 << 30).share(4).budget_bytes == 16 << 30


@pytest.fixture(scope="module")
def base_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Headers and sizes of an 8B model, its weights a hole in the file."""
    folder = tmp_path_factory.mktemp("8b")
    hidden, inner, keys, vocabulary = 4096, 14336, 1024, 128256
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for i in range(32):
        layer = {"q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden)}
        layer |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        shapes |= {f"model.layers.{i}.{name}_proj.weight": shape for name, shape in layer.items()}
    at, header = 0, {}
    for name, (rows, columns) in shapes.items():
        size = 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, at + size]}
        at += size
    lead = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(lead).to_bytes(8, "little") + lead)
        stream.truncate(8 + len(lead) + at)
    sizes = {"hidden_size": hidden, "num_hidden_layers": 32, "vocab_size": vocabulary, "num_attention_heads": 32}
    (folder / "config.json").write_text(json.dumps(sizes | {"num_key_value_heads": 8, "model_type": "llama"}))
    return folder


@pytest.mark.parametrize(
    ("gib", "wanted", "sharded", "warned"),
    [
        (80, "auto", False, ""),
        (80, "sharded", True, ""),
        (24, "auto", False, ""),
        (20, "auto", True, ""),
        (20, "whole", False, ""),
        (16, "whole", False, "exceeds the 16.0 GiB here"),
        (16, "auto", True, ""),
    ],
)
def test_a_base_that_does_not_fit_is_shared_out(
    base_8b: Path, gib: int, wanted: str, sharded: bool, warned: str
) -> None:
    """8B on two GPUs: whole where it fits, in parts where it does not or the recipe says so; with what will not fit."""
    recipe = make_recipe(training=TRAINING_8B, needs={"devices": 2, "weights": wanted})
    found = plan(recipe, base_8b, length=1024, machine=make_gpus(gib))
    assert found.sharded == sharded
    assert (warned in "\n".join(found.warnings)) if warned else not found.warnings


def test_a_4_bit_base_is_made_whole_before_it_is_shared_out(base_8b: Path) -> None:
    """Its parts are half a byte a weight; what the first moment needs is in the peak all the same."""
    peaks = {}
    for length, devices in [(1, 4), (1024, 4), (1024, 64)]:
        needs = {"devices": devices, "weights": "sharded"}
        recipe = make_recipe(method={"type": "qlora"}, training={**TRAINING_8B, "effective_batch": 64}, needs=needs)
        peaks[length, devices] = plan(recipe, base_8b, length=length, machine=make_gpus(80)).peak_bytes
    whole = 0.516 * 6_979_321_856 + 2 * 2 * 128256 * 4096
    assert peaks[1, 4] == pytest.approx(1.07 * whole + 2**30, rel=1e-3)
    assert peaks[1024, 4] > peaks[1024, 64] >= peaks[1, 4]


@pytest.mark.parametrize(
    ("method", "devices", "gib", "how", "warned"),
    [
        ("qlora", 1, 24, (1, False), ""),
        (
            "qlora",
            1,
            20,
            (1, True),
            "evaluation answers with the base in 4 bits, as it is trained: in 16 bits it takes",
        ),
        ("qlora", 2, 20, (2, False), ""),
        ("qlora", 2, 10, (1, True), "evaluation answers with the base in 4 bits"),
        ("lora", 1, 16, (1, False), ""),
        ("lora", 2, 16, (2, False), ""),
        ("lora", 4, 16, (2, False), ""),
        ("lora", 4, 4, (4, False), "evaluation spreads the base over 4 devices, about 17.0 of 4.0 GiB of each"),
    ],
)
def test_a_base_is_judged_as_it_is_where_it_fits_else_spread_else_in_4_bits(  # noqa: PLR0917 - a table
    base_8b: Path, method: str, devices: int, gib: int, how: tuple[int, bool], warned: str
) -> None:
    """8B takes 16 GB in 16 bits: on one GPU, over those of the recipe, or as qlora trained it; told before."""
    recipe = make_recipe(method={"type": method}, training=TRAINING_8B, needs={"devices": devices})
    found = plan_answering(recipe, weights=read_weight_shapes(base_8b), machine=make_gpus(gib))
    assert (found.devices, found.four_bit) == how
    said = [w for w in plan(recipe, base_8b, length=1024, machine=make_gpus(gib)).warnings if "evaluation" in w]
    assert [w.startswith(warned) for w in said] == [True] * bool(warned)


def test_a_device_holds_its_part_and_two_layers(base_8b: Path) -> None:
    """What sharing the base out saves: the other devices' part of the layers, less the two that are in use."""
    whole, parts = (
        plan(make_recipe(training=TRAINING_8B, needs={"devices": 4, "weights": w}), base_8b, machine=make_gpus(80))
        for w in ("whole", "sharded")
    )
    layers = 2 * 6_979_321_856
    assert whole.micro_batch == parts.micro_batch
    assert whole.peak_bytes - parts.peak_bytes == pytest.approx(1.07 * layers * (3 / 4 - 2 / 32), rel=1e-6)


def test_full_training_of_8b_fits_eight_gpus_in_parts(base_8b: Path) -> None:
    """16 bytes a weight are 128 GB on one; each of eight holds an eighth, a layer on the way, and what is beside."""
    recipe = make_recipe(
        method={"type": "full"},
        training={**TRAINING_8B, "learning_rate": 1e-5, "effective_batch": 64},
        needs={"devices": 8},
    )
    found = plan(recipe, base_8b, length=1024, machine=make_gpus(80))
    assert found.sharded
    assert not [w for w in found.warnings if "exceeds" in w]
    parameters, linear = found.parameters, 6_979_321_856
    held = 16 * parameters / 8 + 10 * linear / 32 + 8 * (parameters - linear)
    assert found.peak_bytes > 1.07 * held + 2**30
    one = recipe.model_copy(update={"needs": recipe.needs.model_copy(update={"weights": "whole"})})
    assert plan(one, base_8b, length=1024, machine=make_gpus(80)).peak_bytes > 1.07 * 16 * parameters


def test_full_training_in_bf16_counts_the_copies_it_computes_with(base_8b: Path) -> None:
    """Two bytes a weight of the layers, beside gradients where a step has more than one micro-batch."""
    training = {**TRAINING_8B, "learning_rate": 1e-5, "effective_batch": 8, "gradient_checkpointing": "on"}
    peaks = {
        (precision, devices): plan(
            make_recipe(
                method={"type": "full"},
                training={**training, "precision": precision},
                needs={"devices": devices, "weights": "whole"},
            ),
            base_8b,
            length=1,
            machine=make_gpus(80),
        ).peak_bytes
        for precision in ("bf16", "fp32")
        for devices in (1, 8)
    }
    parameters, linear = 6_979_321_856 + 2 * 128256 * 4096, 6_979_321_856
    assert peaks["fp32", 1] == pytest.approx(1.02 * 16 * parameters + 2**29, rel=0.01)
    assert peaks["bf16", 1] == pytest.approx(1.02 * (16 * parameters + 2 * linear) + 2**29, rel=0.01)
    assert peaks["bf16", 8] == pytest.approx(1.07 * 16 * parameters + 2**30, rel=0.01)


def test_all_gradients_are_there_with_the_last_layer_on_the_way_back(base_8b: Path) -> None:
    """A step of one micro-batch is spared the gradients while it has its activations, but not with the last of them."""
    training = {**TRAINING_8B, "learning_rate": 1e-5, "effective_batch": 1, "gradient_checkpointing": "on"}
    recipe = make_recipe(method={"type": "full"}, training={**training, "max_length": 2048})
    short, long = (plan(recipe, base_8b, length=n, machine=make_gpus(80)).peak_bytes for n in (16, 2048))
    kept = 18 * 4096 + 4 * 4096 + 4 * 1024 + 8 * 14336  # bytes a token, of a layer whose norms are one operation
    assert long - short > 2032 * kept


def test_checkpointing_is_off_where_it_fits_and_on_where_it_does_not(base: Path) -> None:
    """`auto` decides by memory; a recipe can overrule it."""
    large = Machine(cores=2, memory_bytes=64 << 30)
    tight = Machine(cores=2, memory_bytes=1 << 30)
    assert not plan(make_recipe(), base, machine=large).checkpointing
    assert plan(make_recipe(), base, machine=tight).checkpointing
    forced = make_recipe(training={"gradient_checkpointing": "off"})
    assert not plan(forced, base, machine=tight).checkpointing


def test_values_outside_the_guide_are_warned_with_the_range(base: Path) -> None:
    """Rate, epochs, method and memory: each doubt names what is usual."""
    recipe = make_recipe(method={"type": "full"}, training={"learning_rate": 1e-3, "epochs": 9})
    said = "\n".join(plan(recipe, base, machine=Machine(2, 1 << 29)).warnings)
    for part in ("1e-05 to 2e-05", "usual 2 to 5", "10,000 rows", "exceeds the 0.5 GiB"):
        assert part in said
    assert not plan(make_recipe(training={"learning_rate": 2e-4}), base).warnings
    (one,) = plan(make_recipe(training={"learning_rate": 2e-4, "effective_batch": 6000}), base, rows=60).warnings
    assert one.startswith("training.effective_batch 6,000 makes one step an epoch of the 60 training rows")


def test_a_damaged_header_is_one_message(base: Path, tmp_path: Path) -> None:
    """Weights that are no safetensors file are named."""
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        read_weight_shapes(tmp_path)


def test_limits_are_those_of_the_cgroup(tmp_path: Path) -> None:
    """Half a host's cores and memory are what the process may use."""
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    machine = read_machine(tmp_path)
    assert (machine.cores, machine.memory_bytes) == (1, 1 << 30)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert read_machine(tmp_path).cores >= 1


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("NVIDIA H100 80GB HBM3, 81559, 9.0", ("NVIDIA H100 80GB HBM3", 81559 * 2**20, 9.0)),
        ("Tesla T4, 15360, 7.5", ("Tesla T4", 15360 * 2**20, 7.5)),
        ("GB10, [N/A], [N/A]", ("GB10", 0, 0.0)),
    ],
)
def test_the_driver_says_what_the_gpu_is(line: str, parsed: tuple[str, int, float]) -> None:
    """Name, bytes and capability; what the driver does not say is 0."""
    assert parse_gpu(line) == parsed


DRIVER = """#!/bin/sh
case "$*" in
*--id=0*) echo "NVIDIA A100-SXM4-80GB, 81920, 8.0" ;;
*--id=1* | *--id=GPU-5a*) echo "Tesla T4, 15360, 7.5" ;;
*--id=*) echo "No devices were found"; exit 6 ;;
*) printf 'NVIDIA A100-SXM4-80GB, 81920, 8.0\nTesla T4, 15360, 7.5\n' ;;
esac
"""


@pytest.mark.parametrize(
    ("visible", "gpu", "count"),
    [
        (None, "NVIDIA A100-SXM4-80GB", 2),
        ("1", "Tesla T4", 1),
        ("1,0", "Tesla T4", 2),
        ("GPU-5a", "Tesla T4", 1),
        ("MIG-1c", "NVIDIA A100-SXM4-80GB", 1),
        ("", "", 0),
        ("-1", "", 0),
    ],
)
def test_of_several_gpus_the_plan_means_the_one_that_a_run_will_see(
    visible: str | None, gpu: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first that CUDA_VISIBLE_DEVICES lets through, by number or name; of a slice, the GPU that it is cut from.

    All that are let through are counted.
    """
    tool = tmp_path / "nvidia-smi"
    tool.write_text(DRIVER)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    machine = read_machine(tmp_path)
    assert (machine.gpu, machine.gpus) == (gpu, count)


def test_emulated_bf16_is_warned_about(base: Path) -> None:
    """It works, and is slower than fp32; `auto` never chooses it."""
    old = Machine(cores=2, memory_bytes=8 << 30, gpu="Tesla T4", gpu_memory_bytes=16 << 30, has_bf16=False)
    recipe = make_recipe(training={"precision": "bf16", "learning_rate": 2e-4})
    assert "bf16 is emulated by Tesla T4" in "\n".join(plan(recipe, base, machine=old).warnings)
    assert not plan(recipe, base).warnings
    assert not plan(make_recipe(training={"learning_rate": 2e-4}), base, machine=old).warnings


def test_a_plan_is_plain_json(base: Path) -> None:
    """It goes into the run folder and to `plan --json`."""
    record = plan(make_recipe(), base).to_json()
    assert json.loads(json.dumps(record))["rows"] == 60
