"""Progress on long work: a bar on a terminal, one plain line per interval in a log.

It writes to standard error, so that standard output stays for results, and it never changes what
is done: silence it and the work is the same.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_LOG_INTERVAL_S = 15.0
_BAR_INTERVAL_S = 0.1
_WIDTH = 28


class Progress:
    """A counter of `total` units with a label, a rate and an estimate of the time left."""

    def __init__(self, label: str, total: int, *, unit: str = "") -> None:
        """Nothing is printed before the first `advance` or `note`."""
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._note = ""
        self._began = time.monotonic()
        self._shown = 0.0
        self._bar = sys.stderr.isatty()

    def advance(self, done: int, note: str = "") -> None:
        """Say that `done` of the total units are finished; `note` is shown behind the bar."""
        self.done, self._note = done, note
        now = time.monotonic()
        interval = _BAR_INTERVAL_S if self._bar else _LOG_INTERVAL_S
        if now - self._shown >= interval or done >= self.total:
            self._shown = now
            self._print()

    def close(self) -> None:
        """End the bar's line."""
        if self._bar and self._shown:
            sys.stderr.write("\n")
            sys.stderr.flush()

    def _print(self) -> None:
        share = min(1.0, self.done / self.total) if self.total else 1.0
        elapsed = time.monotonic() - self._began
        left = elapsed / share - elapsed if share > 0 else 0.0
        text = f"{self.label} {self.done}/{self.total}{self.unit} {elapsed:.0f} s"
        text += f", about {left:.0f} s left" if 0 < share < 1 else ""
        text += f"  {self._note}" if self._note else ""
        if self._bar:
            filled = round(share * _WIDTH)
            sys.stderr.write(f"\r\x1b[K  [{'#' * filled}{'.' * (_WIDTH - filled)}] {text}")
        else:
            sys.stderr.write(f"  {text}\n")
        sys.stderr.flush()


def track(items: Iterable[T], *, label: str, total: int) -> Iterator[T]:
    """Yield `items` while showing how many of `total` are done."""
    progress = Progress(label, total)
    for count, item in enumerate(items, start=1):
        yield item
        progress.advance(count)
    progress.close()
