"""`python -m appliance.plan.probe`: what torch and bitsandbytes do here, as one JSON document, in a child.

A driver that is too old, a torch without CUDA and a bitsandbytes that lacks this CUDA's library all
import without a word; they are found by computing.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from appliance.child import name_allocator

os.environ.update(name_allocator(os.environ))  # as in a run's children, and before torch starts

import torch


def main() -> None:
    """Multiply and quantise on the device that a run would take, and print what came of it."""
    cuda_fault = _start_cuda()
    device = torch.device("cpu" if cuda_fault else "cuda")
    ones = torch.ones(64, 64, device=device)
    if float((ones @ ones).sum()) != 64.0**3:
        cuda_fault, device = f"a product on {device} is wrong", torch.device("cpu")
    version, quantise = _quantise(ones.to(device))
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "device": str(device),
        "name": torch.cuda.get_device_name() if device.type == "cuda" else "",
        "cuda_fault": cuda_fault if torch.version.cuda else "",
        "bitsandbytes": version,
        "quantise": quantise,
    }
    sys.stdout.write(json.dumps(found))


def _start_cuda() -> str:
    """Why CUDA does not start; empty when it does."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as fault:
        return str(fault).splitlines()[0]
    return "" if torch.cuda.is_available() else "no device"


def _quantise(ones: torch.Tensor) -> tuple[str, str]:
    """The version of bitsandbytes, and why NF4 does not come back as it went in; empty when it does."""
    try:
        import bitsandbytes
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(ones, quant_type="nf4")
        is_same = bool(torch.equal(dequantize_4bit(packed, state), ones))
    except (ImportError, RuntimeError, OSError, AttributeError, NotImplementedError) as fault:
        return "none", f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else 'no reason given'}"
    return bitsandbytes.__version__, "" if is_same else "NF4 does not give back what went in"


if __name__ == "__main__":
    main()
