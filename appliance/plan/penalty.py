"""The memory that elastic weight consolidation adds to a run, as `training.ewc` and `training.fisher` hold it.

Three moments count: the whole training, which holds the Fisher and where the weights began; the end
of an optimizer step, when one weight's change is worked out and no activation is held; and, before
the first step, the estimate of the Fisher, whose sums are fp32 while neither gradients nor moments exist.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from appliance.method import FullMethod, LoraMethod, Method
from appliance.model.shapes import Shape, list_linears, select_adapted

# Both factors of these begin away from zero, so both are kept in fp32 as they began.
_STARTED = ("orthogonal", "pissa", "olora", "loftq")


@dataclass(frozen=True, slots=True)
class PenaltyMemory:
    """Bytes: `kept` throughout training, `passing` beside it in each step, `estimating` before the first one."""

    kept: int = 0
    passing: int = 0
    estimating: int = 0


def measure_penalty(method: Method, weights: Mapping[str, Shape], dtypes: Mapping[str, str]) -> PenaltyMemory:
    """The bytes of the penalty on the weights by name; `dtypes` are those of the files, asked for full training only.

    The Fisher is bf16, one value for each weight of the base that the method changes. The step holds a
    weight's change, its product with the Fisher and their product in fp32; the estimate holds the
    sums and one gradient in fp32.
    """
    if isinstance(method, FullMethod):
        guarded = dict(weights)
        start = sum(_start_bytes(dtypes[n]) * math.prod(s) for n, s in guarded.items())
    elif isinstance(method, LoraMethod):
        guarded = select_adapted(method, list_linears(weights))
        start = sum(4 * method.rank * sum(s) for s in guarded.values()) if method.variant in _STARTED else 0
    else:
        return PenaltyMemory()
    sizes = [math.prod(s) for s in guarded.values()]
    return PenaltyMemory(
        kept=2 * sum(sizes) + start,
        passing=12 * max(sizes),
        estimating=4 * sum(sizes) + 4 * max(sizes),
    )


def _start_bytes(dtype: str) -> int:
    """Bytes of a weight's copy: fp32 master weights are kept in bf16 where the files lose nothing by it."""
    return 2 if dtype == "BF16" else 4
