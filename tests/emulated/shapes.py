"""The kernels of `emulated_cuda` where only shapes are asked for: what they return and hold on the way, no value.

What is held for a moment is that of torch's own kernels, from their sources.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

LARGE = 1 << 20  # bytes of what a kernel is given first; as `device.cpp` has it


def choose(plain: Callable[..., Any], large: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel that computes what is small, and of what is large makes the shapes."""

    def run(first: torch.Tensor, *rest: Any, **options: Any) -> Any:
        return (large if first.nbytes >= LARGE else plain)(first, *rest, **options)

    return run


def ask(operation: Any) -> Callable[..., Any]:
    """An operation that knows its results' shapes: empty tensors of the device like them."""

    def run(*values: Any, **named: Any) -> Any:
        lent, lent_named = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (values, named))
        lent_named |= {"device": torch.device("meta")} if "device" in named else {}
        return tree_map_only(torch.Tensor, lambda t: torch.empty_like(t, device="cuda"), operation(*lent, **lent_named))

    return run


def attend(query: torch.Tensor, *_rest: Any, **_options: Any) -> tuple[torch.Tensor, ...]:
    """As `mha_varlen_fwd`: beside the result one number in fp32 for each token and head."""
    state, unused = (torch.zeros(size, dtype=torch.uint64, device="cuda") for size in ((2,), ()))
    norms, mask = torch.empty(query.shape[1], len(query), device="cuda"), torch.zeros(0, device="cuda")
    return torch.empty_like(query), norms, state, unused, mask


def attend_backward(
    _gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _out: torch.Tensor,
    _norms: torch.Tensor,
    cum_seq_q: torch.Tensor,
    *_rest: Any,
    **_options: Any,
) -> tuple[torch.Tensor, ...]:
    """As flash_api.cpp, `mha_varlen_bwd`: sums in fp32, and where heads share keys, their gradients for each head."""
    (tokens, heads, width), padded = query.shape, len(query) + 128 * (len(cum_seq_q) - 1)
    sums = torch.empty(padded, heads, (width + 31) // 32 * 32, device="cuda")
    norms = torch.empty(padded, heads, device="cuda")
    of_each = [key.new_empty(tokens, heads, width) for _ in range(2)] if key.shape[1] != heads else []
    made = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    del sums, norms, of_each
    return made


class _AttendScaled(torch.autograd.Function):  # type: ignore[misc]
    """What the kernels keep that make no matrix of scores."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        norms = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, norms)
        return out

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def attend_scaled(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_rest: Any, **_options: Any) -> Any:
    """As the kernels that make no matrix of scores."""
    return _AttendScaled.apply(query, key, value)


def norm(x: torch.Tensor, shape: Any, *_rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_fused_rms_norm_cuda`: beside the result one number in fp32 for each norm."""
    rate = torch.empty(*x.shape[: -len(shape)], *(1 for _ in shape), device="cuda")
    return torch.empty_like(x), rate


def norm_backward(
    _gradient: torch.Tensor,
    x: torch.Tensor,
    _shape: Any,
    _rate: torch.Tensor,
    weight: torch.Tensor,
    wanted: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients that are wanted."""
    return torch.empty_like(x) if wanted[0] else None, torch.empty_like(weight) if wanted[1] else None


def multiply(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A product in another precision than its factors'; no copy of them is made."""
    return a.new_empty(a.shape[0], b.shape[1], dtype=dtype)


def write(*_values: Any, out: torch.Tensor, **_options: Any) -> torch.Tensor:
    """What writes to memory that is there."""
    return out
