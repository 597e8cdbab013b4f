"""A model shared out among the devices of a run: each keeps its part of every layer's weights.

A layer's weights are gathered where the layer computes, forward and backward, and given up after it (FSDP2,
`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv 2304.11277). Whoever computes a layer waits for all:
ranks make the same calls in the same order, those without rows too.

Under an adapter the base is shared out and what is trained stays whole on each device, as do embeddings, norm and
head beside the layers: steps, checkpoints and artifact are, byte for byte, those of a run whose devices hold the
base whole. Full training shares out all it trains, and with it gradients and moments; checkpoints and artifact have
the form of whole weights, which the first rank gathers from all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from appliance.errors import TrainingError
from appliance.model.weights import Precision, find_layers


def shard_base(model: Any, mesh: DeviceMesh, *, device: torch.device) -> None:
    """Keep this rank's part of every layer's frozen weights on `device`, and all that is beside them whole.

    The weights may lie on the CPU: a layer at a time goes to the device. Nothing is sent. Raises `TrainingError`
    where the model's class does not say what a layer is.
    """
    base = model.get_base_model()
    layers = _list_layers(base)
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    beside = {p for p in base.parameters() if id(p) not in inside}
    fully_shard(base.get_decoder(), mesh=mesh, ignored_params=trained | beside)  # one root: layers are fetched ahead
    model.to(device)


def shard_trained(model: Any, mesh: DeviceMesh, *, precision: Precision, device: torch.device) -> None:
    """Keep this rank's part of all weights on `device`, in fp32; as `shard_base`, for full training.

    In bf16 the layers are gathered as they compute, half the bytes; embeddings, norm and head in fp32. Gradients are
    added up over the ranks, in fp32, and each rank keeps those of its part.
    """
    layers = _list_layers(model)
    rounded = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=rounded if precision == "bf16" else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # else it computes once more with what it was
    for module in (*layers, model):
        module.set_gradient_divide_factor(1.0)  # the loss is divided by the tokens of the step, over all ranks
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    model.to(device)


def _list_layers(base: Any) -> list[Any]:
    layers = find_layers(base)
    if not layers:
        raise TrainingError(
            f"needs.weights: {type(base).__name__} does not say what its layers are, so they cannot be shared out; "
            "set it to whole"
        )
    return layers


def is_trained_in_parts(model: Any) -> bool:
    """Whether each rank trains its part of the weights alone."""
    return any(isinstance(p, DTensor) and p.requires_grad for p in model.parameters())


@contextmanager
def gathering_once(model: Any) -> Iterator[None]:
    """What is beside the layers is gathered by the first call of `model` in here, and given up after the last.

    Each call would gather it anew, and ranks may call the model for their rows in different numbers.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        model.reshard()
        model.set_reshard_after_forward(True, recurse=False)


def gather_weights(model: Any, *, keeps: bool) -> dict[str, torch.Tensor] | None:
    """The model's weights whole, on the CPU, for the rank that `keeps` them; all ranks ask at once.

    `None` where nothing that is trained is shared out: what a model saves by itself is whole then.
    """
    if not is_trained_in_parts(model):
        return None
    saved = model.state_dict()
    buffers = {n: b for n, b in model.named_buffers() if n in saved}
    return gather_parts(dict(model.named_parameters()) | buffers, keeps=keeps)


def gather_parts(state: dict[Any, Any], *, keeps: bool) -> dict[Any, Any]:
    """A state in which every part is the whole tensor, on the CPU; of a rank that does not keep it, empty ones."""

    def gather(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: gather(v) for k, v in value.items()}
        if not isinstance(value, DTensor):
            return value
        whole = value.detach().full_tensor()
        return whole.cpu() if keeps else whole.new_empty(0)

    gathered: dict[Any, Any] = gather(state)
    return gathered


def put_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Give each weight of the model its value, or this rank's part of it. Nothing is sent."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            get_local(weight).copy_(get_local(_take_part(weights[name], like=weight)))


def share_optimizer(optimizer: Any, *, keeps: bool) -> None:
    """Its state is saved whole, by the rank that `keeps` it while all ask, and each rank loads its part of one."""

    def gather(_optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        return gather_parts(state, keeps=keeps)

    def take(_optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        parts = {
            index: {k: _take_part(v, like=weights[index]) for k, v in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": parts}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(take)


def _take_part(value: Any, *, like: Any) -> Any:
    """This rank's part of a tensor of the form of `like`; anything else as it is."""
    if not isinstance(like, DTensor) or not torch.is_tensor(value) or value.shape != like.shape:
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def get_whole(tensor: Any) -> Any:
    """The whole of a tensor, also where each rank holds a part; all ranks ask at once."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def get_local(tensor: Any) -> Any:
    """The part of a tensor that this rank holds: all of it where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
