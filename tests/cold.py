"""Training children on a device of their own: what `warm` is for tests on a GPU, where a fork cannot have CUDA.

`python -m cold FOLDER LIMIT OTHERS` is the real worker, `appliance.training.worker.main`, with at most `LIMIT` bytes of
its device's allocator (0: no limit), and writes the most that it held to `FOLDER/peak`, and what its CUDA takes
beside that to `FOLDER/context`.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from warm import QUIET, _read_peak

from appliance.command import name_gpus

ROOT = Path(__file__).parent.parent


@dataclass
class Cold:
    """Workers that see the first GPUs (`cuda`) or none (`cpu`); the calls are those of `Warm`."""

    device: str
    devices: int = 1
    started: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, folder: Path, *, address_space: int | None = None) -> int:
        """Start a worker on the job in `folder`, with a limit in bytes on its allocator if given; its pid."""
        seen = name_gpus(os.environ, self.devices) if self.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        with (folder / "worker.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cold", str(folder), str(address_space or 0), str(self._measure_used())],
                cwd=ROOT / "tests",
                env={**os.environ, **QUIET, **seen, "PYTHONPATH": name_paths(os.environ)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.started[process.pid] = process
        return process.pid

    def _measure_used(self) -> int:
        """Bytes of the GPU in use without the child, by this process too."""
        import torch

        if self.device != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(0)
        return int(total - free)

    def is_running(self, pid: int) -> bool:
        """Whether the child has not ended yet."""
        return self.started[pid].poll() is None

    def wait(self, pid: int) -> int:
        """The child's exit code."""
        return self.started[pid].wait()

    def run(self, folder: Path, *, address_space: int | None = None) -> int:
        """Start and wait."""
        return self.wait(self.start(folder, address_space=address_space))


def name_paths(environment: Mapping[str, str]) -> str:
    """`PYTHONPATH` with this checkout before all else: a child works from a bare one, with nothing installed."""
    return os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])


def main(folder: Path, limit: int, others: int) -> int:
    """The worker under a limit, on a device of which `others` hold so many bytes.

    Torch is asked for only once the worker has chosen its allocator.
    """
    from appliance.training import worker

    run = worker._run

    def run_limited(*arguments: object, **options: object) -> None:
        import appliance.training.trainer  # noqa: F401 - what a library takes is not what is limited

        set_limit(limit)
        run(*arguments, **options)

    worker._run = run_limited
    code = worker.main(folder)
    peak, context = measure_memory(others)
    (folder / "peak").write_text(str(peak))
    (folder / "context").write_text(str(context))
    return code


def set_limit(limit: int) -> None:
    """Bytes of the device that this process may hold, or of its address space without one."""
    import torch

    if limit and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory, 0)
    elif limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def measure_memory(others: int) -> tuple[int, int]:
    """Bytes that this process held at most, of the GPU's allocator or of addresses, and what CUDA itself takes.

    The second is true where what `others` hold has not changed since the start.
    """
    import torch

    if not torch.cuda.is_available():
        return int(_read_peak()), 0
    free, total = torch.cuda.mem_get_info(0)
    return int(torch.cuda.max_memory_reserved(0)), max(0, int(total - free - others - torch.cuda.memory_reserved(0)))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
