"""Progress on long work: a bar on a terminal, one plain line per interval in a log.

It writes to standard error, so that standard output stays for results, and it never changes what
is done: silence it and the work is the same.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

LOG_INTERVAL_S = 15.0


class Pace:
    """How fast units are finished, from the first one on: what came before it (loading a model) is no measure."""

    def __init__(self) -> None:
        """Nothing is known before two points."""
        self._first: tuple[int, float] | None = None

    def estimate(self, done: int, *, total: int, now: float) -> float | None:
        """Seconds left when `done` of `total` are finished at `now`; `None` before there is a rate."""
        if self._first is None:
            self._first = (done, now)
        start, began = self._first
        return (now - began) / (done - start) * max(0, total - done) if done > start else None


def say_duration(seconds: float) -> str:
    """0:42, 12:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """A counter with a label, the time gone and an estimate of the time left; a context manager."""

    def __init__(self, label: str, *, unit: str = "") -> None:
        """Nothing is shown before the first `advance`."""
        self._label, self._unit = label, unit
        self._began = time.monotonic()
        self._shown = 0.0
        self._pace = Pace()
        self._bar: Any = None

    def __enter__(self) -> Self:
        """Start the clock."""
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        """Give the terminal back, whatever happened."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, done: int, *, total: int, note: str = "") -> None:
        """Say that `done` of `total` units are finished; `note` is shown behind the bar."""
        if sys.stderr.isatty() or self._bar is not None:
            self._draw(done, total=total, note=note)
            return
        now = time.monotonic()
        left = self._pace.estimate(done, total=total, now=now)
        if now - self._shown >= LOG_INTERVAL_S or done >= total:
            self._shown = now
            sys.stderr.write(f"  {self._describe(done, total=total, note=note, left=left)}\n")
            sys.stderr.flush()

    def _describe(self, done: int, *, total: int, note: str, left: float | None) -> str:
        elapsed = time.monotonic() - self._began
        text = f"{self._label} {done}/{total}{self._unit} {elapsed:.0f} s"
        text += f", about {left:.0f} s left" if left is not None and done < total else ""
        return f"{text}  {note}" if note else text

    def _draw(self, done: int, *, total: int, note: str) -> None:
        if self._bar is None:
            self._bar = _build_bar(self._label, unit=self._unit)
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, note=note)


def _build_bar(label: str, *, unit: str) -> Any:
    """A bar that fits the terminal's width; the note is cut first."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    columns = (
        TextColumn(f"  {label}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn(unit.strip()),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    bar = Progress(*columns, console=Console(stderr=True), expand=True)
    bar.add_task(label, total=None, note="")
    bar.start()
    return bar
