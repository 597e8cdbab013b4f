"""The journal of a run, `metrics.jsonl`: one line per step, each step once, whatever was killed in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from appliance.digest import canonical_json, write_atomic


class Journal:
    """`metrics.jsonl`: one line per logged step; steps after a resumed checkpoint are forgotten."""

    def __init__(self, file: Path, *, kept: int) -> None:
        self.file = file
        lines = file.read_bytes().splitlines() if file.is_file() else []
        self.records = [r for r in map(_parse, lines) if r and r["step"] <= kept]
        write_atomic(file, b"".join(canonical_json(r) + b"\n" for r in self.records))
        self.seconds_before = max((r.get("seconds", 0.0) for r in self.records), default=0.0)
        self.tokens_before = max((r.get("tokens", 0) for r in self.records), default=0)

    def add(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.records.append(record)
        with self.file.open("ab") as stream:
            stream.write(canonical_json(record) + b"\n")


def _parse(line: bytes) -> dict[str, Any] | None:
    """One journal line, or `None` for a torn one."""
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    return record
