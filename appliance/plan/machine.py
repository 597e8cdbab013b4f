"""What this machine grants the process: cores and memory by cgroup, GPUs by the driver's own tool."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from appliance.command import name_gpus, run_command
from appliance.errors import CommandError, DeviceError
from appliance.model.processor import has_cpu_bf16
from appliance.recipe import Recipe

_CGROUP = Path("/sys/fs/cgroup")
_AMPERE = 8.0


@dataclass(frozen=True, slots=True)
class Machine:
    """Cores, bytes and GPUs that this process may use; `gpu` is the first one's name, empty without one.

    `gpu_memory_bytes` are of one GPU. `has_bf16`: whether the device that trains multiplies bf16 natively,
    and does not emulate it.
    """

    cores: int
    memory_bytes: int
    gpu: str = ""
    gpu_memory_bytes: int = 0
    has_bf16: bool = True
    gpus: int = 0

    @property
    def budget_bytes(self) -> int:
        """The memory that weights and activations must fit into."""
        return self.gpu_memory_bytes or self.memory_bytes

    def share(self, devices: int) -> Machine:
        """What each of `devices` processes has of it: a GPU of its own, and its part of the rest."""
        return replace(self, cores=max(1, self.cores // devices), memory_bytes=self.memory_bytes // devices)


def read_machine(cgroup: Path = _CGROUP) -> Machine:
    """The limits in force, the smaller of host and cgroup (v2)."""
    line, gpus = _ask_driver()
    gpu, gpu_memory, capability = parse_gpu(line)
    return Machine(
        cores=_read_cores(cgroup),
        memory_bytes=_read_memory(cgroup),
        gpu=gpu,
        gpu_memory_bytes=gpu_memory,
        has_bf16=(not capability or capability >= _AMPERE) if gpu else has_cpu_bf16(Path("/proc/cpuinfo")),
        gpus=gpus,
    )


def check_device(recipe: Recipe, machine: Machine) -> None:
    """Refuse a recipe that needs more GPUs than there are. Raises `DeviceError`: another machine can do it."""
    if recipe.needs.gpu == "required" and not machine.gpu:
        raise DeviceError(
            f"recipe {recipe.name}: needs.gpu is required, found no GPU on this machine (nvidia-smi names none); "
            "run it on one with a GPU (a container: --gpus all), or say needs.gpu: optional"
        )
    if machine.gpu and recipe.needs.devices > machine.gpus:
        raise DeviceError(
            f"recipe {recipe.name}: needs.devices is {recipe.needs.devices}, found {machine.gpus} on this machine "
            "(nvidia-smi, CUDA_VISIBLE_DEVICES); run it on one with more GPUs, or lower needs.devices"
        )


def _read_cores(cgroup: Path) -> int:
    allowed = len(os.sched_getaffinity(0))
    quota, _, period = _read_text(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        return max(1, min(allowed, int(quota) // int(period)))
    return allowed


def _read_memory(cgroup: Path) -> int:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read_text(cgroup / "memory.max").strip()
    return min(host, int(limit)) if limit.isdigit() else host


def _ask_driver() -> tuple[str, int]:
    """What the driver's tool says of the first GPU that a child will see, and how many there are."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    given, first = os.environ.get("CUDA_VISIBLE_DEVICES"), name_gpus(os.environ)["CUDA_VISIBLE_DEVICES"]
    is_all = given is None or first.startswith("MIG-")  # a slice is not asked for, its GPU is
    try:
        lines = run_command([*query, *([] if is_all else [f"--id={first}"])], timeout_s=20.0).splitlines()
    except CommandError:
        return "", 0
    return (lines[0], len(lines) if given is None else len(given.split(","))) if lines else ("", 0)


def parse_gpu(line: str) -> tuple[str, int, float]:
    """One line of the driver's tool; what it does not say is 0."""
    name, mebibytes, capability = ([part.strip() for part in line.rsplit(",", 2)] + ["", ""])[:3]
    major = capability.replace(".", "", 1)
    return name, int(mebibytes) * 2**20 if mebibytes.isdigit() else 0, float(capability) if major.isdigit() else 0.0


def _read_text(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""
