"""Attention over packed rows: documents in one flat sequence, none of which sees another.

A packed batch is flat, (1, tokens), so that every linear layer works on real tokens only. Here,
and only here, it is spread to (documents, longest), right-padded: under a causal mask padding on
the right is invisible to real tokens, so no block mask is needed. For the short documents of
fine-tuning on a CPU the plain product is 1.5 times as fast for the whole step as torch's fused
bf16 kernel with a block mask (benchmarks/train_cpu.py measures it); on other devices the fused
causal kernel is used. Where rows share a prefix (see `batches`), each gets its own copy of the
prefix's keys and values here, for the length of one attention. What no fused kernel computes, soft
caps and sinks, takes the plain product everywhere.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from appliance.model.weights import caps_scores

NAME = "appliance_packed"
_PLAIN_LIMIT = 1024


def register() -> None:
    """Make `attn_implementation="appliance_packed"` known to transformers.

    With no function for a mask beside it: documents are separated in `attend`, and what transformers does before it
    asks for a mask has a GPU wait in every forward pass (`masking_utils._preprocess_mask_arguments`).
    """
    AttentionInterface.register(NAME, attend)


def use(model: Any) -> None:
    """Let a model's layers call `attend`; one whose class has attention of its own keeps it."""
    model.set_attn_implementation(NAME)


def use_standard(model: Any) -> None:
    """Give the layers what the library chooses for their class: torch's fused attention where that computes all."""
    is_fused = model._supports_sdpa and not caps_scores(model.config)  # noqa: SLF001 - so does transformers
    model.set_attn_implementation("sdpa" if is_fused else "eager")


def name_used(model: Any) -> str:
    """What the language model's layers compute attention with."""
    return str(model.config.get_text_config()._attn_implementation)  # noqa: SLF001 - there is a setter and no getter


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
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    row_places: torch.Tensor | None = None,
    row_origins: torch.Tensor | None = None,
    **_rest: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a packed batch.

    query (1, H, T, D), key and value (1, G, T, D) with H a multiple of G; `cu_seq_lens_q` (N + 1,)
    are the documents' cumulative lengths, `row_places` and `row_origins` as `batches.collate_packed`
    gives them; with a `sliding_window` a token sees so many, itself included; a `softcap` c makes a score s
    c tanh(s / c); `s_aux` (H,) are sinks, a score each that takes its share and gives nothing. Returns (1, T, H, D).
    Raises `ValueError` for batches that are not packed.
    """
    if attention_mask is not None or query.shape[0] != 1:
        raise ValueError("packed attention needs one flat batch without a mask")
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = torch.tensor([0, query.shape[2]], device=query.device), query.shape[2]
        row_places = row_origins = None
    longest = int(max_length_q)
    window = sliding_window if sliding_window is not None and longest > sliding_window else None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cuda":
        query, key, value = (x.to(select_dtype(x)) for x in (query, key, value))
    is_plain = softcap is not None or s_aux is not None
    if not is_plain and dropout == 0.0 and value.shape[-1] == query.shape[-1] and has_varlen(query):
        rows = (query, key, value)
        if row_places is not None:
            rows = tuple(x.index_select(2, row_places) for x in rows)
        mixed = _attend_varlen(*rows, cumulative=cu_seq_lens_q, longest=longest, scale=scale, window=window)
        return (mixed if row_origins is None else mixed.index_select(1, row_origins)), None
    tokens = query.shape[2] if row_places is None else row_places.numel()
    index, real = _spread_index(cu_seq_lens_q, longest, tokens=tokens)
    if row_places is not None and row_origins is not None:
        index = torch.cat([row_places, row_places.new_full((1,), query.shape[2])])[index]  # `pad` compiles per size
        real = real[row_origins]
    queries, keys, values = (_spread(x, index, len(cu_seq_lens_q) - 1) for x in (query, key, value))
    if is_plain or (query.device.type == "cpu" and dropout == 0.0 and longest <= _PLAIN_LIMIT):
        mixed = _attend_plain(
            queries, keys, values, scale, window=window, softcap=softcap, sinks=s_aux, dropout=dropout
        )
    else:
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        seen = None if window is None else ~_find_unseen(longest, window, device=query.device)
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, dropout_p=dropout, is_causal=seen is None, scale=scale
        )
    return mixed.transpose(1, 2).flatten(0, 1).index_select(0, real)[None], None


def select_dtype(x: torch.Tensor) -> torch.dtype:
    """The precision that torch's own attention would compute in: autocast's, which knows no other kernel.

    Under autocast fp32 master weights give values in bf16, but rotated queries and keys in fp32.
    """
    kind = x.device.type
    has_autocast = not x.is_meta and torch.is_autocast_enabled(kind)  # "meta" knows of none and raises
    return torch.get_autocast_dtype(kind) if has_autocast else x.dtype


def has_varlen(query: torch.Tensor) -> bool:
    """Whether torch's variable-length flash kernel takes this query on its device."""
    if query.device.type != "cuda":
        return False
    return takes_varlen(query.dtype, query.shape[-1], torch.cuda.get_device_capability(query.device))


def takes_varlen(dtype: torch.dtype, width: int, capability: tuple[int, int]) -> bool:
    """Whether the kernel has heads of this `width` in this precision on such a GPU, forward and backward.

    Half precision, Ampere or newer, at most 256 in eights (flash_attn/flash_api.cpp, `mha_varlen_fwd`: nothing pads
    here); backward of 193 to 224 does not fit into the shared memory of sm_86, sm_89 and sm_12x (sdp_utils.cpp).
    """
    if dtype not in (torch.bfloat16, torch.float16) or capability < (8, 0) or width > 256 or width % 8:
        return False
    is_small = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    return not (is_small and 192 < width <= 224)


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cumulative: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """The flash kernel over documents end to end, (1, T, H, D): no padding, no mask, and no copy of keys for each head.

    The kernel itself takes grouped heads and sums their gradients in every release (flash_api.cpp, `mha_varlen_bwd`).
    """
    from torch.nn.attention.varlen import varlen_attn

    causal = _name_causal(varlen_attn, window)
    queries, keys, values = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    lengths = cumulative.to(torch.int32)
    mixed: torch.Tensor = varlen_attn(queries, keys, values, lengths, lengths, longest, longest, scale=scale, **causal)
    return mixed[None]


@cache
def _name_causal(kernel: Any, window: int | None) -> dict[str, Any]:
    """What this release of torch calls causal attention of grouped heads; looked up once, not in every layer.

    Releases without `enable_gqa` ask nothing about heads.
    """
    known = inspect.signature(kernel).parameters
    if window is not None and "window_size" not in known:
        raise ValueError(f"this torch has no windows of {window} tokens in its packed attention")
    left = -1 if window is None else window - 1  # how many before itself
    causal: dict[str, Any] = {"window_size": (left, 0)} if "window_size" in known else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


def _find_unseen(longest: int, window: int | None, *, device: torch.device) -> torch.Tensor:
    """(L, L): true where a position (row) does not see another (column): what is later, or before its window."""
    everywhere = torch.ones(longest, longest, dtype=torch.bool, device=device)
    future = everywhere.triu(1)
    return future if window is None else future | everywhere.tril(-window)


def _attend_plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    *,
    window: int | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(q k' scale + causal) v, (N, H, L, D); a group of query heads shares its key head without a copy."""
    documents, heads, longest, _ = query.shape
    grouped = query.reshape(documents, key.shape[1], -1, query.shape[-1])
    weights = torch.matmul(grouped, key.transpose(2, 3)).view(documents, heads, longest, longest) * scale
    if softcap is not None:
        weights = softcap * torch.tanh(weights / softcap)
    unseen = torch.zeros(longest, longest, dtype=weights.dtype, device=weights.device)
    unseen.masked_fill_(_find_unseen(longest, window, device=weights.device), float("-inf"))
    scores = weights + unseen
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(documents, -1, longest, 1)], -1)
    shares = torch.softmax(scores, -1)[..., :longest].to(value.dtype)
    shares = functional.dropout(shares, dropout).reshape(documents, key.shape[1], -1, longest)
    return torch.matmul(shares, value).view(documents, heads, longest, -1)


def _spread_index(cumulative: torch.Tensor, longest: int, *, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which flat position each of the (N * longest) places holds, T for padding; and the places that are real.

    Computed for each layer, so nothing here waits for a GPU: the real places are counted, not looked for.
    """
    starts, lengths = cumulative[:-1], cumulative.diff()
    steps = torch.arange(longest, device=cumulative.device)
    index = torch.where(steps < lengths[:, None], starts[:, None] + steps, cumulative[-1])
    flat = torch.arange(tokens, device=cumulative.device)
    document = torch.searchsorted(cumulative[1:].to(flat.dtype), flat, right=True)
    return index.flatten(), document * longest + flat - starts[document]


def _spread(flat: torch.Tensor, index: torch.Tensor, documents: int) -> torch.Tensor:
    """(1, H, T, D) to (N, H, longest, D), padded with zeros."""
    heads, width = flat.shape[1], flat.shape[-1]
    rows = functional.pad(flat[0].transpose(0, 1).flatten(1), (0, 0, 0, 1))
    return rows.index_select(0, index).view(documents, -1, heads, width).transpose(1, 2)
