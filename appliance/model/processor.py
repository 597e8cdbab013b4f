"""What this machine's processor computes in natively, read without torch."""

from __future__ import annotations

from pathlib import Path


def has_cpu_bf16(cpuinfo: Path) -> bool:
    """Whether this CPU multiplies bf16 natively; emulated bf16 is slower than fp32."""
    try:
        flags = cpuinfo.read_text("utf-8", errors="replace")
    except OSError:
        return False
    return " avx512_bf16" in flags or " amx_bf16" in flags
