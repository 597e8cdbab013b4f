"""A frozen base shared out among the devices of a run: each keeps its part of every layer's weights.

A layer's weights are gathered where the layer computes, forward and backward, and given up after it (FSDP2,
`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv 2304.11277). What is trained stays whole on each
device, as do embeddings, norm and head beside the layers: steps, checkpoints and artifact are, byte for byte,
those of a run whose devices hold the base whole. Whoever computes a layer waits for all: ranks make the
same calls in the same order, those without rows too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from appliance.errors import TrainingError


def shard_base(model: Any, mesh: DeviceMesh, *, device: torch.device) -> None:
    """Keep this rank's part of every layer's frozen weights on `device`, and all that is beside them whole.

    The weights may lie on the CPU: a layer at a time goes to the device. Nothing is sent. Raises `TrainingError`
    where the model's class does not say what a layer is.
    """
    base = model.get_base_model()
    names = base._no_split_modules or ()  # noqa: SLF001 - what transformers itself shards by
    layers = [m for m in base.modules() if type(m).__name__ in names]
    if not layers:
        raise TrainingError(
            f"needs.weights: {type(base).__name__} does not say what its layers are, so they cannot be shared out; "
            "set it to whole"
        )
    trained = {p for p in model.parameters() if p.requires_grad}
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    beside = {p for p in base.parameters() if id(p) not in inside}
    fully_shard(base.get_decoder(), mesh=mesh, ignored_params=trained | beside)  # one root: layers are fetched ahead
    model.to(device)
