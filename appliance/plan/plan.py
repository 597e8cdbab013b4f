"""Steps, tokens, micro-batch and memory of a run, from the recipe, the rows and the weights' headers.

Memory follows the usual account: weights, gradients, optimizer, activations and LM head. It is an
estimate; the first step proves it, and out of memory is answered with half the micro-batch.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appliance.errors import ModelError
from appliance.plan.machine import Machine
from appliance.recipe import FullMethod, LoraMethod, Method, QloraMethod, Recipe

_OVERHEAD = 1 << 30
_RANGES = {"full": (1e-5, 2e-5), "lora": (1e-4, 3e-4), "qlora": (1e-4, 3e-4)}
_MICRO_TOKENS = 4096
_FITS = 0.8


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be done; bytes are estimates of the peak."""

    rows: int
    validation_rows: int
    steps: int
    tokens: int
    trained_tokens: int
    longest: int
    micro_batch: int
    effective_batch: int
    checkpointing: bool
    parameters: int
    trainable_parameters: int
    peak_bytes: int
    budget_bytes: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For `plan --json` and the run folder."""
        return asdict(self)


def build_plan(
    recipe: Recipe,
    *,
    lengths: Sequence[int],
    trained_tokens: int,
    validation_rows: int,
    base: Path,
    machine: Machine,
) -> Plan:
    """The plan for training rows of these token `lengths` on `machine`; tokens are over all epochs."""
    section = recipe.training
    longest = max(lengths)
    micro = select_micro_batch(section.effective_batch, longest=longest)
    weights = read_weight_shapes(base)
    parameters = sum(math.prod(s) for s in weights.values())
    shape = _read_shape(base)
    trainable = count_trainable(recipe.method, weights)
    peaks = {
        c: _estimate_peak(
            recipe.method,
            parameters=parameters,
            trainable=trainable,
            shape=shape,
            tokens=micro * longest,
            checkpointing=c,
        )
        for c in (False, True)
    }
    fits = peaks[False] <= _FITS * machine.budget_bytes
    checkpointing = section.gradient_checkpointing == "on" or (section.gradient_checkpointing == "auto" and not fits)
    steps = max(1, math.ceil(math.ceil(len(lengths) / section.effective_batch) * section.epochs))
    return Plan(
        rows=len(lengths),
        validation_rows=validation_rows,
        steps=steps,
        tokens=round(sum(lengths) * section.epochs),
        trained_tokens=round(trained_tokens * section.epochs),
        longest=longest,
        micro_batch=micro,
        effective_batch=section.effective_batch,
        checkpointing=checkpointing,
        parameters=parameters,
        trainable_parameters=trainable,
        peak_bytes=peaks[checkpointing],
        budget_bytes=machine.budget_bytes,
        warnings=tuple(_warn(recipe, rows=len(lengths), peak=peaks[checkpointing], machine=machine)),
    )


def select_micro_batch(effective: int, *, longest: int) -> int:
    """The largest divisor of the effective batch whose worst case is at most 4,096 tokens."""
    return next(m for m in range(effective, 0, -1) if effective % m == 0 and (m * longest <= _MICRO_TOKENS or m == 1))


def read_weight_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight in the safetensors files, from their headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(base.glob("*.safetensors")):
        with file.open("rb") as stream:
            lead = stream.read(8)
            size = struct.unpack("<Q", lead)[0] if len(lead) == 8 else 0
            if not 2 <= size <= 100_000_000:
                raise ModelError(f"{file}: not a safetensors file; copy the model again")
            try:
                header = json.loads(stream.read(size))
            except ValueError as fault:
                raise ModelError(f"{file}: damaged header; copy the model again") from fault
        shapes |= {name: tuple(t["shape"]) for name, t in header.items() if name != "__metadata__"}
    return shapes


def _read_shape(base: Path) -> dict[str, int]:
    config = json.loads((base / "config.json").read_text("utf-8"))
    config = config.get("text_config", config)
    names = {"hidden": "hidden_size", "layers": "num_hidden_layers", "vocabulary": "vocab_size"}
    return {k: int(config.get(v) or 0) for k, v in names.items()}


def count_trainable(method: Method, weights: Mapping[str, tuple[int, ...]]) -> int:
    """All weights for full; for LoRA rank x (in + out) of every target matrix, plus DoRA's magnitudes (out)."""
    if isinstance(method, FullMethod):
        return sum(math.prod(s) for s in weights.values())
    matrices = {n.removesuffix(".weight"): s for n, s in weights.items() if len(s) == 2 and n.endswith(".weight")}
    targets = [s for name, s in matrices.items() if _is_target(name, method.targets)]
    magnitudes = sum(s[0] for s in targets) if method.variant == "dora" else 0
    return sum(method.rank * (s[0] + s[1]) for s in targets) + magnitudes


def _is_target(name: str, targets: str | Sequence[str]) -> bool:
    """Whether PEFT would adapt this matrix; "all-linear" means every one but embeddings and head."""
    last = name.rpartition(".")[2]
    return last in targets if not isinstance(targets, str) else "embed" not in name and last != "lm_head"


def _estimate_peak(
    method: Method, *, parameters: int, trainable: int, shape: dict[str, int], tokens: int, checkpointing: bool
) -> int:
    """Peak bytes; activation and head factors for a Llama layer in bf16."""
    hidden, layers, vocabulary = shape["hidden"], shape["layers"], shape["vocabulary"]
    embedding = vocabulary * hidden
    if isinstance(method, QloraMethod):
        weights = 0.516 * (parameters - embedding) + 2.0 * embedding + 16.0 * trainable
    elif isinstance(method, LoraMethod):
        weights = 2.0 * parameters + 16.0 * trainable
    else:
        weights = 16.0 * parameters
    activations = tokens * hidden * ((2.0 * layers + 56.0) if checkpointing else 56.0 * layers)
    head = 12.3 * tokens * vocabulary
    return round(1.07 * (weights + activations + head) + _OVERHEAD)


def _warn(recipe: Recipe, *, rows: int, peak: int, machine: Machine) -> list[str]:
    """What the guide would question; each names its range."""
    found = []
    low, high = _RANGES[recipe.method.type]
    rate = recipe.training.learning_rate
    if rate is not None and not low <= rate <= high:
        found.append(
            f"training.learning_rate {rate:g} is outside the usual {low:g} to {high:g} for {recipe.method.type}"
        )
    if not 2 <= recipe.training.epochs <= 5:
        found.append(f"training.epochs {recipe.training.epochs:g} is outside the usual 2 to 5")
    if isinstance(recipe.method, FullMethod) and rows < 10_000:
        found.append(f"full training usually wants 10,000 rows or more, found {rows}; lora is the default for fewer")
    if peak > machine.budget_bytes:
        found.append(
            f"estimated peak {peak / 2**30:.1f} GiB exceeds the {machine.budget_bytes / 2**30:.1f} GiB here; "
            "use qlora, a shorter max_length or a larger device"
        )
    return found
