"""Checkpoints that can be trusted after a SIGKILL: sealed, verified, bound to one job.

The trainer writes a checkpoint in place; it counts only once `sealed.json` lists every file with
its SHA-256, and that file is written last, when all the others are durable. Older checkpoints are
removed only after that. A checkpoint without a seal was never finished and is removed; one whose
bytes differ from its seal is set aside under another name; in both cases the one before it is used.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appliance.digest import canonical_json, digest_file, fsync_all, fsync_path, list_files, write_atomic
from appliance.errors import TrainingError

SEAL = "sealed.json"
KEPT = 2
_PREFIX = "checkpoint-"
_ASIDE = "damaged-"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WORDS = {
    "run_key": "the recipe, the data or the base model",
    "train_rows": "the training rows",
    "validation_rows": "the validation rows",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a resumed run has to take over, or its sums are taken in another order.

    `threads` is torch's number of threads; `micro_batches` has (first step, micro-batch) pairs: more
    than one after an out-of-memory restart. `checkpointing_since` is the first step whose activations are
    computed again instead of kept (gradient checkpointing), `None` where they all are kept.
    """

    threads: int
    micro_batches: tuple[tuple[int, int], ...]
    checkpointing_since: int | None = None

    @property
    def micro_batch(self) -> int:
        """The one in force."""
        return self.micro_batches[-1][1]

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again."""
        return self.checkpointing_since is not None

    def continue_with(self, micro_batch: int, *, checkpointing: bool, step: int) -> Facts:
        """These facts for a run that goes on after `step` with `micro_batch`, and perhaps with checkpointing."""
        since = self.checkpointing_since
        if checkpointing and since is None:
            since = step
        change = () if micro_batch == self.micro_batch else ((step, micro_batch),)
        return Facts(self.threads, (*self.micro_batches, *change), since)


def seal_checkpoint(folder: Path, *, fingerprint: Mapping[str, str], facts: Facts) -> None:
    """Make every file of a checkpoint durable and readable, then say so in its seal."""
    make_readable(folder)
    fsync_all(folder)
    seal = {
        "files": {name: digest_file(folder / name) for name in list_files(folder) if name != SEAL},
        "fingerprint": dict(fingerprint),
        "facts": asdict(facts),
    }
    write_atomic(folder / SEAL, canonical_json(seal))
    fsync_path(folder.parent)


def make_readable(folder: Path) -> None:
    """Give every file below a folder mode 0644: safetensors writes 0600."""
    for name in list_files(folder):
        (folder / name).chmod(0o644)


def prune_checkpoints(folder: Path, *, best: Path | None = None) -> None:
    """Remove all but the newest sealed checkpoints, and `best`; called when a newer one is sealed.

    The seal goes first, so that a kill in between leaves an unfinished checkpoint, not a damaged one.
    """
    sealed = [c for c in list_newest_first(folder) if (c / SEAL).is_file()]
    for checkpoint in sealed[KEPT:]:
        if best is None or checkpoint.name != best.name:
            remove_checkpoint(checkpoint)


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint so that what a kill leaves of it is not taken for one."""
    (checkpoint / SEAL).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def find_checkpoint(folder: Path, *, fingerprint: Mapping[str, str]) -> Path | None:
    """The newest verified checkpoint, or `None`.

    Newer ones without a seal are removed; newer ones that are damaged are set aside, the latest as
    `damaged-N` for study. Raises `TrainingError` when a sound checkpoint belongs to another job, and
    says what differs.
    """
    for checkpoint in list_newest_first(folder):
        if not (checkpoint / SEAL).is_file():
            remove_checkpoint(checkpoint)
            continue
        seal = read_seal(checkpoint)
        if seal is None or not is_sound(checkpoint):
            _set_aside(checkpoint)
            continue
        _check_fingerprint(checkpoint, seal["fingerprint"], dict(fingerprint))
        return checkpoint
    return None


def read_facts(folder: Path) -> Facts | None:
    """What the newest sealed checkpoint of `folder` says of its run; its bytes are not verified here."""
    seals = (read_seal(c) for c in list_newest_first(folder))
    seal = next((s for s in seals if s is not None), None)
    return None if seal is None else decode_facts(seal)


def decode_facts(seal: Mapping[str, Any]) -> Facts:
    """The facts in a seal."""
    pairs = tuple((int(step), int(micro)) for step, micro in seal["facts"]["micro_batches"])
    since = seal["facts"]["checkpointing_since"]
    return Facts(int(seal["facts"]["threads"]), pairs, None if since is None else int(since))


def read_seal(checkpoint: Path) -> dict[str, Any] | None:
    """A well-formed seal, else `None`."""
    try:
        seal: dict[str, Any] = json.loads((checkpoint / SEAL).read_bytes())
        is_formed = all(isinstance(seal[k], dict) for k in ("files", "fingerprint")) and decode_facts(seal)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seal if is_formed else None


def is_sound(checkpoint: Path) -> bool:
    """Whether the checkpoint has a seal, and its files are exactly those of the seal, byte by byte."""
    seal = read_seal(checkpoint)
    try:
        names = [n for n in list_files(checkpoint) if n != SEAL]
        return (
            seal is not None
            and names == sorted(seal["files"])
            and all(digest_file(checkpoint / n) == seal["files"][n] for n in names)
        )
    except OSError:
        return False


def count_steps_done(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was taken at."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def name_checkpoint(step: int) -> str:
    """The folder name of the checkpoint of a step, as transformers names it."""
    return f"{_PREFIX}{step}"


def list_newest_first(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, sealed or not."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=count_steps_done, reverse=True)


def find_differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """What differs between two fingerprints, in words; values where they can be read, never digests."""
    keys = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
    if len(keys) > 1:  # what the key stands for is told by the others
        keys = [k for k in keys if k != "run_key"]
    return [_describe_difference(k, found.get(k), expected.get(k)) for k in keys]


def _describe_difference(key: str, was: str | None, now: str | None) -> str:
    if any(v is not None and _DIGEST.fullmatch(v) for v in (was, now)):
        return f"{_WORDS.get(key, key)} changed"
    return f"{key} was {was}, is {now}"


def _set_aside(checkpoint: Path) -> None:
    for earlier in checkpoint.parent.glob(f"{_ASIDE}*"):
        shutil.rmtree(earlier, ignore_errors=True)
    checkpoint.rename(checkpoint.with_name(_ASIDE + checkpoint.name.removeprefix(_PREFIX)))


def _check_fingerprint(checkpoint: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    differences = find_differences(found, expected)
    if differences:
        raise TrainingError(
            f"{checkpoint}: belongs to another job ({', '.join(differences)}); resuming would not give the weights "
            f"of either: delete {checkpoint.parent} to train from the start"
        )
