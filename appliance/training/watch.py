"""What happens beside each step: the journal, sealed checkpoints, stops, and refusals of a loss gone wrong."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from appliance.child import Emit, StopFlag
from appliance.errors import TrainingError
from appliance.training.checkpoints import seal_checkpoint
from appliance.training.journal import Journal

_DIVERGED = 3.0
_PATIENCE = 5


class Watch(TrainerCallback):  # type: ignore[misc]
    """Journals every step, seals every checkpoint, stops on a signal, refuses a loss gone wrong."""

    def __init__(self, *, stop: StopFlag, emit: Emit, fingerprint: dict[str, str], journal: Journal) -> None:
        self.stop, self.emit, self.fingerprint, self.journal = stop, emit, fingerprint, journal
        self.trainer: Any = None
        self._began = time.monotonic()
        self._first: float | None = next((r["loss"] for r in journal.records if "loss" in r), None)
        self._bad = 0
        self._validation: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        """The clock starts with the first step."""
        self._began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        """A signal is answered at the end of a step, with a checkpoint."""
        if self.stop.is_set:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        """A checkpoint counts when it is sealed."""
        seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", fingerprint=self.fingerprint)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_rest: Any) -> None:
        """Journal what the trainer logs, and tell the parent."""
        if "eval_loss" in logs:
            self._validation = float(logs["eval_loss"])
            self.journal.add(
                {"step": state.global_step, "epoch": round(state.epoch, 4), "validation_loss": self._validation}
            )
        elif "loss" in logs:
            self._log_step(state, logs)

    def _log_step(self, state: Any, logs: dict[str, Any]) -> None:
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        self._refuse_divergence(state.global_step, loss=loss, norm=norm)
        spent = time.monotonic() - self._began
        record = {
            "step": state.global_step,
            "epoch": round(state.epoch, 4),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": float(logs["learning_rate"]),
            "tokens": self.journal.tokens_before + self.trainer.tokens_seen,
            "tokens_per_second": round(self.trainer.tokens_seen / max(spent, 1e-9), 1),
            "seconds": round(self.journal.seconds_before + spent, 2),
        }
        if "penalty" in logs:
            record["penalty"] = float(logs["penalty"])
        self.journal.add(record)
        self.emit(**record, max_steps=state.max_steps, validation_loss=self._validation)

    def _refuse_divergence(self, step: int, *, loss: float, norm: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm}: not finite; lower training.learning_rate"
            )
        self._first = loss if self._first is None else self._first
        self._bad = self._bad + 1 if loss > max(_DIVERGED * self._first, self._first + 2.0) else 0
        if self._bad >= _PATIENCE:
            raise TrainingError(
                f"step {step}: loss {loss:.2f} stays above {_DIVERGED:.0f} times its first value {self._first:.2f}: "
                "training diverged; lower training.learning_rate"
            )
