"""`python -m appliance.training.worker FOLDER`: the training child.

Exit codes: 0 trained; 1 refused or worthless (`failure.json` says why); 33 stopped by a signal with
a checkpoint; 34 out of memory. Its standard output carries one JSON object a line for the parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from appliance.digest import canonical_json, write_atomic
from appliance.errors import ApplianceError, DeviceError, InterruptedRunError
from appliance.training.launch import TrainingJob

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}


class StopFlag:
    """Raised by SIGTERM or SIGINT, looked at after every optimizer step."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._set)

    def _set(self, _number: int, _frame: FrameType | None) -> None:
        self.is_set = True


def emit(**event: object) -> None:
    """Tell the parent one thing."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def main(folder: Path) -> int:
    """Run the job in `folder`; every expected failure becomes `failure.json` and a code."""
    stop = StopFlag()
    os.environ.update(_QUIET)
    job = TrainingJob.model_validate_json((folder / "job.json").read_bytes())
    try:
        from appliance.training.trainer import run_job

        run_job(job, stop=stop, emit=emit)
    except ApplianceError as fault:
        write_atomic(folder / "failure.json", canonical_json({"message": str(fault), "kind": type(fault).__name__}))
        is_known = isinstance(fault, InterruptedRunError | DeviceError)
        return fault.exit_code if is_known else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
