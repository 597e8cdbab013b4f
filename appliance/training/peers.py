"""The other processes of a run on several devices: started by the first, watched by it, never left behind.

torchrun would start them too, but it ends with 1 whatever a process ends with, waits 30 s for a checkpoint
when it is stopped, and leaves them alive when it is killed. Here the first process is what its parent
started, with the exit codes of `appliance.child`; when one of the others fails, it says why in its place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from appliance.child import Emit
from appliance.command import describe_death, read_events, start_server
from appliance.errors import InterruptedRunError

_LOOK_S, _GRACE_S, _LAST_WORDS_S = 0.2, 2.0, 10.0
Peer = subprocess.Popen[bytes]


def name_share(environment: Mapping[str, str], rank: int) -> dict[str, str]:
    """The GPU of a rank: of those that the parent named, one each."""
    names = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": names[rank]} if rank < len(names) and names[rank] else {}


@contextlib.contextmanager
def start_peers(folder: Path, *, devices: int, environment: Mapping[str, str], emit: Emit) -> Iterator[Path]:
    """Keep the ranks from 1 alive while the caller works as rank 0; yields the file by which they meet.

    One that fails ends this process as it ended itself, with its words. All are gone afterwards, also
    when this process is killed.
    """
    meeting = folder / f"meeting-{os.getpid()}"
    if devices == 1:
        yield meeting
        return
    for stale in folder.glob("meeting-*"):
        stale.unlink(missing_ok=True)
    peers: list[Peer] = []
    is_over = threading.Event()
    try:
        for rank in range(1, devices):
            argv = [sys.executable, "-m", "appliance.training.worker", str(folder), str(rank), str(meeting)]
            log = name_log(folder, rank)
            log.unlink(missing_ok=True)
            peers.append(start_server(argv, log=log, env=name_share(environment, rank), end=signal.SIGKILL))
        threading.Thread(target=_watch, args=(peers, is_over, folder, emit), daemon=True).start()
        yield meeting
    except RuntimeError:  # what a collective raises when the other side is gone: the other side knows why
        _await_failure(peers)
        _answer_failure(peers, folder, emit)
        raise
    finally:
        is_over.set()
        for peer in peers:
            peer.kill()
            peer.wait()
        meeting.unlink(missing_ok=True)


def name_log(folder: Path, rank: int) -> Path:
    """Where a rank's standard output and errors go."""
    return folder / f"worker-{rank}.log"


def _watch(peers: Sequence[Peer], is_over: threading.Event, folder: Path, emit: Emit) -> None:
    while not is_over.wait(_LOOK_S):
        if any(map(_has_failed, peers)) and not is_over.wait(_GRACE_S):  # what all refuse, this one says better itself
            _answer_failure(peers, folder, emit)


def _has_failed(peer: Peer) -> bool:
    """Whether it ended, and not because all have stopped or are done."""
    return peer.poll() not in (None, 0, InterruptedRunError.exit_code)


def _await_failure(peers: Sequence[Peer]) -> None:
    deadline = time.monotonic() + _LAST_WORDS_S
    while time.monotonic() < deadline and not any(map(_has_failed, peers)):
        time.sleep(_LOOK_S)


def _answer_failure(peers: Sequence[Peer], folder: Path, emit: Emit) -> None:
    """End this process at once when a peer has failed: whatever it would wait for does not come."""
    for rank, peer in enumerate(peers, start=1):
        code = peer.poll()
        if code == -signal.SIGKILL:  # by the kernel, for want of memory? the parent knows
            os.kill(os.getpid(), signal.SIGKILL)
        elif code and _has_failed(peer):
            log = name_log(folder, rank)
            emit(failure=_read_failure(log) or describe_death(code, log))
            os._exit(code if code > 0 else 1)


def _read_failure(log: Path) -> str:
    """What a peer said of its failure last, by the protocol of `appliance.child`."""
    events = read_events(log.read_text("utf-8", errors="replace").splitlines())
    return next((e["failure"] for e in reversed(list(events)) if "failure" in e), "")
