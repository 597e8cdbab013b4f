"""`python -m appliance.training.worker FOLDER`: the training child. Exit codes as in `appliance.child`."""

from __future__ import annotations

import sys
from pathlib import Path

from appliance.child import Emit, StopFlag, run_child
from appliance.training.launch import TrainingJob


def main(folder: Path) -> int:
    """Run the job in `folder`."""

    def work(stop: StopFlag, emit: Emit) -> None:
        from appliance.training.trainer import run_job

        run_job(TrainingJob.model_validate_json((folder / "job.json").read_bytes()), stop=stop, emit=emit)

    return run_child(work)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
