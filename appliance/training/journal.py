"""The journal of a run, `metrics.jsonl`: one line per step, each step once, whatever was killed in between.

Every checkpoint holds a copy, sealed with it, and a resumed run starts from that copy. So whatever
is computed from the journal (a first loss, the best validation loss, a patience) is after a resume
what it would have been without one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from appliance.digest import canonical_json, write_atomic

NAME = "metrics.jsonl"


def read_records(checkpoint: Path) -> list[dict[str, Any]]:
    """The records up to a checkpoint, from its own copy."""
    return [json.loads(line) for line in (checkpoint / NAME).read_bytes().splitlines()]


class Journal:
    """The records of the run so far; `checkpoint` is the one that the run goes on from, if any."""

    def __init__(self, file: Path, *, checkpoint: Path | None) -> None:
        self.file = file
        self.records = read_records(checkpoint) if checkpoint else []
        write_atomic(file, self._encode())
        self.seconds_before = max((r.get("seconds", 0.0) for r in self.records), default=0.0)
        self.tokens_before = max((r.get("tokens", 0) for r in self.records), default=0)
        self.computed_before = max((r.get("tokens_computed", 0) for r in self.records), default=0)

    def add(self, record: dict[str, Any]) -> None:
        """Append one record; readers of the file may see a torn last line."""
        self.records.append(record)
        with self.file.open("ab") as stream:
            stream.write(canonical_json(record) + b"\n")

    def save_copy(self, checkpoint: Path) -> None:
        """Put the records so far into a checkpoint that is about to be sealed."""
        write_atomic(checkpoint / NAME, self._encode())

    def _encode(self) -> bytes:
        return b"".join(canonical_json(r) + b"\n" for r in self.records)
