"""Model FLOPs utilisation (MFU): the share of the device's peak that the model's own arithmetic keeps busy.

Counted as peers count it (Kaplan et al. 2020, arXiv 2001.08361, section 2.1; Chowdhery et al. 2022,
arXiv 2204.02311, appendix B): each weight of a matrix product costs 2 FLOPs a token forward, 2
backward for its input's gradient and 2 for its own. Frozen weights have no gradient of their own: 6
a token for full training, 4 for every method on a frozen base. What is recomputed (gradient
checkpointing), attention's scores and the adapter itself are not counted; a prefix that rows share
counts as often as it is computed. Where the device's peak or the model's cost is not known there is
no figure: a guessed one would be worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from appliance.method import Method
from appliance.model.shapes import ModelSizes, Shape, is_tower, list_linears, read_sizes, read_weight_shapes

# Dense bf16 with fp32 accumulation in FLOP/s, by the name that CUDA gives the device. NVIDIA's datasheets of H100,
# H200, A100, L4 and L40S, the DGX B200 datasheet and the Ada whitepaper; halved where they count sparsity.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What a token costs in FLOPs, and what the devices of the run can do in a second."""

    flops_per_token: float
    peak_flops: float

    def measure(self, tokens_per_second: float) -> float:
        """The MFU at this rate."""
        return round(tokens_per_second * self.flops_per_token / self.peak_flops, 4)

    def to_json(self, tokens_per_second: float) -> dict[str, float]:
        """For the run's summary: the figure, and the two that it was made with."""
        return {"mfu": self.measure(tokens_per_second), **asdict(self)}


def find_yardstick(
    base: Path, *, method: Method, device_name: str, precision: str, devices: int = 1
) -> Yardstick | None:
    """The yardstick of a training; `None` on a device, in a precision or for a model whose figures are not known."""
    peak = PEAK_FLOPS.get(device_name) if precision == "bf16" else None
    matrices = count_matrices(read_weight_shapes(base), read_sizes(base)) if peak else None
    return Yardstick(count_flops(matrices, method=method.type), peak * devices) if peak and matrices else None


def count_flops(matrices: int, *, method: str) -> float:
    """FLOPs a token of training: 6 a weight where all are trained (`full`), 4 where the base is frozen."""
    return (6.0 if method == "full" else 4.0) * matrices


def count_matrices(weights: Mapping[str, Shape], sizes: ModelSizes) -> int | None:
    """N: the weights that multiply every token, which are all linear layers and the LM head once, tied or not.

    Towers for images and sound are left out: no token of a text meets them. The head counts for every token, also
    where only labelled positions are scored; the look-up of embeddings does not. `None` for a mixture of experts, of
    which a token meets only a few, and for a model whose headers do not say.
    """
    linears = {n: s for n, s in list_linears(weights).items() if not is_tower(n)}
    head = sizes.vocabulary * sizes.hidden
    if not linears or not head or any("expert" in name for name in weights):
        return None
    return sum(math.prod(shape) for shape in linears.values()) + head
