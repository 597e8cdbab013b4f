"""Failures of the device in words: torch, cuBLAS, bitsandbytes, Triton and the kernel say them only so.

Out of memory means: try again with less. A lost device means: the same work goes on, here later or on another
machine. What a program does wrong (an index out of range, an illegal address) is neither and stays a bug.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from appliance.errors import DeviceError, LostDeviceError

_NO_MEMORY = (
    "out of memory",  # torch on CUDA, the CUDA runtime, Triton
    "can't allocate memory",  # torch's allocator
    "not enough memory",
    "Cannot allocate memory",  # the kernel, ENOMEM
    "failed to map segment",  # the same while a library is loaded
    "bad_alloc",
    "could not create a memory",  # oneDNN
    "could not create a primitive",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # no room for cuBLAS's own workspace
    "CUDNN_STATUS_ALLOC_FAILED",
)
# Words of cudaGetErrorString (CUDA runtime API, "Error handling") for what the program has no part in.
_LOST = (
    "unspecified launch failure",
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "hardware stack error",
    "the launch timed out and was terminated",
    "busy or unavailable",
    "no CUDA-capable device is detected",
    "system not yet initialized",
    "CUDA unknown error",
)


def name_fault(fault: BaseException) -> Literal["memory", "lost", "other"]:
    """Which of the two a failure is, by type or by its words."""
    words = str(fault)
    if isinstance(fault, MemoryError) or any(w in words for w in _NO_MEMORY):
        return "memory"
    return "lost" if any(w in words for w in _LOST) else "other"


@contextmanager
def device_faults_as_errors() -> Iterator[None]:
    """Raise `DeviceError` for what ran out of memory and `LostDeviceError` for a device that failed."""
    try:
        yield
    except (RuntimeError, OSError, ImportError, MemoryError) as fault:
        kind = name_fault(fault)
        if kind == "other":
            raise
        words = next(iter(str(fault).splitlines()), "out of memory")
        raise (DeviceError(words) if kind == "memory" else LostDeviceError(words)) from fault
