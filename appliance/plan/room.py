"""Room on the disk for what a training writes, asked before the first step: a full disk is met hours later."""

from __future__ import annotations

import shutil
from pathlib import Path

from appliance.errors import StoreError
from appliance.method import FullMethod, QloraMethod
from appliance.recipe import Recipe

# Two newest checkpoints, the best one, and the one that is being written (training/checkpoints.py).
_HELD, _HELD_LAST = 4, 3


def estimate_room(recipe: Recipe, *, trainable: int, parameters: int) -> tuple[int, int, int]:
    """How many checkpoints there are at once, at most; bytes of one, and of the artifact.

    A checkpoint has what is trained and two moments of it, in fp32 (8-bit moments with qlora); a full model is
    written in bf16 at least. Headers, states of generators and tokenizer files are not counted.
    """
    held = min(recipe.training.checkpoints, _HELD_LAST if recipe.training.keep == "last" else _HELD)
    checkpoint = (6 if isinstance(recipe.method, QloraMethod) else 12) * trainable
    artifact = 2 * parameters if isinstance(recipe.method, FullMethod) else 4 * trainable
    return held, checkpoint, artifact


def check_room(recipe: Recipe, folder: Path, *, trainable: int, parameters: int) -> None:
    """Raise `StoreError` when the disk of a training's `folder` lacks the room for checkpoints and artifact.

    What an interrupted training left in `folder` counts as room: it is part of the same checkpoints.
    """
    held, checkpoint, artifact = estimate_room(recipe, trainable=trainable, parameters=parameters)
    needed = held * checkpoint + artifact
    there = sum(f.stat().st_size for f in folder.glob("checkpoints/**/*") if f.is_file())
    free = shutil.disk_usage(folder).free
    if free + there < needed:
        raise StoreError(
            f"{folder}: {_show(free)} free, the training writes up to {_show(needed)}: {held} checkpoints of "
            f"{_show(checkpoint)} and an artifact of {_show(artifact)}; free some (runs that are over may be "
            "deleted), or give another disk with --runs"
        )


def _show(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
