"""LoRA layers as one node of the graph: PEFT's sum, accumulated by the matrix products themselves.

PEFT computes `base(x) + scale * B(A(x))` as separate operations, and each passes over activations
as large as the layer's output. Here the low-rank product is added into the result of the base
product (`addmm_`), forward and backward. Only plain layers are taken: a frozen floating-point
linear base, one adapter, no dropout, no variant that changes the sum; the others keep PEFT's own.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear

from appliance.training.attention import select_dtype

_ADAPTER = "default"


def fuse_lora(model: torch.nn.Module) -> int:
    """Give every plain LoRA layer of `model` the fused forward; return how many there are."""
    layers = [m for m in model.modules() if _is_plain(m)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    return (
        type(layer) is LoraLinear
        and type(layer.base_layer) is torch.nn.Linear
        and not layer.base_layer.weight.requires_grad
        and list(layer.lora_A) == layer.active_adapters == [_ADAPTER]
        and isinstance(layer.lora_dropout[_ADAPTER], torch.nn.Identity)
        and layer.lora_B[_ADAPTER].bias is None
        and not layer.lora_variant
        and not layer.fan_in_fan_out
    )


def _forward(layer: Any, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
    """The layer's output (..., out) for x (..., in); PEFT's own forward where more than the plain sum is asked.

    So too where autocast computes in another precision than the base has: it does not reach every product here.
    """
    base, weight = layer.base_layer, layer.base_layer.weight
    is_plain = not (layer.disable_adapters or layer.merged or arguments or options)
    if not is_plain or select_dtype(weight) != weight.dtype:
        return LoraLinear.forward(layer, x, *arguments, **options)
    down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    product: torch.Tensor = _FusedProduct.apply(
        x.to(weight.dtype), weight, base.bias, down, up, layer.scaling[_ADAPTER]
    )
    return product.view(*x.shape[:-1], -1)  # out here: what a function gives as a view may not be added to in place


def _add_product(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, scale: float) -> torch.Tensor:
    """The sum y + scale a b, in the place of y unless it is compiled.

    A compiler finds the place by itself, and that of torch 2.11 gives an output that was changed in place no
    gradient: zeros, without a word.
    """
    if torch.compiler.is_compiling():
        return torch.addmm(y, a, b, alpha=scale)
    return y.addmm_(a, b, alpha=scale)


class _FusedProduct(torch.autograd.Function):  # type: ignore[misc]
    """y = x W' + b + scale (x A') B', (N, out); W (out, in) and b are frozen, A (r, in) and B (out, r) are trained."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd calls it by position
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        down, up = down.to(weight.dtype), up.to(weight.dtype)
        y = torch.mm(flat, weight.t()) if bias is None else torch.addmm(bias, flat, weight.t())
        hidden = torch.mm(flat, down.t())
        y = _add_product(y, hidden, up.t(), scale=scale)
        ctx.save_for_backward(flat, weight, down, up, hidden)
        ctx.scale, ctx.shape = scale, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        flat, weight, down, up, hidden = ctx.saved_tensors
        dy = gradients[0]
        dh = torch.mm(dy, up)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.mm(dy, weight).addmm_(dh, down, alpha=ctx.scale).view(ctx.shape)
        ddown = torch.mm(dh.t(), flat).float().mul_(ctx.scale)
        dup = torch.mm(dy.t(), hidden).float().mul_(ctx.scale)
        return dx, None, None, ddown, dup, None
