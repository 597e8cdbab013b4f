"""Attention over packed rows: documents in one flat sequence, none of which sees another.

A packed batch is flat, (1, tokens), so that every linear layer works on real tokens only. Here,
and only here, it is spread to (documents, longest), right-padded: under a causal mask padding on
the right is invisible to real tokens, so no block mask is needed. For the short documents of
fine-tuning on a CPU the plain product is 1.5 times as fast for the whole step as torch's fused
bf16 kernel with a block mask (benchmarks/train_cpu.py measures it); on other devices the fused
causal kernel is used. Where rows share a prefix (see `batches`), each gets its own copy of the
prefix's keys and values here, for the length of one attention.
"""

from __future__ import annotations

import inspect
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
    row_places: torch.Tensor | None = None,
    row_origins: torch.Tensor | None = None,
    **_rest: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a packed batch.

    query (1, H, T, D), key and value (1, G, T, D) with H a multiple of G; `cu_seq_lens_q` (N + 1,)
    are the documents' cumulative lengths, `row_places` and `row_origins` as `batches.collate_packed`
    gives them. Returns (1, T, H, D). Raises `ValueError` for what it does not compute: batches that
    are not packed, soft caps, windows shorter than a document.
    """
    if attention_mask is not None or query.shape[0] != 1 or softcap is not None:
        raise ValueError(
            "packed attention needs one flat batch without a mask or a soft cap; set training.packing: false"
        )
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = torch.tensor([0, query.shape[2]], device=query.device), query.shape[2]
        row_places = row_origins = None
    if sliding_window is not None and max_length_q > sliding_window:
        raise ValueError(
            f"a row of {max_length_q} tokens exceeds the window of {sliding_window}; set training.packing: false"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if has_varlen(query) and dropout == 0.0:
        rows = (query, key, value)
        if row_places is not None:
            rows = tuple(x.index_select(2, row_places) for x in rows)
        mixed = _attend_varlen(*rows, cumulative=cu_seq_lens_q, longest=int(max_length_q), scale=scale)
        return (mixed if row_origins is None else mixed.index_select(1, row_origins)), None
    index, real = _spread_index(cu_seq_lens_q, int(max_length_q))
    if row_places is not None and row_origins is not None:
        index = functional.pad(row_places, (0, 1), value=query.shape[2])[index]
        real = real[row_origins]
    queries, keys, values = (_spread(x, index, len(cu_seq_lens_q) - 1) for x in (query, key, value))
    if query.device.type == "cpu" and dropout == 0.0 and int(max_length_q) <= _PLAIN_LIMIT:
        mixed = _attend_plain(queries, keys, values, scale)
    else:
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, dropout_p=dropout, is_causal=True, scale=scale
        )
    return mixed.transpose(1, 2).flatten(0, 1).index_select(0, real)[None], None


def has_varlen(query: torch.Tensor) -> bool:
    """Whether torch's variable-length flash kernel takes it: half precision on an Ampere or newer GPU."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16) or query.shape[-1] > 256:
        return False
    return bool(torch.cuda.get_device_capability(query.device) >= (8, 0))


def _attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, cumulative: torch.Tensor, longest: int, scale: float
) -> torch.Tensor:
    """The flash kernel over documents end to end, (1, T, H, D): no padding and no mask."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    queries, keys, values = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    if "enable_gqa" in known:
        causal["enable_gqa"] = True
    else:
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    lengths = cumulative.to(torch.int32)
    mixed: torch.Tensor = varlen_attn(queries, keys, values, lengths, lengths, longest, longest, scale=scale, **causal)
    return mixed[None]


def _attend_plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(q k' scale + causal) v, (N, H, L, D); a group of query heads shares its key head without a copy."""
    documents, heads, longest, _ = query.shape
    grouped = query.reshape(documents, key.shape[1], -1, query.shape[-1])
    weights = torch.matmul(grouped, key.transpose(2, 3)).view(documents, heads, longest, longest) * scale
    future = torch.full((longest, longest), float("-inf"), dtype=weights.dtype, device=weights.device).triu(1)
    shares = torch.softmax(weights + future, -1).to(value.dtype).view(documents, key.shape[1], -1, longest)
    return torch.matmul(shares, value).view(documents, heads, longest, -1)


def _spread_index(cumulative: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which flat position each of the (N * longest) places holds, T for padding; and the places that are real."""
    starts, lengths = cumulative[:-1], cumulative.diff()
    steps = torch.arange(longest, device=cumulative.device)
    is_real = steps < lengths[:, None]
    index = torch.where(is_real, starts[:, None] + steps, cumulative[-1])
    return index.flatten(), is_real.flatten().nonzero()[:, 0]


def _spread(flat: torch.Tensor, index: torch.Tensor, documents: int) -> torch.Tensor:
    """(1, H, T, D) to (N, H, longest, D), padded with zeros."""
    heads, width = flat.shape[1], flat.shape[-1]
    rows = functional.pad(flat[0].transpose(0, 1).flatten(1), (0, 0, 0, 1))
    return rows.index_select(0, index).view(documents, -1, heads, width).transpose(1, 2)


def _no_mask(*_arguments: Any, **_options: Any) -> None:
    """Documents are separated in `attend`; transformers need not build a mask."""
