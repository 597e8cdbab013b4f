"""Speed levers: which way the same numbers are computed, chosen by device and recorded in the manifest.

A lever changes speed and memory, never what is learned: each is held to the library's own result
by a test or by a guard before the first step. The recipe can set every one of them.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from appliance.method import LoraMethod, Method, QloraMethod
from appliance.recipe import TrainingSection, is_packed

Prefix = Literal["standard", "shared"]
Head = Literal["standard", "labelled", "fused"]


@dataclass(frozen=True, slots=True)
class Levers:
    """What each lever was set to; see `appliance.recipe.SpeedSection` for their meaning."""

    rows: Literal["packed", "padded"]
    attention: Literal["standard", "packed"]
    head: Head
    lora: Literal["standard", "fused"]
    norm: Literal["standard", "fused"]
    prefix: Prefix
    compile: bool

    def to_json(self) -> dict[str, object]:
        """For the run's summary."""
        return asdict(self)


def select_levers(section: TrainingSection, *, method: Method, on_cuda: bool) -> Levers:
    """The recipe's levers, with what it leaves to `auto` decided.

    Packed batches are attended document by document, and what their rows begin with alike is
    computed once; the LM head scores labelled positions only, on CUDA through TRL's kernel that
    never holds the logits; LoRA layers and RMS norms are fused. Compilation is never chosen: on a CPU it costs
    70 s for nothing.
    """
    wanted, packed = section.speed, is_packed(section, method)
    plain_lora = isinstance(method, LoraMethod) and not isinstance(method, QloraMethod)
    is_apart = packed and wanted.attention == "auto"
    return Levers(
        rows="packed" if packed else "padded",
        attention="packed" if is_apart else "standard",
        head=_select_head(wanted.head, packed=packed, on_cuda=on_cuda),
        lora="fused" if plain_lora and wanted.lora == "auto" else "standard",
        norm="fused" if wanted.norm == "auto" else "standard",
        prefix="shared" if is_apart and wanted.prefix == "auto" else "standard",
        compile=wanted.compile == "on",
    )


def settle_levers(levers: Levers, model: Any) -> Levers:
    """The levers for this very model: with dropout every row draws its own noise, so nothing is shared.

    Nor where a router's loss counts tokens. On CUDA the fused
    head is a kernel that Triton builds here: where it cannot, the head scores the labelled positions plainly. A class
    with attention of its own keeps it.
    """
    from appliance.training import attention

    if levers.attention == "packed" and attention.name_used(model) != attention.NAME:
        levers = replace(levers, attention="standard", prefix="standard")
    if levers.head == "fused" and model.device.type == "cuda" and not has_compiler():
        levers = replace(levers, head="labelled")
    is_apart = draws_noise(model) or getattr(model.config.get_text_config(), "output_router_logits", False)
    return replace(levers, prefix="standard") if is_apart else levers


def draws_noise(model: Any) -> bool:
    """Whether a forward pass in training draws dropout: by a module, or by a number in the configuration."""
    has_module = any(type(m).__name__.startswith("Dropout") and m.p > 0 for m in model.modules())
    return has_module or bool(getattr(model.config.get_text_config(), "attention_dropout", 0))


def pad_rows(levers: Levers) -> Levers:
    """The levers for padded rows, which the library alone attends to."""
    head: Head = "standard" if levers.head == "standard" else "labelled"
    return replace(levers, rows="padded", attention="standard", head=head, prefix="standard")


def _select_head(wanted: Literal["auto"] | Head, *, packed: bool, on_cuda: bool) -> Head:
    """The kernel that never holds logits is for packed rows on a GPU."""
    if not packed:
        return "standard" if wanted == "standard" else "labelled"
    return wanted if wanted != "auto" else "fused" if on_cuda else "labelled"


def has_compiler() -> bool:
    """Whether Triton can build what launches its kernels: a C compiler, Python's headers (triton/runtime/build.py)."""
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    return compiler is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()
