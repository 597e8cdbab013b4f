"""The child's side of a worker process: what a signal does, events as JSON lines, failures as words and a code.

Exit codes: 0 done; 1 refused, `failure` says why; 33 stopped by a signal, the same job goes on; 34
out of memory; 35 the device failed. Any other end is a bug or a kill, and the log has the traceback.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from appliance.errors import ApplianceError, InterruptedRunError, describe_place

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}
# Batches differ in length: without it the pieces that torch's CUDA allocator keeps fit ever fewer of them
# (pytorch.org, "CUDA semantics", expandable_segments). Whoever set either name decides.
_ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_ALLOCATOR = "expandable_segments:True"

Emit = Callable[..., None]


def list_stop_signals() -> tuple[signal.Signals, ...]:
    """What asks a process to stop: SIGTERM, and Ctrl-C and a closed terminal unless it was started to ignore them.

    So a script's background jobs are started (`&`: Ctrl-C is for what is in front), and what `nohup` starts.
    """
    others = (s for s in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN)
    return (signal.SIGTERM, *others)


class StopFlag:
    """A stop signal ends the process at once; after `defer` it is noted, for work that has something to save first.

    What is on the disk is good after a SIGKILL, so after this too. Nobody waits for a large model to be loaded.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._is_deferred = False
        for number in list_stop_signals():
            signal.signal(number, self._set)

    def defer(self) -> None:
        """From now on the work looks at `is_set`, where it can stop and be resumed."""
        self._is_deferred = True

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True
        if not self._is_deferred:
            os._exit(InterruptedRunError.exit_code)


def name_allocator(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that says how torch's CUDA allocator works in a child; none where somebody has set it."""
    return {} if any(name in environment for name in _ALLOCATORS) else {_ALLOCATORS[0]: _ALLOCATOR}


@contextlib.contextmanager
def import_libraries(*, four_bit: bool) -> Iterator[None]:
    """Import torch and what is built on it, in little more than half the time.

    What is imported is no garbage: no collection looks for any meanwhile, nor at it later. PEFT imports bitsandbytes
    wherever it is installed, which loads torch's compiler; without 4-bit weights it counts as not installed.
    """
    if not four_bit:
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]  # how the import system is told so
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def emit(**event: object) -> None:
    """Tell the parent one thing."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def run_child(work: Callable[[StopFlag, Emit], None]) -> int:
    """Do `work` and return the exit code; an expected failure is told to the parent as `failure`."""
    stop = StopFlag()
    os.environ.update(_QUIET | name_allocator(os.environ))
    try:
        work(stop, emit)
    except (ApplianceError, InterruptedRunError) as fault:
        emit(failure=str(fault))
        return fault.exit_code
    except ModuleNotFoundError as fault:
        emit(failure=f"{fault.name} is not installed; in the appliance's clone: `uv pip install '.[train]'`")
        return 1
    except Exception as fault:
        words = describe_place(fault)
        if not words:
            raise
        emit(failure=words)
        return 1
    return 0
