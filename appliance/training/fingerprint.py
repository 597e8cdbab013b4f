"""What the weights of a run depend on, as words that can be compared and shown.

The token rows stand for the data and the chat template, the run key for the base model's bytes. A
checkpoint is resumed only where all of it is the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from appliance.child import Emit
from appliance.method import FullMethod
from appliance.model import TokenRow
from appliance.model.faults import MISFITS, name_fault
from appliance.model.weights import Precision, compute_as_trained
from appliance.training.launch import TrainingJob

_PROBED = 32  # tokens: which operators run does not depend on how many there are


def build_fingerprint(job: TrainingJob, *, precision: Precision, device: torch.device) -> dict[str, str]:
    """The job's own fingerprint, with every key of method and training, and what computes them."""
    is_spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    is_summed = is_spread and isinstance(job.method, FullMethod)  # else whole and in parts end in the same bits
    return {
        **job.fingerprint,
        **_flatten("method", job.method.model_dump(mode="json")),
        **_flatten("training", job.training.model_dump(mode="json")),
        "base": job.base_name,
        "precision": precision,
        "device": describe_device(device),
        "devices": str(torch.distributed.get_world_size() if is_spread else 1),
        **({"weights": "sharded" if job.sharded else "whole"} if is_summed else {}),
        "torch build": torch.__version__,  # CPU or which CUDA; the package's version does not always say
    }


def describe_device(device: torch.device) -> str:
    """What the bits depend on: the GPU's model, or the instruction set that torch chose for this CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def make_deterministic(device: torch.device) -> None:
    """Equal inputs, equal bits, on CUDA too; a CPU needs nothing.

    Strictly: with `warn_only` the backward of every fused attention adds in the order in which its blocks end
    (aten/src/ATen/native/transformers/cuda/attention_backward.cu). cuBLAS reads its variable when its first handle
    is made. See pytorch.org, "Reproducibility".
    """
    if device.type != "cuda":
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def settle_determinism(model: Any, row: TokenRow, *, precision: Precision, emit: Emit) -> None:
    """Let a model run that has an operator without a deterministic form, and say so; all others stay strict.

    Found by one small pass forward and backward, which leaves nothing behind; nothing is asked where nothing is strict.
    What the model does not take at all the guards find next, and tell in their words.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return
    ids = torch.tensor([row.input_ids[:_PROBED]], device=model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), compute_as_trained(precision, device=model.device):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    except MISFITS as fault:
        if name_fault(fault) != "other":
            raise
        if "deterministic" in str(fault):
            torch.use_deterministic_algorithms(True, warn_only=True)
            operator = str(fault).split(maxsplit=1)[0]
            emit(note=f"{operator} is not deterministic here: a resumed run may end in other bits")
    finally:
        model.zero_grad(set_to_none=True)


def _flatten(prefix: str, section: Mapping[str, Any]) -> dict[str, str]:
    return {f"{prefix}.{key}": str(value) for key, value in section.items()}
