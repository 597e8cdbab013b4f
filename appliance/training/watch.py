"""What happens beside each step: the journal, sealed checkpoints, stops, alerts, and refusals of a loss gone wrong."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from appliance.child import Emit, StopFlag
from appliance.digest import canonical_json, write_atomic
from appliance.errors import TrainingError
from appliance.training.artifact import measure_peak_memory
from appliance.training.checkpoints import Facts, name_checkpoint, prune_checkpoints, seal_checkpoint
from appliance.training.journal import Journal
from appliance.training.monitor import Rules, Watched, watch_record, watch_records
from appliance.training.ranks import Ranks
from appliance.training.utilisation import Yardstick

_EVALUATION = ("loss", "exact_match", "same_answer", "same_reference", "rows")


class Watch(TrainerCallback):  # type: ignore[misc]
    """Journals every step, seals every checkpoint, stops on a signal or by the rules of `monitor`."""

    def __init__(
        self,
        *,
        stop: StopFlag,
        emit: Emit,
        fingerprint: dict[str, str],
        facts: Facts,
        journal: Journal,
        rules: Rules,
        ranks: Ranks,
        yardstick: Yardstick | None = None,
    ) -> None:
        self.stop, self.emit, self.fingerprint, self.facts = stop, emit, fingerprint, facts
        self.journal, self.rules, self.ranks, self.yardstick = journal, rules, ranks, yardstick
        self.seen: Watched = watch_records(journal.records, rules)
        self.trainer: Any = None
        self.untrained: dict[str, float] = {}  # what the first step's record says of the time before it
        self.seal_seconds = 0.0
        self._began = self._step_began = time.monotonic()
        self._before = self._counted = (0, 0)
        self._evaluation: dict[str, float] = {}
        self._write_events()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        """The clock starts with the first step; the best checkpoint so far is protected from rotation."""
        if not self.journal.records:
            self.untrained = self.trainer.measure_untrained()
        self._began = time.monotonic()
        self._protect_best(args, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        """A step's own time, without evaluations and checkpoints."""
        self._step_began, self._before = time.monotonic(), self._counted

    def on_step_end(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        """A signal is answered at the end of a step, with a checkpoint, whichever process it reached."""
        stops, *counted = self.ranks.add_up(self.stop.is_set, self.trainer.tokens_seen, self.trainer.tokens_computed)
        self._counted = (counted[0], counted[1])
        if stops:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        """A checkpoint counts when it is sealed; only then may older ones go, and the best one before it next time."""
        self.ranks.require_same_weights(self.trainer.model)
        if not self.ranks.is_lead:
            return
        began = time.monotonic()
        checkpoint = Path(args.output_dir) / name_checkpoint(state.global_step)
        self.journal.save_copy(checkpoint)
        seal_checkpoint(checkpoint, fingerprint=self.fingerprint, facts=self.facts)
        best = state.best_model_checkpoint
        prune_checkpoints(checkpoint.parent, best=Path(best) if best else None)
        self._protect_best(args, state)
        self.seal_seconds += time.monotonic() - began

    def on_evaluate(self, args: Any, state: Any, control: Any, **_rest: Any) -> None:
        """A stop by rule comes with the checkpoint of its step, so that it is found again after a kill."""
        if self.seen.is_stopped:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_rest: Any) -> None:
        """Journal what the trainer logs, and tell the parent."""
        if "eval_loss" in logs:
            self._log_evaluation(state, logs)
        elif "loss" in logs:
            self._log_step(state, logs)

    def _log_evaluation(self, state: Any, logs: dict[str, Any]) -> None:
        self._evaluation = {f"validation_{k}": logs[f"eval_{k}"] for k in _EVALUATION}
        record = {"step": state.global_step, "epoch": round(state.epoch, 4), **self._evaluation}
        self._observe(record)
        self.emit(**record, max_steps=state.max_steps)

    def _log_step(self, state: Any, logs: dict[str, Any]) -> None:
        now = time.monotonic()
        tokens, computed = self._counted
        seconds = max(now - self._step_began, 1e-9)
        record = {
            "step": state.global_step,
            "epoch": round(state.epoch, 4),
            "loss": float(logs["loss"]),
            "grad_norm": float(logs.get("grad_norm", 0.0)),
            "learning_rate": float(logs["learning_rate"]),
            "tokens": self.journal.tokens_before + tokens,
            "tokens_computed": self.journal.computed_before + computed,
            "tokens_per_second": round((tokens - self._before[0]) / seconds, 1),
            "seconds": round(self.journal.seconds_before + now - self._began, 2),
            "memory_bytes": measure_peak_memory(self.trainer.args.device),
        }
        if self.yardstick is not None:
            record["mfu"] = self.yardstick.measure((computed - self._before[1]) / seconds)
        if not self.journal.records:
            record |= self.untrained
        if "penalty" in logs:
            record["penalty"] = float(logs["penalty"])
        self._observe(record)
        self.emit(**record, max_steps=state.max_steps)

    def _observe(self, record: dict[str, Any]) -> None:
        """Journal a record and act on what it means. Raises `TrainingError` when training is worthless."""
        before = len(self.seen.alerts)
        self.seen = watch_record(self.seen, record, self.rules)
        if len(self.seen.alerts) > before:
            self._write_events()
        if self.seen.refusal:
            raise TrainingError(self.seen.refusal)
        self.journal.add(record)
        for alert in self.seen.alerts[before:]:
            self.emit(alert=alert.to_json())

    def _write_events(self) -> None:
        """`events.jsonl` is a function of the journal, so it is written whole."""
        lines = b"".join(canonical_json(a.to_json()) + b"\n" for a in self.seen.alerts)
        write_atomic(self.journal.file.with_name(self.ranks.name_file("events.jsonl")), lines)

    def _protect_best(self, args: Any, state: Any) -> None:
        """Tell the rotation of checkpoints which one it must leave, next time.

        Not before the newest is sealed: were it lost, the one before it would need the best one before it.
        """
        if self.seen.best is not None and self.rules.keep != "last":
            state.best_global_step = self.seen.best.step
            state.best_model_checkpoint = str(Path(args.output_dir) / name_checkpoint(self.seen.best.step))
