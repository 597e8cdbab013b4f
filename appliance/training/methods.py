"""The model to train: the base in its precision, with the method's trainable weights on it.

Three starts change the base: pissa and olora take a part out of its weights, loftq meets its 4-bit
rounding. What they publish is the difference to where they started, as a plain adapter of twice the
rank: it fits the untouched base, so the base can still be compared with, and adapters can be switched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from appliance.digest import digest_bytes
from appliance.errors import TrainingError
from appliance.method import FullMethod, LoraMethod, Method, PromptTuningMethod, PTuningMethod, QloraMethod
from appliance.model.shapes import Shape, check_method, list_experts, read_weight_shapes, select_adapted
from appliance.model.weights import Precision, check_finite, find_layers, load_model, read_weights
from appliance.training import attention
from appliance.training.arguments import CHANGING_THE_BASE, build_adapter_arguments
from appliance.training.launch import TrainingJob
from appliance.training.levers import Levers
from appliance.training.norms import fuse_norms

Weights = dict[str, torch.Tensor]
_CONFIGS = {
    "lora": LoraConfig,
    "qlora": LoraConfig,
    "prompt-tuning": PromptTuningConfig,
    "prefix-tuning": PrefixTuningConfig,
    "p-tuning": PromptEncoderConfig,
    "ia3": IA3Config,
}
_ENCODER = "prompt_encoder.safetensors"
_WAYS = 32


def build_model(job: TrainingJob, *, levers: Levers, precision: Precision, device: torch.device) -> Any:
    """The base as the method wants it, every weight of it finite.

    Raises `TrainingError` when the method does not fit it, `ModelError` when it is damaged.
    """
    attention.register()
    method = job.method
    model = load_model(
        job.base,
        precision="fp32" if isinstance(method, FullMethod) else precision,  # master weights, computed under autocast
        device=device,
        four_bit=isinstance(method, QloraMethod),
    )
    if levers.attention == "packed":
        attention.use(model)
    check_finite(model, job.base, four_bit=isinstance(method, QloraMethod))
    if levers.norm == "fused":
        fuse_norms(model)
    if isinstance(method, FullMethod):
        return model
    experts = list_experts(read_weight_shapes(job.base))  # no layers in memory, but PEFT finds them
    linears = _list_linears(model) | experts
    check_method(method, linears, base=job.base)
    arguments = build_adapter_arguments(method)
    if isinstance(method, LoraMethod) and isinstance(method.targets, str):
        arguments |= _name_targets(model, select_adapted(method, linears))
    if isinstance(method, PromptTuningMethod) and method.text is not None:
        arguments["tokenizer_name_or_path"] = str(job.base)
    try:
        adapted = get_peft_model(model, _CONFIGS[method.type](**arguments))
    except (ValueError, TypeError) as fault:
        raise TrainingError(f"method: this model cannot be trained with {method.type} ({fault})") from fault
    _check_experts(method, experts, adapted)
    if isinstance(method, QloraMethod) and method.variant == "loftq":
        _start_from_rounding_error(adapted, job.base)
    if isinstance(method, PTuningMethod):
        _compute_as_kept(adapted.prompt_encoder)
    return adapted


def compile_layers(model: Any) -> None:
    """Let the layers be compiled at their next call.

    Only once the guards have asked what they ask: torch compiles a layer for so many ways to call it, and computes
    further ones eagerly without a word. Steps, validation and what is asked at the end are more than its eight.
    """
    torch._dynamo.config.recompile_limit = _WAYS  # noqa: SLF001 - its one setting of this
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = find_layers(base)
    if not layers:
        raise TrainingError(
            f"training.speed.compile: {type(base).__name__} does not say what its layers are; set it to off"
        )
    for layer in layers:
        layer.compile(dynamic=True)


def _compute_as_kept(encoder: Any) -> None:
    """The encoder in the fp32 of its weights: on CUDA autocast makes an LSTM fp16, whatever it makes all else."""
    for module in encoder.modules():
        if isinstance(module, torch.nn.LSTM):
            module.forward = torch.autocast(next(module.parameters()).device.type, enabled=False)(module.forward)


def _name_targets(model: Any, adapted: Mapping[str, Shape]) -> dict[str, Any]:
    """The layers to adapt as PEFT and servers know them: last parts of names, and whose name ends so by chance."""
    last = {n.rpartition(".")[2] for n in adapted}
    others = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in last and n not in adapted]
    return {"target_modules": sorted(last), "exclude_modules": sorted(others) or None}


def _list_linears(model: Any) -> dict[str, tuple[int, ...]]:
    """(out, in) of every layer that an adapter can be put on, by its name; the head has none."""
    head = model.get_output_embeddings()
    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            found[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            found[name] = tuple(module.weight.shape)[::-1]
    return found


def _check_experts(method: Method, experts: Mapping[str, Shape], adapted: Any) -> None:
    """Experts that a recipe names are adapted: PEFT leaves out those of a class that it does not know."""
    if not isinstance(method, LoraMethod) or isinstance(method.targets, str):
        return
    named = {n.rpartition(".")[2] for n in experts}
    asked = [t for t in method.targets if t.rpartition(".")[2] in named]
    if asked and not any(".experts." in n for n, p in adapted.named_parameters() if p.requires_grad):
        raise TrainingError(
            f"method.targets: {', '.join(asked)} names experts, which PEFT does not adapt in this class of model; "
            "name other layers"
        )


@torch.no_grad()  # type: ignore[untyped-decorator]
def _start_from_rounding_error(model: Any, base: Path) -> None:
    """LoftQ with one iteration (Li et al. 2023, arXiv 2310.08659, algorithm 1): B A = best rank-r of W - Q(W).

    PEFT's own function asks for CUDA and leaves the adapter's scale out.
    """
    from bitsandbytes.functional import dequantize_4bit

    layers = {
        name.removeprefix("base_model.model.") + ".weight": module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module.get_base_layer().weight, "quant_state")
    }
    for name, weight in read_weights(base):
        if (layer := layers.pop(name, None)) is None:
            continue
        quantised = layer.get_base_layer().weight
        error = weight.to(quantised.device, torch.float32) - dequantize_4bit(quantised, quantised.quant_state).float()
        left, values, right = torch.linalg.svd(error, full_matrices=False)
        rank = layer.r["default"]
        root = (values[:rank] / layer.scaling["default"]).sqrt()
        layer.lora_A["default"].weight.copy_(root[:, None] * right[:rank])
        layer.lora_B["default"].weight.copy_(left[:, :rank] * root)
    if layers:
        raise TrainingError(f"method.variant: loftq finds no weight {min(layers)} in the base's files; use plain")


def copy_start(model: Any, method: Method) -> Weights:
    """The adapter's first weights, for the starts that change the base; empty for all others."""
    if not isinstance(method, LoraMethod) or method.variant not in CHANGING_THE_BASE:
        return {}
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def digest_start(start: Weights) -> str:
    """SHA-256 of the first weights: a resumed run must have taken the same part out of the base."""
    return digest_bytes(b"".join(start[n].float().numpy().tobytes() for n in sorted(start)))


@contextmanager
def without_training(model: Any, start: Weights) -> Iterator[None]:
    """The model as it was before the first step: its adapter off, or back at its start."""
    if not start:
        with model.disable_adapter():
            yield
        return
    weights = {n: p for n, p in model.named_parameters() if n in start}
    kept = {n: p.data for n, p in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data = start[name].to(weight.device, weight.dtype)
        yield
    finally:
        for name, weight in weights.items():
            weight.data = kept[name]


@contextmanager
def keep_dtypes(model: Any) -> Iterator[None]:
    """Give the trained weights back the precision they had.

    TRL rounds the adapters of a quantised model to bf16, and a resume reads them back as fp32
    (peft#2421): the two halves of a run would differ. They stay in fp32 throughout, as for LoRA.
    """
    kept = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    yield
    for name, weight in model.named_parameters():
        if name in kept and weight.dtype != kept[name].dtype:
            weight.data = kept[name]


@contextmanager
def keep_router(model: Any) -> Iterator[None]:
    """Give the configuration of a mixture of experts its own coefficient back: TRL writes that of this training."""
    config = model.config.get_text_config()
    kept = getattr(config, "router_aux_loss_coef", None)
    yield
    if kept is not None:
        config.router_aux_loss_coef = kept


def subtract_start(folder: Path, start: Mapping[str, torch.Tensor]) -> None:
    """Rewrite a saved adapter as the difference to its start: B A - B0 A0 = [B, B0] [A; -A0]."""
    file = folder / "adapter_model.safetensors"
    saved, changed = load_file(file), {}
    for name, weight in saved.items():
        first = start[name.replace(".weight", ".default.weight")].to(weight.dtype)
        is_inner = ".lora_A." in name
        changed[name] = torch.cat([weight, -first], 0) if is_inner else torch.cat([weight, first], 1)
    save_file(changed, file, metadata={"format": "pt"})


def save_encoder(model: Any, folder: Path) -> None:
    """Beside a checkpoint of a prompt method, the network that makes the prompt: PEFT saves its product only."""
    if _is_prompt(model):
        save_file({n: p.contiguous() for n, p in model.prompt_encoder.state_dict().items()}, folder / _ENCODER)


def load_encoder(model: Any, folder: Path) -> bool:
    """Read it back; false when the checkpoint is of a method that has none."""
    if not _is_prompt(model):
        return False
    model.prompt_encoder.load_state_dict(load_file(folder / _ENCODER), strict=True)
    return True


def _is_prompt(model: Any) -> bool:
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
