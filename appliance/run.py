"""The run folder: where one run key's work is kept, stage by stage, so that it can be resumed.

A stage is done when `state.json` says so, and it says so only after the stage's files are durable.
The folder is a cache of finished work: deleting it costs time, never correctness.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from appliance.digest import canonical_json, digest_json, write_atomic
from appliance.errors import ApplianceError
from appliance.recipe import Recipe

Stage = Literal["prepare", "train", "evaluate", "judge", "card", "publish"]
STAGES: tuple[Stage, ...] = ("prepare", "train", "evaluate", "judge", "card", "publish")


def build_run_key(recipe: Recipe, *, data_digest: str, base_digest: str, general_digest: str | None = None) -> str:
    """What a version is a function of: recipe, data, base and general rows. Equal keys need no second training."""
    parts = {"recipe": recipe.digest, "data": data_digest, "base": base_digest}
    return digest_json(parts if general_digest is None else {**parts, "general": general_digest})


@dataclass(frozen=True, slots=True)
class Run:
    """The folder of one run and the names of the files in it."""

    folder: Path
    key: str

    @property
    def examples(self) -> Path:
        """`train.jsonl`, `validation.jsonl`, `test.jsonl`: the split rows."""
        return self.folder / "examples"

    @property
    def adapter(self) -> Path:
        """The trained artifact (adapter or full model)."""
        return self.folder / "adapter"

    @property
    def training(self) -> Path:
        """`job.json`, `metrics.jsonl`, `summary.json` and `checkpoints/` of the training child."""
        return self.folder / "training"

    @property
    def evaluation(self) -> Path:
        """`job.json`, `outputs.jsonl`, `results.jsonl` and `verdict.json`."""
        return self.folder / "evaluation"

    @property
    def card(self) -> Path:
        """`card.json`, `card.md`, `card.html` and its plots."""
        return self.folder / "card"

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage was finished by this or an earlier process."""
        return stage in self._read_state()

    def read(self, stage: Stage) -> dict[str, Any]:
        """What the finished stage recorded. Raises `KeyError` when it is not done."""
        record: dict[str, Any] = self._read_state()[stage]
        return record

    def finish(self, stage: Stage, **record: Any) -> None:
        """Record that a stage is done; everything after it is forgotten."""
        state = self._read_state()
        kept = {s: state[s] for s in STAGES[: STAGES.index(stage)] if s in state}
        write_atomic(self._state, canonical_json({"key": self.key, "stages": {**kept, stage: record}}))

    def amend(self, stage: Stage, **changes: Any) -> None:
        """Change what a finished stage recorded, without forgetting what comes after it."""
        state = self._read_state()
        state[stage] |= changes
        write_atomic(self._state, canonical_json({"key": self.key, "stages": state}))

    def start_over(self) -> None:
        """Forget every stage and remove their files."""
        self._state.unlink(missing_ok=True)
        for folder in (p for p in self.folder.iterdir() if p.is_dir()):
            shutil.rmtree(folder)

    @property
    def _state(self) -> Path:
        return self.folder / "state.json"

    def _read_state(self) -> dict[str, Any]:
        try:
            state = json.loads(self._state.read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return state["stages"] if state.get("key") == self.key else {}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process. Raises `ApplianceError` when another one has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as fault:
                message = f"{self.folder}: another process is working on this run; wait for it or stop it first"
                raise ApplianceError(message) from fault
            yield


def open_run(runs: Path, *, name: str, key: str) -> Run:
    """The run folder for `key` below `runs`; made by the first writer."""
    return Run(folder=runs / f"{name}-{key[:12]}", key=key)


def load_run(folder: Path) -> Run | None:
    """The run that is kept in `folder`, or whose adapter that is; `None` where it is neither."""
    for place in (folder, folder.parent) if folder.name == "adapter" else (folder,):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Run(folder=place, key=json.loads((place / "state.json").read_bytes())["key"])
    return None
