"""RMS norms as one node of the graph: the values of the model's own class, without what it holds in between.

What transformers writes as seven operations on tensors of fp32 makes a dozen on the way back, each as large as the
stream. Here the way back needs the norm's input and one number a token. On a GPU the kernel is torch's, on a CPU the
sum is written out. Taken are the classes that a probe proves to compute this: `x / rms(x) * w`, or `* (1 + w)`.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.nn import functional

_MAGNITUDES = (1e-3, 1.0, 30.0)  # of the probe's rows: at the least of them epsilon shows


def fuse_norms(model: torch.nn.Module) -> int:
    """Give every RMS norm of `model` that the probe knows the fused forward; return how many there are."""
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    with torch.no_grad():
        return sum(_fuse(norm) for norm in norms)


def _fuse(norm: Any) -> bool:
    """Whether `norm` is one of both forms, which it then has."""
    weight: torch.Tensor | None = getattr(norm, "weight", None)
    if weight is None or weight.dim() != 1 or not isinstance(_read_epsilon(norm), float):
        return False
    sizes = torch.tensor(_MAGNITUDES, device=weight.device)[:, None]
    steps = torch.arange(sizes.numel() * weight.numel(), device=weight.device)
    probe = (steps.sin().view(sizes.numel(), -1) * sizes).to(weight.dtype)
    wanted, limit = norm(probe), max(2 * torch.finfo(weight.dtype).eps, 1e-5)
    for forward in (_forward, _forward_centred):
        norm.forward = MethodType(forward, norm)
        found = norm(probe)
        if found.dtype == wanted.dtype and torch.allclose(found, wanted, rtol=limit, atol=1e-6):
            return True
    del norm.forward
    return False


def _forward(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """(..., width): torch's kernel on a GPU, where the stream has the precision of the weight."""
    if not x.is_cuda or x.dtype != norm.weight.dtype:
        return _apply(norm, x, is_centred=False)
    with torch.autocast("cuda", enabled=False):  # which would make fp32 of it
        return functional.rms_norm(x, norm.weight.shape, norm.weight, _read_epsilon(norm))


def _forward_centred(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """The same of a norm whose weights are differences from one, as those of Gemma."""
    return _apply(norm, x, is_centred=True)


def _apply(norm: Any, x: torch.Tensor, *, is_centred: bool) -> torch.Tensor:
    y: torch.Tensor = _Norm.apply(x, norm.weight, _read_epsilon(norm), is_centred)
    return y


def _read_epsilon(norm: Any) -> Any:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


class _Norm(torch.autograd.Function):  # type: ignore[misc]
    """y = x w / sqrt(mean(x^2) + epsilon) over the last dimension, summed in fp32, rounded as transformers does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, is_centred: bool) -> torch.Tensor:
        y = x.to(torch.float32, copy=True)
        rate = torch.linalg.vector_norm(y, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, rate)
        ctx.is_centred = is_centred
        y.mul_(rate)  # and no further: torch 2.11 compiles an output that was changed in place to one without gradients
        return (y * (weight.float() + 1)).to(x.dtype) if is_centred else y.to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        x, weight, rate = ctx.saved_tensors
        dy, raw, dweight = gradients[0], x.float(), None
        if ctx.needs_input_grad[1]:
            dweight = (dy * (raw * rate)).flatten(0, -2).sum(0).to(weight.dtype)
        dx = (dy * (weight.float() + 1 if ctx.is_centred else weight)).float()
        along = (dx * raw).sum(-1, keepdim=True).mul_(rate.square()).div_(-x.shape[-1])
        return dx.addcmul_(raw, along).mul_(rate).to(x.dtype), dweight, None, None
