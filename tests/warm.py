"""Training children that start in milliseconds: forked from one process that has imported torch.

`python -m warm` prints `ready`, then reads one JSON request a line and forks. The fork runs the real
worker, `appliance.training.worker.main`, on the request's folder, as a process of its own that can
be killed for real. Answers are JSON lines: {"pid": ...} at the fork, {"pid": ..., "code": ...} at
its end, the code as `subprocess` has it (-9: killed).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUIET = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


@dataclass
class Warm:
    """The running server and the children that have ended."""

    process: subprocess.Popen[str]
    ended: dict[int, int] = field(default_factory=dict)

    def start(self, folder: Path, *, address_space: int | None = None) -> int:
        """Fork a worker on the job in `folder`, with a limit in bytes on its address space if given; its pid."""
        assert self.process.stdin is not None
        request = {"folder": str(folder), "log": str(folder / "worker.log"), "address_space": address_space}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        while True:
            answer = self._read()
            if "code" not in answer:
                return int(answer["pid"])

    def is_running(self, pid: int) -> bool:
        """Whether the child has not ended yet."""
        with contextlib.closing(selectors.DefaultSelector()) as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            while pid not in self.ended and selector.select(0):
                self._read()
        return pid not in self.ended

    def wait(self, pid: int) -> int:
        """The child's exit code."""
        while pid not in self.ended:
            self._read()
        return self.ended[pid]

    def run(self, folder: Path, **limits: Any) -> int:
        """Start and wait."""
        return self.wait(self.start(folder, **limits))

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the warm process ended"
        answer: dict[str, Any] = json.loads(line)
        if "code" in answer:
            self.ended[answer["pid"]] = answer["code"]
        return answer


@contextlib.contextmanager
def start_warm() -> Iterator[Warm]:
    """A warm process; it ends when its standard input is closed."""
    argv = [sys.executable, "-m", "warm"]
    process = subprocess.Popen(
        argv,
        cwd=Path(__file__).parent,
        env={**os.environ, **QUIET},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield Warm(process)
        finally:
            process.stdin.close()  # type: ignore[union-attr]
            process.wait(timeout=60)


def serve() -> None:
    """Answer requests until the input ends; a child that ends is reported by SIGCHLD."""
    import appliance.training.trainer  # noqa: F401 - the import is the warmth

    gc.freeze()
    signal.signal(signal.SIGCHLD, _report_ended)
    _say("ready\n")
    while request := sys.stdin.readline():
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            _become_worker(**json.loads(request))
        _say(json.dumps({"pid": pid}) + "\n")
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _report_ended(*_signal: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)) and ended[0]:
            _say(json.dumps({"pid": ended[0], "code": os.waitstatus_to_exitcode(ended[1])}) + "\n")


def _become_worker(*, folder: str, log: str, address_space: int | None) -> None:
    from appliance.training.worker import main

    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with Path(log).open("w") as output:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        if address_space is not None:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        code = 70
        try:
            code = main(Path(folder))
        finally:
            sys.stdout.flush()
            Path(folder, "peak").write_text(_read_peak())
            os._exit(code)


def _read_peak() -> str:
    """The largest address space of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return str(next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmPeak")) * 1024)


def _say(text: str) -> None:
    os.write(1, text.encode())


if __name__ == "__main__":
    serve()
