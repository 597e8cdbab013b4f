"""Failures of the device in words: torch, cuBLAS, bitsandbytes, Triton and the kernel say them only so.

Out of memory means: try again with less. A lost device means: the same work goes on, here later or on another
machine. What a program does wrong (an index out of range, an illegal address) is neither and stays a bug.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from appliance.command import WorkerEnd
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
# How bitsandbytes ends the process when a call of CUDA fails (csrc/common.cuh, CUDA_CHECK_RETURN): no exception.
_ENDED_BY_BITSANDBYTES = re.compile(r"Error .+ at line \d+ in file ")

# What a class of model makes of a batch or a method that it does not take; `name_fault` tells want of memory apart.
MISFITS = (ValueError, TypeError, LookupError, AttributeError, RuntimeError)


def name_fault(fault: BaseException) -> Literal["memory", "lost", "other"]:
    """Which of the two a failure is, by type or by its words."""
    return "memory" if isinstance(fault, MemoryError) else _name_words(str(fault))


def _name_words(words: str) -> Literal["memory", "lost", "other"]:
    if any(w in words for w in _NO_MEMORY):
        return "memory"
    return "lost" if any(w in words for w in _LOST) else "other"


def name_end(end: WorkerEnd) -> WorkerEnd:
    """A child's end with the code of a device's failure, where a library ended it and only its log says why."""
    if end.code != 1 or not _ENDED_BY_BITSANDBYTES.search(end.failure):
        return end
    codes = {"memory": DeviceError.exit_code, "lost": LostDeviceError.exit_code, "other": end.code}
    return replace(end, code=codes[_name_words(end.failure)])


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
