"""Training: token rows in, a verified adapter out, in a child process that can be killed at any moment.

It refuses to train on the wrong tokens, to publish a run that did not finish, and to resume from a
checkpoint that belongs to another run or whose bytes are damaged.
"""

from __future__ import annotations

from appliance.training.launch import TrainingJob, train
from appliance.training.mirror import Mirror, delete_checkpoints
from appliance.training.rows import build_rows, describe_rows, prepare_rows, select_masks, show_mask
from appliance.training.tokens import TokenCache

__all__ = [
    "Mirror",
    "TokenCache",
    "TrainingJob",
    "build_rows",
    "delete_checkpoints",
    "describe_rows",
    "prepare_rows",
    "select_masks",
    "show_mask",
    "train",
]
