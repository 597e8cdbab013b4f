"""Whether this machine can do the work, asked before hours depend on it.

Each check is one line: what was looked at, what was found, what to do. It refuses to guess: torch is
asked in a child to multiply on the device and to quantise there, and a folder is written to.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from appliance.command import run_command
from appliance.errors import ApplianceError, CommandError
from appliance.plan.machine import Machine
from appliance.store import find_folder, open_store

_GIB = 2**30
_LOW_DISK, _NO_DISK, _LOW_SHARED = 20 * _GIB, _GIB, _GIB
_PROBE_S = 180.0
_FREE = "free some: `tokens` in the cache may be deleted always, `bases` in it and runs that are over while none is on"
Outcome = Literal["ok", "warning", "fault"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; `action` is what to do, empty when all is well; `is_gpu` where one can be used."""

    subject: str
    outcome: Outcome
    found: str
    action: str = ""
    is_gpu: bool = False


def examine_machine(machine: Machine, *, folders: Mapping[str, Path], store_url: str | None) -> list[Check]:
    """Every check, in the order in which a run would meet them; it raises nothing that it can report.

    `folders` are those that a run writes to, by name.
    """
    checks = [_check_processor(machine), *_check_device(machine, probe_torch())]
    if machine.gpu:
        checks.append(check_shared_memory(Path("/dev/shm")))  # noqa: S108 - its size is the question
    checks += [check_folder(name, folder) for name, folder in folders.items()]
    checks += [_check_program("git", "git"), _check_program("dvc", sys.executable, "-m", "dvc")]
    if store_url:
        checks.append(_check_store(store_url))
    return checks


def probe_torch() -> dict[str, Any]:
    """What torch and bitsandbytes do on this machine (`appliance.plan.probe`); `fault` when they do not start."""
    try:
        found: dict[str, Any] = json.loads(
            run_command([sys.executable, "-m", "appliance.plan.probe"], timeout_s=_PROBE_S)
        )
    except CommandError as fault:
        return {"fault": fault.last_line}
    except ValueError as fault:
        return {"fault": str(fault)}
    return found


def _check_processor(machine: Machine) -> Check:
    found = f"{machine.cores} cores, {machine.memory_bytes / _GIB:.0f} GiB, by cgroup"
    return Check("processor", "ok", found)


def _check_device(machine: Machine, probe: Mapping[str, Any]) -> list[Check]:
    if "fault" in probe:
        action = "install the appliance's extra 'train' (in its clone: `uv pip install '.[train]'`), or use the image"
        return [Check("torch", "fault", str(probe["fault"]), action)]
    versions = f"torch {probe['torch']}, bitsandbytes {probe['bitsandbytes']}"
    checks = [check_gpu(machine, probe), Check("torch", "ok", f"{versions}: multiplies on {probe['device']}")]
    if probe["quantise"]:
        action = "qlora cannot run here: install a bitsandbytes that knows this CUDA, or use lora"
        checks.append(Check("4 bits", "warning", probe["quantise"], action))
    return checks


def check_gpu(machine: Machine, probe: Mapping[str, Any]) -> Check:
    """The driver's word against torch's: a GPU that only one of them sees is a fault."""
    is_seen = str(probe["device"]).startswith("cuda")
    if not machine.gpu and not is_seen:
        return Check("GPU", "ok", "none: recipes with needs.gpu: required are refused here")
    if not machine.gpu:
        action = "let nvidia-smi run here (a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility), or hide the GPU"
        found = f"{probe['name']}: torch sees it, nvidia-smi names none: runs would be planned for the processor"
        return Check("GPU", "fault", found, f"{action} with CUDA_VISIBLE_DEVICES=", is_gpu=True)
    if is_seen:
        more = f"; {machine.gpus - 1} more for recipes with needs.devices" if machine.gpus > 1 else ""
        found = f"{machine.gpu}, {machine.gpu_memory_bytes / _GIB:.0f} GiB, torch sees it{more}"
        return Check("GPU", "ok", found, is_gpu=True)
    why = probe["cuda_fault"] or f"this torch ({probe['torch']}) is built without CUDA"
    action = "update the driver to one that knows the CUDA of this torch, or use the CUDA image"
    return Check("GPU", "fault", f"{machine.gpu}: torch does not see it: {why}", action)


def check_shared_memory(folder: Path) -> Check:
    """NCCL and torch's loaders share memory here; docker gives 64 MiB."""
    size = shutil.disk_usage(folder).total if folder.is_dir() else 0
    found = f"{size / _GIB:.1f} GiB"
    if size < _LOW_SHARED:
        return Check(str(folder), "warning", found, "give it more for several GPUs: --shm-size 8g, or --ipc host")
    return Check(str(folder), "ok", found)


def check_folder(name: str, folder: Path) -> Check:
    """A folder that a run writes to, or what is there of the way to it: it is written to, and has room."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=place) as handle:
            handle.write(b"\0" * 4096)
            handle.flush()
        free = shutil.disk_usage(place).free
    except OSError as fault:
        found = f"{folder}: {fault.strerror or fault}"
        return Check(name, "fault", found, "mount a folder that this user may write to, or choose another")
    found = f"{folder}: writable, {free / _GIB:.0f} GiB free"
    if free < _NO_DISK:
        return Check(name, "fault", found, _FREE)
    if free < _LOW_DISK:
        return Check(name, "warning", found, "enough for adapters of small models; free some before larger ones")
    return Check(name, "ok", found)


def _check_program(name: str, *command: str) -> Check:
    """Asked for its version in the way in which the product starts it."""
    try:
        found = run_command([*command, "--version"], timeout_s=60.0).strip().splitlines()[0]
    except (CommandError, IndexError) as fault:
        what = "the appliance's extra 'data'" if name == "dvc" else name
        said = fault.last_line if isinstance(fault, CommandError) else "it names no version"
        return Check(name, "fault", said, f"install {what}, or use the image")
    return Check(name, "ok", found.removeprefix(f"{name} version "))


def _check_store(url: str) -> Check:
    """Read only, a folder aside: who may write a bucket is seen when a version is published; no object is left."""
    try:
        store = open_store(url)
        count = sum(1 for _ in store.list("models/"))
    except ApplianceError as fault:
        return Check("store", "fault", str(fault), "mend the address, the endpoint or the credentials")
    folder, found = find_folder(store), f"{store.url}: readable, {count} objects below models/"
    return _check_store_folder(store.url, folder, found=found) if folder else Check("store", "ok", found)


def _check_store_folder(url: str, folder: Path, *, found: str) -> Check:
    """A mistyped folder reads like an empty registry, and the first publish would make it."""
    written = check_folder("store", folder)
    if folder.is_dir():
        is_writable = written.outcome != "fault"
        action = "publishing needs write access; pulling does not"
        return Check("store", "ok", found) if is_writable else Check("store", "warning", written.found, action)
    outcome: Outcome = "fault" if written.outcome == "fault" else "warning"
    found = f"{url}: no such folder; the first publish makes it; {written.found}"
    return Check("store", outcome, found, "look at the spelling" if outcome == "warning" else written.action)
