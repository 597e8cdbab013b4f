"""The only home of subprocess: git, dvc, and the product's own child workers.

Arguments are always a list, never a shell string. A child gets its own session, so that a Ctrl-C
reaches it once, from here, and can be answered with a checkpoint instead of a half-written file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appliance.child import list_stop_signals
from appliance.errors import CommandError, DeviceError, InterruptedRunError

_GRACE_S = 120.0
_OUT_OF_MEMORY = "killed by the kernel, out of memory: give it more and run the same command to go on; its log is {log}"
_TUNABLES, _LARGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def run_command(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
) -> str:
    """Run a program to its end and return its standard output.

    `env` is added to this process's environment. On Linux the program is terminated when this process ends (by
    SIGKILL too): it would hold locks, memory and folders that the next run needs. Raises `CommandError` with the
    last lines of the program's output when it is missing, fails or exceeds `timeout_s`.
    """
    try:
        done = subprocess.run(
            list(argv),
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
            preexec_fn=_die_with_parent(signal.SIGTERM),
        )
    except FileNotFoundError as fault:
        message = f"{argv[0]}: program not found; install it or use the image, which has it"
        raise CommandError(message) from fault
    except subprocess.TimeoutExpired as fault:
        message = f"{' '.join(argv[:3])}: no end after {timeout_s:.0f} s; look at the network and run it again"
        raise CommandError(message) from fault
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        message = f"{' '.join(argv)}: exit {done.returncode}\n{tail}"
        raise CommandError(message)
    return done.stdout


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """How a child worker ended: its exit code (`-N`: killed by signal N) and why, when it failed."""

    code: int
    failure: str = ""


def run_worker(
    argv: Sequence[str],
    *,
    log: Path,
    on_event: Callable[[dict[str, Any]], None],
    env: Mapping[str, str] | None = None,
    devices: int = 1,
) -> WorkerEnd:
    """Run a child worker (see `appliance.child`) and hand each event it emits to `on_event`.

    Standard error goes to the file `log`, new for each run. SIGINT, SIGTERM and SIGHUP are forwarded
    to the child as SIGTERM, which a `note` event tells; the child then has 120 s to save a checkpoint, if it has
    anything to save, before it is killed. On Linux a SIGKILL of this process takes the child with it: nobody would be
    there to start the next one.
    A child that the kernel killed for memory ends like one that ran out of memory by itself: with code 34.
    It sees as many GPUs as it has `devices`, see `name_gpus`.
    """
    failure = ""
    kills_before = count_memory_kills()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        with _hold_signals() as early:
            child = subprocess.Popen(
                list(argv),
                stdout=subprocess.PIPE,
                stderr=errors,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                env={**os.environ, **name_gpus(os.environ, devices), **ask_large_pages(os.environ), **(env or {})},
                start_new_session=True,
                preexec_fn=_die_with_parent(signal.SIGKILL),  # noqa: PLW1509 - as in start_server
            )
        with forward_signals(child, say=lambda words: on_event({"note": words})) as received, child:
            for number in early:
                signal.raise_signal(number)
            try:
                for event in read_events(child.stdout or ()):
                    failure = event.get("failure", failure)
                    on_event(event)
            except BaseException:
                child.kill()
                raise
    code = _end(child, received)
    if code == -signal.SIGKILL and count_memory_kills() > kills_before:
        return WorkerEnd(DeviceError.exit_code, _OUT_OF_MEMORY.format(log=log))
    told = failure or code in (0, InterruptedRunError.exit_code)
    return WorkerEnd(code, failure if told else describe_death(code, log))


def name_gpus(environment: Mapping[str, str], count: int = 1) -> dict[str, str]:
    """The variables by which a child sees the first `count` GPUs that this process may use, as the driver counts them.

    Never more than it has processes: transformers' trainer would share out every batch among the GPUs
    that it sees (`nn.DataParallel`), which TRL refuses to do.
    """
    given = environment.get("CUDA_VISIBLE_DEVICES")
    names = [n.strip() for n in given.split(",")] if given is not None else [str(n) for n in range(count)]
    order = environment.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return {"CUDA_DEVICE_ORDER": order, "CUDA_VISIBLE_DEVICES": ",".join(names[:count])}


def ask_large_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable by which a child's C library asks for its memory in pages of 2 MiB; none where somebody has decided.

    A step on a CPU gives its activations back and takes them anew, page by page, which took a sixth of it. Where the
    kernel or the C library has none, nothing changes (glibc manual, "Memory Allocation Tunables").
    """
    said = environment.get(_TUNABLES, "")
    if _LARGE_PAGES in said:
        return {}
    return {_TUNABLES: ":".join(filter(None, (said, f"{_LARGE_PAGES}=1")))}


def count_memory_kills() -> int:
    """How many processes of this process's cgroup the kernel has killed for want of memory; 0 where it does not tell.

    `oom_kill` of `memory.events` (Linux, Documentation/admin-guide/cgroup-v2.rst): kills because the cgroup, one
    above it or the whole machine was out of memory. A container may see its own cgroup as the root.
    """
    try:
        own = next(line[3:] for line in _OWN_CGROUP.read_text("utf-8").splitlines() if line.startswith("0::"))
        places = (_CGROUPS / own.lstrip("/") / "memory.events", _CGROUPS / "memory.events")
        events = next(p for p in places if p.is_file()).read_text("ascii")
    except (OSError, StopIteration):
        return 0
    return next((int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill ")), 0)


def read_events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects among the lines; a library that prints is not listened to."""
    for line in lines:
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


def describe_death(code: int, log: Path) -> str:
    """What is known of a child that ended without a word of its own."""
    if code < 0:
        return f"killed by signal {-code} (out of memory?); run the same command to go on; its log is {log}"
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return f"ended with code {code}{': ' + lines[-1] if lines else ''}; its log is {log}"


def run_visible(argv: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> int:
    """Run a program that speaks to the user itself, in this process's terminal; return its exit code."""
    child = subprocess.Popen(
        list(argv),
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    with forward_signals(child) as received, child:
        child.wait()
    return _end(child, received)


def _end(child: subprocess.Popen[str], received: Sequence[int]) -> int:
    """The child's exit code. A signal that the child did not answer with an exit code stops this process.

    That is so when it came before the child could listen, while its interpreter was ending, or when
    the child had to be killed.
    """
    if received and child.returncode <= 0:
        signal.raise_signal(received[0])
    return child.returncode


@contextlib.contextmanager
def _hold_signals() -> Iterator[list[int]]:
    """While a child is being made, note stop signals for the caller to answer.

    A handler that raises inside the hooks that Python runs around a fork is ignored: the stop would be lost.
    """
    early: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield early
        return
    before = {n: signal.signal(n, lambda number, _frame: early.append(number)) for n in list_stop_signals()}
    try:
        yield early
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def forward_signals(child: subprocess.Popen[str], *, say: Callable[[str], None] | None = None) -> Iterator[list[int]]:
    """While active, a stop signal to this process asks the child to stop; yields those received.

    The first is told with `say`, in a thread: the handler may have interrupted a write to the same stream.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    timers: list[threading.Timer] = []
    speakers: list[threading.Thread] = []

    def tell() -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            (say or str)(f"stopping: what is done is saved first (at most {_GRACE_S:.0f} s)")

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        leave_closed_terminal()
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        if not timers:
            timer = threading.Timer(_GRACE_S, child.kill)  # a second signal may come anywhere in here
            timer.daemon = True
            timers.append(timer)
            timer.start()
            speaker = threading.Thread(target=tell, daemon=True)
            speakers.append(speaker)
            speaker.start()

    before = {s: signal.signal(s, forward) for s in list_stop_signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()
        for speaker in speakers:
            speaker.join(1.0)


def leave_closed_terminal() -> None:
    """Point standard streams whose terminal was closed at nothing: a write to them fails and would end the work."""
    import termios

    for descriptor in (0, 1, 2):
        try:
            termios.tcgetattr(descriptor)
        except termios.error as fault:
            if fault.args[0] == errno.EIO:  # a file or a pipe gives ENOTTY
                nothing = os.open(os.devnull, os.O_RDWR)
                os.dup2(nothing, descriptor)
                os.close(nothing)


def start_server(
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    end: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a long-lived child whose output goes to the file `log`; the caller stops it.

    It has its own session, so that a Ctrl-C does not take it away from work that still needs it. On
    Linux the kernel sends it the signal `end` when the thread that called this ends, however it ends
    (SIGKILL too). `pass_fds` stay open in the child. Raises `CommandError` when the program is missing.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            with _hold_signals() as early:
                child = subprocess.Popen(
                    list(argv),
                    stdout=output,
                    stderr=output,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **(env or {})},
                    start_new_session=True,
                    pass_fds=tuple(pass_fds),
                    preexec_fn=_die_with_parent(end),  # noqa: PLW1509 - one prepared system call, no locks, no allocation
                )
        except FileNotFoundError as fault:
            message = f"{argv[0]}: program not found; install it or use the image, which has it"
            raise CommandError(message) from fault
    for number in early:
        child.terminate()
        signal.raise_signal(number)
    return child


def _die_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """What the child calls before exec: prctl(PR_SET_PDEATHSIG, number), see prctl(2)."""
    if sys.platform != "linux":
        return None
    import ctypes

    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def ask() -> None:
        prctl(1, number)
        if os.getppid() != parent:
            os._exit(1)

    return ask
