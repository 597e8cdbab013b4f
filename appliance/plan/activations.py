"""What a step keeps of its rows between the forward and the backward pass, in bytes a token.

The factors are what autograd saves in a layer of the Llama kind, by the widths of its tensors: the stream between
layers, queries, keys (and values), and the inner width of the MLP. `tests/test_memory.py` holds them to what is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from appliance.method import FullMethod, Ia3Method, LoraMethod, QloraMethod
from appliance.model.shapes import ModelSizes, Shape
from appliance.recipe import Recipe

Kind = Literal["fused", "lora", "rounded", "dora", "ia3", "frozen", "full"]
Factors = tuple[float, float, float, float]

# of (stream, queries, keys, inner); in bf16 under autocast, and in fp32
_KEPT: dict[Kind, tuple[Factors, Factors]] = {
    "fused": ((12, 4, 4, 8), (16, 8, 8, 16)),
    "lora": ((18, 6, 4, 8), (16, 8, 8, 16)),
    "rounded": ((12, 4, 4, 8), (16, 8, 8, 16)),
    "dora": ((26, 10, 12, 16), (32, 16, 24, 32)),
    "ia3": ((8, 4, 8, 10), (8, 8, 16, 16)),
    "frozen": ((8, 4, 4, 6), (8, 8, 8, 12)),
    "full": ((26, 4, 4, 8), (24, 8, 8, 16)),
}
_NORMS = 2
_NORM = {"full": 8.0}  # of a norm of the stream beyond those; 4 where its weight is frozen
_NORM_OF_HEADS = {"full": (6.0, 8.0)}  # of norms of queries and keys; 4 where they are frozen
# What a norm keeps less, of each value, where it is one operation: nothing in fp32 beside its input. In bf16, in fp32.
_SPARED = {"full": (4.0, 4.0)}
_SPARED_ELSE = (2.0, 0.0)
_PASSING: dict[Kind, tuple[float, float]] = {"fused": (8, 4)}  # of (stream, inner), for a moment; else:
_PASSING_ELSE = (12, 6)


def select_kind(recipe: Recipe, *, on_gpu: bool) -> Kind:
    """What a layer keeps depends on what is trained in it, and on whether LoRA's sum is one operation.

    Beside 4-bit layers PEFT copies what they are given to fp32 unless autocast of CUDA is on, whatever the device.
    """
    method = recipe.method
    if isinstance(method, FullMethod):
        return "full"
    if isinstance(method, Ia3Method):
        return "ia3"
    if not isinstance(method, LoraMethod):
        return "frozen"
    if method.variant == "dora":
        return "dora"
    is_plain = not method.dropout and method.variant != "mica"
    if on_gpu and is_plain and isinstance(method, QloraMethod):
        return "rounded"
    is_fused = is_plain and recipe.training.speed.lora == "auto" and not isinstance(method, QloraMethod)
    return "fused" if is_fused else "lora"


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes a token: what each of the `layers` keeps and hands on, and what a backward pass takes for a moment."""

    layers: int
    kept: float
    handed_on: float
    passing: float

    def estimate(self, tokens: int, *, checkpointing: bool, copies: float = 0.0) -> float:
        """Bytes at the peak, with `copies` of weights that the forward pass makes and the backward pass gives up.

        With checkpointing a layer keeps what it was handed, and one at a time is computed again.
        """
        if checkpointing:
            return tokens * self.layers * self.handed_on + max(self.estimate_layer(tokens), copies)
        return tokens * (self.layers * self.kept + self.passing) + copies

    def estimate_layer(self, tokens: int) -> float:
        """Bytes of one layer while it is on its way back."""
        return tokens * (self.kept + self.passing)


def count_activations(
    kind: Kind, sizes: ModelSizes, weights: Mapping[str, Shape], *, width: float, fused_norms: bool
) -> Activations:
    """Those of a model; `width` is 2 in bf16 and 4 in fp32."""
    in_full = width > 2
    stream, queries, keys, inner = _KEPT[kind][in_full]
    norms = [n for n, s in weights.items() if ".layers.0." in n and n.endswith("norm.weight") and len(s) == 1]
    of_heads = [n for n in norms if n.endswith(("q_norm.weight", "k_norm.weight"))]
    stream += _NORM.get(kind, 4.0) * max(0, len(norms) - len(of_heads) - _NORMS)
    kept = stream * sizes.hidden + queries * sizes.queries + keys * sizes.keys + inner * sizes.inner
    if of_heads:
        kept += _NORM_OF_HEADS.get(kind, (4.0, 4.0))[in_full] * (sizes.queries + sizes.keys)
    if fused_norms:
        plain = [n for n in norms if n.removesuffix("weight") + "bias" not in weights]  # else it is no RMS norm
        values = len(set(plain) - set(of_heads)) * sizes.hidden
        values += (sizes.queries + sizes.keys) if set(plain) & set(of_heads) else 0
        kept -= _SPARED.get(kind, _SPARED_ELSE)[in_full] * values
    briefly, briefly_inner = _PASSING.get(kind, _PASSING_ELSE)
    return Activations(
        layers=sizes.layers,
        kept=kept,
        handed_on=sizes.hidden * (4.0 if kind == "full" else width),  # layers of fp32 weights hand on fp32
        passing=width / 2 * (briefly * sizes.hidden + briefly_inner * sizes.inner),
    )
