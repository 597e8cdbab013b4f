"""The model to train: the base in its precision, with the method's trainable weights on it."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from appliance.errors import TrainingError
from appliance.model.weights import Precision, load_model
from appliance.recipe import FullMethod, QloraMethod
from appliance.training import attention
from appliance.training.arguments import build_adapter_arguments
from appliance.training.fused import fuse_lora
from appliance.training.launch import TrainingJob
from appliance.training.levers import Levers


def build_model(job: TrainingJob, levers: Levers, *, precision: Precision, device: torch.device) -> Any:
    """The base as the method wants it. Raises `TrainingError` when its targets match nothing."""
    attention.register()
    method = job.method
    model = load_model(
        job.base,
        precision="fp32" if isinstance(method, FullMethod) else precision,  # master weights, computed under autocast
        device=device,
        four_bit=isinstance(method, QloraMethod),
        attention=attention.NAME if levers.attention == "packed" else "sdpa",
    )
    if levers.compile:
        for layer in model.get_decoder().layers:
            layer.compile(dynamic=True)
    if isinstance(method, FullMethod):
        return model
    try:
        adapted = get_peft_model(model, LoraConfig(**build_adapter_arguments(method)))
    except ValueError as fault:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        raise TrainingError(f"method.targets: {fault}; linear layers of this model: {', '.join(names)}") from fault
    if levers.lora == "fused":
        fuse_lora(adapted)
    return adapted
