"""The sizes of a model's weights, from the headers of its files: no weight is read, torch is not needed.

What a method would do to layers that are not there, or to layers smaller than its rank, is refused
from the sizes alone, before anything is loaded.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.errors import ModelError, TrainingError
from appliance.method import Ia3Method, LoraMethod, Method, PromptTuningMethod

Shape = tuple[int, ...]
_NO_LINEAR = ("lm_head", "wte", "wpe")
_ON_EXPERTS = ("plain", "rslora", "gaussian")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_TOWER = re.compile(r"(^|\.)(vision|visual|audio|multi_modal|connector|embed_vision|embed_audio)")
# What else `all-linear` leaves alone: routers of experts, and what Mamba's kernels read past any adapter.
_BARE = re.compile(r"\.(gate|router)$|\.router\.|\.(mamba|mixer)\.out_proj$")
_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|position_embeddings?)\.weight$")
_SMALL_SHARE = 0.01
_STATE = re.compile("mamba|conv|linear|recurrent|delta|ssm")
_STATE_SIZES = ("state_size", "ssm_state_size", "mamba_d_state", "conv_L_cache", "linear_conv_kernel_dim")


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """Widths and counts of a decoder: of one token in one layer `queries` and `keys`, and `inner` of its MLP.

    Of a mixture of experts `inner` is that of all experts which a token meets. `carries_state` where layers hand a
    state from token to token, as convolutions and recurrences do, through all that is in a batch. `context` is the
    longest row that the model was made for, 0 where it is not told.
    """

    hidden: int
    layers: int
    vocabulary: int
    keys: int
    queries: int = 0
    inner: int = 0
    carries_state: bool = False
    context: int = 0


def read_sizes(base: Path) -> ModelSizes:
    """The sizes that `config.json` states; 0 for what it leaves out. Raises `ModelError` when it is damaged."""
    try:
        config = json.loads((base / "config.json").read_bytes())
        config = config.get("text_config", config)
        hidden, heads = int(config.get("hidden_size") or 0), int(config.get("num_attention_heads") or 1)
        width = int(config.get("head_dim") or hidden // heads)
        return ModelSizes(
            hidden=hidden,
            layers=int(config.get("num_hidden_layers") or 0),
            vocabulary=int(config.get("vocab_size") or 0),
            keys=width * int(config.get("num_key_value_heads") or heads),
            queries=width * heads,
            inner=_read_inner(config, hidden),
            carries_state=_read_state(config),
            context=_read_context(config),
        )
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as fault:
        raise ModelError(
            f"{base / 'config.json'}: not a model's sizes in JSON ({fault}); copy the model again"
        ) from fault


def read_quantisation(base: Path) -> str | None:
    """The form that the files keep their weights in (`mxfp4`, `fp8`, `gptq`, ...), None for ordinary numbers."""
    path = base / "config.json"
    try:
        config = json.loads(path.read_bytes())
        form = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
        return str(form["quant_method"]) if form else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as fault:
        raise ModelError(f"{path}: its quantization_config names no quant_method; copy the model again") from fault


def _read_inner(config: dict[str, Any], hidden: int) -> int:
    """The MLP's width, 3.5 times the stream's where it is not told; of experts and of those that all tokens share.

    Where layers differ, a list has a value for each (Gemma 3n): the largest counts.
    """

    def read(key: str) -> int:
        value = config.get(key) or 0
        return max(map(int, value)) if isinstance(value, list) else int(value)

    each = read("moe_intermediate_size") or read("intermediate_size") or int(3.5 * hidden)
    return max(1, read("num_experts_per_tok")) * each + read("shared_expert_intermediate_size")


def _read_context(config: dict[str, Any]) -> int:
    """As it is stated, or as YaRN and its like stretch it."""
    stated = int(config.get("max_position_embeddings") or config.get("n_positions") or 0)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return max(stated, int(float(rope.get("factor") or 0) * float(rope.get("original_max_position_embeddings") or 0)))


def has_position_table(weights: Mapping[str, Shape]) -> bool:
    """Whether positions are rows of a table: then there are no further ones, and a longer row is an error."""
    return any(_POSITIONS.search(name) and not is_tower(name) for name in weights)


def _read_state(config: dict[str, Any]) -> bool:
    """By the kinds of layers where a configuration lists them, else by the sizes that only states have."""
    kinds = config.get("layer_types") or config.get("layers_block_type")
    if kinds:
        return any(_STATE.search(str(kind)) for kind in kinds)
    return any(key in config for key in _STATE_SIZES)


def read_weight_shapes(base: Path) -> dict[str, Shape]:
    """Name and shape of every weight in the safetensors files, from their headers alone.

    Raises `ModelError` for weights in 8 bits: a configuration that does not tell of them (else they were turned into
    bf16) has them loaded as the values themselves, without their scales.
    """
    headers = _read_headers(base)
    if small := next((n for n, t in headers.items() if str(t["dtype"]).startswith("F8_")), None):
        raise ModelError(
            f"{base / 'config.json'}: has no quantization_config, and {small} is in 8 bits; copy the model again"
        )
    return {name: tuple(t["shape"]) for name, t in headers.items()}


def count_values(shapes: Mapping[str, Shape]) -> int:
    """How many values weights of these shapes have."""
    return sum(math.prod(s) for s in shapes.values())


def read_weight_dtypes(base: Path) -> dict[str, str]:
    """Name and dtype of every weight as the files hold it, in safetensors' words (`BF16`, `F32`, ...)."""
    return {name: str(t["dtype"]) for name, t in _read_headers(base).items()}


def list_weight_files(base: Path) -> list[Path]:
    """The files that are loaded, as transformers picks them: `model.safetensors`, else those of the index, else all.

    A folder may hold its weights a second time in its makers' own layout (Mistral's `consolidated.safetensors`).
    Raises `ModelError` for an index that is damaged or names a file that is not there.
    """
    whole, index = base / "model.safetensors", base / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return sorted(base.glob("*.safetensors"))
    try:
        files = sorted({base / str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise ModelError(f"{index}: not an index of weights ({fault}); copy the model again") from fault
    if absent := [f.name for f in files if not f.is_file()]:
        raise ModelError(f"{index}: names {absent[0]}, which is not there; copy the model again")
    return files


def _read_headers(base: Path) -> dict[str, dict[str, Any]]:
    """What the headers say of each weight. Raises `ModelError` for a damaged header or a cut file."""
    weights: dict[str, dict[str, Any]] = {}
    for file in list_weight_files(base):
        with file.open("rb") as stream:
            lead = stream.read(8)
            size = struct.unpack("<Q", lead)[0] if len(lead) == 8 else 0
            if not 2 <= size <= 100_000_000:
                raise ModelError(f"{file}: not a safetensors file; copy the model again")
            try:
                header = json.loads(stream.read(size))
            except ValueError as fault:
                raise ModelError(f"{file}: damaged header; copy the model again") from fault
        found = {n: t for n, t in header.items() if n != "__metadata__"}
        expected = 8 + size + max((t["data_offsets"][1] for t in found.values()), default=0)
        if file.stat().st_size != expected:
            raise ModelError(f"{file}: {file.stat().st_size} bytes, its header says {expected}; copy the model again")
        weights |= found
    return weights


def list_linears(weights: Mapping[str, Shape]) -> dict[str, Shape]:
    """The matrices that adapters can be put on, by layer name: (out, in) of each, no embeddings, no head.

    GPT-2 keeps them as (in, out), which its biases tell: those have a value for each output.
    """
    layers = {n.removesuffix(".weight"): s for n, s in weights.items() if len(s) == 2 and n.endswith(".weight")}
    chosen = {n: s for n, s in layers.items() if "embed" not in n and n.rpartition(".")[2] not in _NO_LINEAR}
    return {n: s[::-1] if weights.get(f"{n}.bias") == s[1:] else s for n, s in chosen.items()}


def list_experts(weights: Mapping[str, Shape]) -> dict[str, Shape]:
    """Those of the matrices that are experts of a mixture: a model holds those of a layer as one tensor.

    PEFT adapts them all the same; 4-bit loading, which rounds linear layers, leaves them as they are.
    """
    return {n: s for n, s in list_linears(weights).items() if is_expert(n)}


def list_stacked_experts(weights: Mapping[str, Shape]) -> dict[str, Shape]:
    """Weights that hold the experts of a layer as one tensor in the files too (gpt-oss, Llama 4): none is adapted."""
    return {n: s for n, s in weights.items() if len(s) == 3 and ".experts." in n}


def is_expert(layer: str) -> bool:
    """Whether the matrix of this name is one of the experts of a mixture."""
    return _EXPERT.search(layer) is not None


def is_tower(name: str) -> bool:
    """Whether a layer or weight of this name is of a tower for images or sound, which no token of a text meets."""
    return _TOWER.search(name) is not None


def select_adapted(method: LoraMethod, linears: Mapping[str, Shape]) -> dict[str, Shape]:
    """The layers that get adapters: those that the recipe names, or all linear layers of the language model.

    All are all that the rank fits in: gates, with a number or a few for each head or expert, are too small for it and
    hold next to nothing. Raises `TrainingError` for a rank too large for a layer that is named or that counts.
    """
    is_all = isinstance(method.targets, str)
    belonging = {n: s for n, s in linears.items() if not is_tower(n) and not _BARE.search(n)}
    chosen = belonging if is_all else select_targets(method.targets, linears)
    small = {n: s for n, s in chosen.items() if min(s) < method.rank}
    if small and not (is_all and count_values(small) <= _SMALL_SHARE * count_values(chosen)):
        name, shape = min(small.items(), key=lambda item: (min(item[1]), item[0]))
        raise TrainingError(
            f"method.rank: {method.rank} is more than {name} can use, whose weight is {shape[0]} x {shape[1]}; "
            f"set it to {min(shape)} or less, or name other method.targets"
        )
    return {n: s for n, s in chosen.items() if n not in small}


def select_targets(targets: Sequence[str], linears: Mapping[str, Shape]) -> dict[str, Shape]:
    """The layers whose name is a target or ends with one, as PEFT finds them.

    Raises `TrainingError` when a target matches nothing, with the names that exist.
    """
    lost = [t for t in targets if not any(_matches(n, t) for n in linears)]
    if lost:
        names = sorted({n.rpartition(".")[2] for n in linears})
        raise TrainingError(
            f"method.targets: {', '.join(lost)} matches no layer; linear layers of this model: {', '.join(names)}"
        )
    return {n: s for n, s in linears.items() if any(_matches(n, t) for t in targets)}


def check_method(method: Method, linears: Mapping[str, Shape], *, base: Path) -> None:
    """Raise `TrainingError` when the method does not fit the model in the folder `base`.

    Its layers are not there, they are smaller than its rank, or its text is longer than its tokens.
    """
    if isinstance(method, PromptTuningMethod) and method.text is not None:
        _check_text(method, base)
    elif isinstance(method, Ia3Method):
        select_targets(method.scaled, linears)
    elif isinstance(method, LoraMethod):
        _check_experts(method, select_adapted(method, linears))


def _check_experts(method: LoraMethod, chosen: Mapping[str, Shape]) -> None:
    """PEFT adapts the experts of a layer as one tensor, by the plain product alone."""
    expert = min(filter(is_expert, chosen), default=None)
    if expert is None:
        return
    where = f"{expert} is one of the experts that the model holds as one tensor"
    if method.variant not in _ON_EXPERTS:
        raise TrainingError(
            f"method.variant: {method.variant} adapts single matrices, and {where}; use {', '.join(_ON_EXPERTS)}, "
            "or name the other layers in method.targets"
        )
    if method.dropout:
        raise TrainingError(
            f"method.dropout: {where}, which PEFT adapts without dropout; set it to 0, or name the other layers in "
            "method.targets"
        )


def _check_text(method: PromptTuningMethod, base: Path) -> None:
    """PEFT would cut a longer text without a word."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.no_truncation()
    words = len(tokenizer.encode(method.text).ids)
    if words > method.tokens:
        raise TrainingError(
            f"method.text: {words} tokens, method.tokens is {method.tokens}; it would be cut: set tokens to {words}"
        )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
