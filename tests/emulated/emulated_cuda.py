"""What `device.cpp` cannot give torch from below: its `torch.cuda` of Python, and kernels that no CPU has.

The kernels compute what their documentation says, in fp32 and slowly; what they are given is checked as they would.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_LIBRARY = Path(__file__).parents[2] / ".cache" / "emulated" / "device.so"
_MEMORY = 80 << 30
_NAME = "NVIDIA H100 80GB HBM3"  # of which the product knows the peak
_SHAPES_ALONE = os.environ.get("EMULATED_CUDA") == "shapes"  # see `device.cpp`: nothing large is computed
_kept: list[Any] = []  # registrations live as long as these


def load() -> None:
    """Before torch: its registries are asked once."""
    library = ctypes.CDLL(str(_LIBRARY), mode=ctypes.RTLD_GLOBAL)
    library.device_held.restype = library.device_peak.restype = ctypes.c_int64
    library.device_limit.argtypes = [ctypes.c_int64]
    _kept.append(library)


def install() -> None:
    """After torch: from now on there is one CUDA device."""
    import shapes
    import torch

    with suppress(ImportError):  # the product hides it from children that round nothing
        import bitsandbytes  # noqa: F401 - before a device is seen: it would load its CUDA library
    _install_module(_kept[0])
    _install_storages()
    operations = torch.library.Library("aten", "IMPL")
    kernels: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {  # and where only shapes are asked for
        "_flash_attention_forward": (_attend, shapes.attend),
        "_flash_attention_backward": (_attend_backward, shapes.attend_backward),
        "scaled_dot_product_attention": (_attend_scaled, shapes.attend_scaled),
        "_fused_rms_norm": (_norm, shapes.norm),
        "_fused_rms_norm_backward": (_norm_backward, shapes.norm_backward),
        "mm.dtype": (_multiply, shapes.multiply),
        "mm.dtype_out": (lambda a, b, dtype, *, out: out.copy_(_multiply(a, b, dtype)), shapes.write),
        "addmm.dtype_out": (_add_product, shapes.write),
    }
    for name, (plain, large) in kernels.items():
        kernel = shapes.choose(plain, large) if _SHAPES_ALONE else plain
        operations.impl(name, kernel, "CUDA")
        if name == "scaled_dot_product_attention":  # made of others by torch, above the device
            operations.impl(name, kernel, "AutogradCUDA")
    operations.impl("histc", lambda x, *a, **o: torch.histc(x.cpu().float(), *a, **o).to(x.dtype).to("cuda"), "CUDA")
    for name in ("convolution", "convolution_backward"):  # each chooses among CUDA's own by the device
        operations.impl(name, _lend(getattr(torch.ops.aten, name).default), "CUDA")
    _kept.append(operations)
    if sys.modules.get("bitsandbytes"):
        _install_rounding()
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self, **o: compile_module(self, **{"backend": "aot_eager"} | o)  # no Triton for it


def _install_rounding() -> None:
    import torch

    rounding = torch.library.Library("bitsandbytes", "IMPL")
    for name in (
        "dequantize_4bit",
        "quantize_4bit",
        "dequantize_blockwise",
        "quantize_blockwise",
        "gemv_4bit",
        "gemm_4bit",
        "optimizer_update_32bit",
        "optimizer_update_8bit_blockwise",
    ):
        packet = getattr(torch.ops.bitsandbytes, name)
        for overload in packet.overloads():
            operation = getattr(packet, overload)
            rounding.impl(name if overload == "default" else f"{name}.{overload}", _lend(operation), "CUDA")
    _kept.append(rounding)
    functional = sys.modules["bitsandbytes.functional"]
    functional.get_paged, functional.prefetch_tensor = _make_paged, lambda *_a, **_o: None
    functional.fill = lambda tensor, value, **_o: tensor.fill_(value)


def _make_paged(*shape: int, dtype: Any, device: Any) -> Any:
    """Memory that a driver moves to the host when the device is short of it: here it stays."""
    import torch

    made = torch.empty(*shape, dtype=dtype, device=device)
    made.is_paged, made.page_deviceid = True, 0
    return made


def _install_module(library: Any) -> None:
    import torch
    from torch.cuda.amp import common

    common.amp_definitely_not_available = lambda: False
    facts = SimpleNamespace(
        name=_NAME, total_memory=_MEMORY, major=9, minor=0, multi_processor_count=1, gcnArchName="", warp_size=32
    )
    given: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_a, **_o: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_a: facts.name,
        "get_device_properties": lambda *_a: facts,
        "get_device_capability": lambda *_a: (facts.major, facts.minor),
        "_exchange_device": lambda _d: 0,
        "_maybe_exchange_device": lambda _d: 0,
        "mem_get_info": lambda *_a: (_MEMORY - library.device_held(), _MEMORY),
        "set_per_process_memory_fraction": lambda share, *_a: library.device_limit(round(share * _MEMORY)),
        "reset_peak_memory_stats": lambda *_a: library.device_reset_peak(),
        "get_rng_state": lambda *_a: torch.get_rng_state(),
        "set_rng_state": lambda state, *_a: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
    }
    for name in ("memory_allocated", "memory_reserved"):
        given[name] = lambda *_a: library.device_held()
        given[f"max_{name}"] = lambda *_a: library.device_peak()
    for name in ("init", "_lazy_init", "set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all"):
        given[name] = lambda *_a, **_o: None
    for name, value in given.items():
        setattr(torch.cuda, name, value)
        if "rng_state" in name:
            setattr(torch.cuda.random, name, value)


def _install_storages() -> None:
    """A build without CUDA does not know the device of a storage that Python makes, as for a checkpoint."""
    import torch
    from torch import storage

    move = storage._to

    def move_to(self: Any, device: Any, non_blocking: bool = False) -> Any:
        if device.type != "cuda" or self.device == device:
            return move(self, device, non_blocking)
        made = torch.empty(self.nbytes(), dtype=torch.uint8, device="cuda")
        made.copy_(torch.empty(0, dtype=torch.uint8).set_(self))
        return made.untyped_storage()

    storage._to = move_to


def _multiply(a: Any, b: Any, dtype: Any) -> Any:
    return a.to(dtype) @ b.to(dtype)


def _add_product(y: Any, a: Any, b: Any, dtype: Any, *, beta: float = 1, alpha: float = 1, out: Any) -> Any:
    return out.copy_(beta * y.to(dtype) + alpha * _multiply(a, b, dtype))


def _norm(x: Any, shape: Any, weight: Any, eps: float | None) -> tuple[Any, Any]:
    """As layer_norm_kernel.cu, `_fused_rms_norm_cuda`: what it keeps is one number in fp32 for each norm."""
    import torch

    dims = tuple(range(-len(shape), 0))
    rate = (x.float().square().mean(dims, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    return (x.float() * rate * (1.0 if weight is None else weight.float())).to(x.dtype), rate


def _norm_backward(dy: Any, x: Any, shape: Any, rate: Any, weight: Any, wanted: list[bool]) -> tuple[Any, Any]:
    dims = tuple(range(-len(shape), 0))
    scaled, normed = dy.float() * (1.0 if weight is None else weight.float()), x.float() * rate
    dx = rate * (scaled - normed * (scaled * normed).mean(dims, keepdim=True))
    dweight = (dy.float() * normed).flatten(0, -len(shape) - 1).sum(0)
    return dx.to(x.dtype) if wanted[0] else None, dweight.to(x.dtype) if wanted[1] else None


def _attend_scaled(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    import torch

    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    plain = torch.ops.aten._scaled_dot_product_attention_math
    return plain(query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa)[0]


def _attend(
    query: Any,
    key: Any,
    value: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options: Any,
) -> tuple[Any, ...]:
    """As flash_attn/flash_api.cpp, `mha_varlen_fwd`: (T, H, D), documents by cumulative lengths in int32."""
    import torch

    is_half = {x.dtype for x in (query, key, value)} <= {torch.bfloat16, torch.float16}
    if not is_half or dropout_p or return_debug_mask:
        raise RuntimeError("FlashAttention only supports fp16 and bf16, here without dropout")
    for lengths, most, tokens in ((cum_seq_q, max_q, len(query)), (cum_seq_k, max_k, len(key))):
        if not lengths.is_cuda or lengths.dtype != torch.int32:
            raise RuntimeError("cu_seqlens must be int32 on the device")
        if int(lengths[-1]) != tokens or int(lengths.diff().max()) > most:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
    mixed, norms = [], []
    for q, k, v, seen, scale in _take_documents(query, key, value, cum_seq_q, cum_seq_k, is_causal, options):
        scores = ((q @ k.transpose(1, 2)) * scale).masked_fill(~seen, float("-inf"))
        norms.append(scores.logsumexp(-1))
        mixed.append((scores.softmax(-1) @ v).transpose(0, 1))
    state = torch.zeros(2, dtype=torch.uint64, device="cuda")
    unused = torch.zeros((), dtype=torch.uint64, device="cuda")
    mask = torch.zeros(0, device="cuda")
    return torch.cat(mixed).to(query.dtype).to("cuda"), torch.cat(norms, 1).to("cuda"), state, unused, mask


def _attend_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    cum_seq_q: Any,
    cum_seq_k: Any,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Any,
    unused: Any,
    **options: Any,
) -> tuple[Any, ...]:
    """As `mha_varlen_bwd`, the gradients of heads that share a key summed."""
    import torch

    found: list[list[Any]] = [[], [], []]
    gradients = grad_out.detach().cpu().float().split(cum_seq_q.cpu().diff().tolist())
    documents = _take_documents(query, key, value, cum_seq_q, cum_seq_k, is_causal, options)
    for gradient_out, (q, k, v, seen, scale) in zip(gradients, documents, strict=True):
        dy = gradient_out.transpose(0, 1)
        shares = ((q @ k.transpose(1, 2)) * scale).masked_fill(~seen, float("-inf")).softmax(-1)
        dshares = dy @ v.transpose(1, 2)
        dscores = shares * (dshares - (dshares * shares).sum(-1, keepdim=True)) * scale
        found[0].append((dscores @ k).transpose(0, 1))
        for place, gradient in ((1, dscores.transpose(1, 2) @ q), (2, shares.transpose(1, 2) @ dy)):
            found[place].append(gradient.unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1))
    dq, dk, dv = (torch.cat(parts).to(query.dtype).to("cuda") for parts in found)
    return dq, dk, dv


def _take_documents(
    query: Any, key: Any, value: Any, cum_q: Any, cum_k: Any, is_causal: bool, options: dict[str, Any]
) -> Any:
    """Each document's (H, L, D) in fp32 on the host, a key for each head; who sees whom (L, L); the scale."""
    import torch

    scale = options.get("scale") or query.shape[-1] ** -0.5
    left, right = (-1 if (o := options.get(f"window_size_{s}")) is None else o for s in ("left", "right"))
    rows = [
        x.detach().cpu().float().split(c.cpu().diff().tolist())
        for x, c in ((query, cum_q), (key, cum_k), (value, cum_k))
    ]
    for document in zip(*rows, strict=True):
        q, k, v = (x.transpose(0, 1) for x in document)
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
        ahead = torch.arange(k.shape[1])[None] - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if left >= 0:
            seen &= ahead >= -left
        if is_causal or right >= 0:
            seen &= ahead <= (0 if is_causal else right)
        yield q, k, v, seen, scale


def _lend(operation: Any) -> Callable[..., Any]:
    """The operation on copies on the host, what it writes to copied back."""
    import torch

    if _SHAPES_ALONE:
        import shapes

        return shapes.ask(operation)
    arguments = operation._schema.arguments
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}

    def run(*values: Any, **named: Any) -> Any:
        given = {**dict(zip((a.name for a in arguments), values, strict=False)), **named}
        lent = {n: v.cpu() if torch.is_tensor(v) else v for n, v in given.items()}
        positional = [lent[a.name] for a, _ in zip(arguments, values, strict=False)]
        out = operation(*positional, **{n: lent[n] for n in named})
        for name in written & given.keys():
            if torch.is_tensor(given[name]):
                given[name].copy_(lent[name])
        return tuple(map(_give, out)) if isinstance(out, tuple | list) else _give(out)

    return run


def _give(value: Any) -> Any:
    import torch

    return value.to("cuda") if torch.is_tensor(value) else value
