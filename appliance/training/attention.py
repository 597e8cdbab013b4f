"""Attention over packed rows: documents in one flat sequence, none of which sees another.

A packed batch is flat, (1, tokens), so that every linear layer works on real tokens only. Here,
and only here, it is spread to (documents, longest), right-padded: under a causal mask padding on
the right is invisible to real tokens, so no block mask is needed. For the short documents of
fine-tuning on a CPU the plain product is 1.5 times as fast for the whole step as torch's fused
bf16 kernel with a block mask (benchmarks/train_cpu.py measures it); on other devices the fused
causal kernel is used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "appliance_packed"
_PLAIN_LIMIT = 1024


def register() -> None:
    """Make `attn_implementation="appliance_packed"` known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_rest: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a packed batch.

    query (1, H, T, D), key and value (1, G, T, D) with H a multiple of G; `cu_seq_lens_q` (N + 1,)
    are the documents' cumulative lengths. Returns (1, T, H, D). Raises `ValueError` for what it
    does not compute: batches that are not packed, soft caps, windows shorter than a document.
    """
    if attention_mask is not None or query.shape[0] != 1 or softcap is not None:
        raise ValueError(
            "packed attention needs one flat batch without a mask or a soft cap; set training.packing: false"
        )
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = torch.tensor([0, query.shape[2]], device=query.device), query.shape[2]
    if sliding_window is not None and max_length_q > sliding_window:
        raise ValueError(
            f"a row of {max_length_q} tokens exceeds the window of {sliding_window}; set training.packing: false"
        )
    index, real = _spread_index(cu_seq_lens_q, int(max_length_q))
    groups = query.shape[1] // key.shape[1]
    queries = query[0].transpose(0, 1)[index].transpose(1, 2)
    keys = key[0].transpose(0, 1)[index].transpose(1, 2).repeat_interleave(groups, 1)
    values = value[0].transpose(0, 1)[index].transpose(1, 2).repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu" and dropout == 0.0 and int(max_length_q) <= _PLAIN_LIMIT:
        mixed = _attend_plain(queries, keys, values, scale)
    else:
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, dropout_p=dropout, is_causal=True, scale=scale
        )
    return mixed.transpose(1, 2)[real][None], None


def _attend_plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(q k' scale + causal) v, (N, H, L, D)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scale
    future = torch.full(weights.shape[-2:], float("-inf"), dtype=weights.dtype, device=weights.device).triu(1)
    return torch.matmul(torch.softmax(weights + future, -1).to(value.dtype), value)


def _spread_index(cumulative: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions (N, longest), padded with position T - 1, and which of them are real."""
    starts, lengths = cumulative[:-1], cumulative.diff()
    steps = torch.arange(longest, device=cumulative.device)
    index = (starts[:, None] + steps).clamp(max=int(cumulative[-1]) - 1)
    return index, steps < lengths[:, None]


def _no_mask(*_arguments: Any, **_options: Any) -> None:
    """Documents are separated in `attend`; transformers need not build a mask."""
