"""Checkpoints that can be trusted after a SIGKILL: sealed, verified, bound to one job.

The trainer writes a checkpoint in place; it counts only once `sealed.json` lists every file with
its SHA-256, and that file is written last. A checkpoint without a seal, or whose bytes differ from
it, is set aside under another name and the one before it is used.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from appliance.digest import canonical_json, digest_file, list_files, write_atomic
from appliance.errors import TrainingError

_SEAL = "sealed.json"
_PREFIX = "checkpoint-"


def seal_checkpoint(folder: Path, *, fingerprint: Mapping[str, str]) -> None:
    """Make every file of a checkpoint durable, then say so in its seal."""
    names = [n for n in list_files(folder) if n != _SEAL]
    for name in names:
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
    files = {n: digest_file(folder / n) for n in names}
    write_atomic(folder / _SEAL, canonical_json({"files": files, "fingerprint": dict(fingerprint)}))


def find_checkpoint(folder: Path, *, fingerprint: Mapping[str, str]) -> Path | None:
    """The newest verified checkpoint, or `None`; damaged ones are set aside as `damaged-N`.

    Raises `TrainingError` when a sound checkpoint belongs to another job, and says what differs.
    """
    for checkpoint in _newest_first(folder):
        seal = _read_seal(checkpoint)
        if seal is None:
            aside = folder / f"damaged-{checkpoint.name.removeprefix(_PREFIX)}"
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            continue
        _check_fingerprint(checkpoint, seal["fingerprint"], dict(fingerprint))
        return checkpoint
    return None


def is_sound(checkpoint: Path) -> bool:
    """Whether every byte of a checkpoint is as its seal says."""
    return _read_seal(checkpoint) is not None


def count_steps_done(checkpoint: Path) -> int:
    """The optimizer step a checkpoint was taken at."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def _newest_first(folder: Path) -> list[Path]:
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=count_steps_done, reverse=True)


def _read_seal(checkpoint: Path) -> dict[str, dict[str, str]] | None:
    """The seal of an undamaged checkpoint, else `None`."""
    try:
        seal: dict[str, dict[str, str]] = json.loads((checkpoint / _SEAL).read_bytes())
        sound = all(digest_file(checkpoint / n) == d for n, d in seal["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return seal if sound else None


def _check_fingerprint(checkpoint: Path, found: dict[str, str], expected: dict[str, str]) -> None:
    differ = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
    if differ:
        detail = ", ".join(f"{k} was {found.get(k)}, is {expected.get(k)}" for k in differ)
        raise TrainingError(
            f"{checkpoint}: belongs to another job ({detail}); resuming would not give the same weights: "
            f"delete {checkpoint.parent} to train from the start"
        )
