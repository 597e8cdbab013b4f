"""The live view of a training run: a few lines on a terminal, one plain line per interval in a log.

It reads the child's events and changes nothing. What it shows is in `metrics.jsonl` too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

from appliance.progress import LOG_INTERVAL_S, Pace, say_duration

_BLOCKS = "▁▂▃▄▅▆▇█"
_RECENT = 10


@dataclass(slots=True)
class Status:
    """The newest of everything that a step or an evaluation said."""

    step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    elapsed: float = 0.0
    left: float | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Remember an event's numbers."""
        self.step, self.max_steps, self.epoch = event["step"], event["max_steps"], event["epoch"]
        self.values |= {k: v for k, v in event.items() if isinstance(v, int | float)}
        if "loss" in event:
            self.losses.append(event["loss"])
            self.rates = [*self.rates, event["tokens_per_second"]][-_RECENT:]
        if "validation_loss" in event:
            self.values["validated"] = event["step"]


class TrainingView:
    """Shows `Status` while it lasts; a context manager."""

    def __init__(self) -> None:
        """Nothing is shown before the first step."""
        self._status, self._pace = Status(), Pace()
        self._began, self._shown, self._is_current = time.monotonic(), 0.0, True
        self._live: Any = None

    def __enter__(self) -> Self:
        """Start the clock."""
        self._began = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        """Show what came last and give the terminal back, whatever happened."""
        self._status.left = None
        if self._live is not None:
            self._live.stop()
        elif not self._is_current:
            self._write()

    def show(self, event: Mapping[str, Any]) -> None:
        """A step's or an evaluation's event."""
        status = self._status
        status.take(event)
        if "loss" in event:
            status.left = self._pace.estimate(status.step, total=status.max_steps, now=time.monotonic())
        self._is_current = False
        if sys.stderr.isatty():
            self._draw()
        elif time.monotonic() - self._shown >= LOG_INTERVAL_S:
            self._write()

    def _write(self) -> None:
        self._shown, self._is_current = time.monotonic(), True
        self._status.elapsed = self._shown - self._began
        sys.stderr.write(f"  {render_line(self._status)}\n")
        sys.stderr.flush()

    def _draw(self) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            self._live = Live(console=console, refresh_per_second=4, get_renderable=lambda: self._render(console.width))
            self._live.start()

    def _render(self, width: int) -> Any:
        from rich.text import Text

        self._status.elapsed = time.monotonic() - self._began
        styles = ("", "bold", "dim")
        lines = [
            Text(line, style=style) for line, style in zip(render_view(self._status, width=width), styles, strict=True)
        ]
        return Text("\n", no_wrap=True, overflow="ellipsis").join(lines)


def render_line(status: Status) -> str:
    """One plain line for a log."""
    left = f", about {status.left:.0f} s left" if status.left is not None and status.step < status.max_steps else ""
    counted = f"train {status.step}/{status.max_steps} steps {status.elapsed:.0f} s{left}"
    return "  ".join([counted, *_list_losses(status), *_list_details(status)])


def render_view(status: Status, *, width: int) -> list[str]:
    """Three lines that fit `width` columns: the way, the losses, the machine; a field is whole, or left out."""
    times = say_duration(status.elapsed) + (f", {say_duration(status.left)} left" if status.left is not None else "")
    tail = (f"{status.step}/{status.max_steps} steps", f"epoch {status.epoch:.2f}", times)
    bar = _draw_bar(status, max(8, width - len("  ".join(tail)) - 12))
    loss, *validation = _list_losses(status)
    words = "  ".join(validation)
    room = max(8, min(48, width - len(loss) - len(words) - 8))
    lines = ((f"train {bar}", *tail), (loss, draw_sparkline(status.losses, room), *validation), _list_details(status))
    return [_join_fitting(fields, width) for fields in lines]


def _join_fitting(fields: Sequence[str], width: int) -> str:
    line = ""
    for part in fields:
        if part and len(line) + 2 + len(part) <= width:
            line += f"  {part}"
    return line


def draw_sparkline(values: Sequence[float], width: int) -> str:
    """The values as at most `width` blocks, oldest first; each block is the mean of its share."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    top = len(_BLOCKS) - 1
    return "".join(_BLOCKS[round((v - low) / (high - low) * top) if high > low else 0] for v in means)


def _draw_bar(status: Status, width: int) -> str:
    done = round(width * status.step / max(1, status.max_steps))
    return "━" * done + "╌" * (width - done)


def _list_losses(status: Status) -> list[str]:
    values = status.values
    parts = [f"loss {status.losses[-1]:.3f}" if status.losses else "loss –"]
    if "validated" in values:
        exact = f"exact {values['validation_exact_match']:.1%} " if "validation_exact_match" in values else ""
        parts += [f"validation {values['validation_loss']:.3f}", f"{exact}(step {values['validated']:.0f})"]
    return parts


def _list_details(status: Status) -> list[str]:
    values, rates = status.values, status.rates
    if not rates:
        return []
    memory = f"{values['memory_bytes'] / 2**30:.2f} GiB"
    speed = f"{sum(rates) / len(rates):.0f} tokens/s" + (f"  MFU {values['mfu']:.1%}" if "mfu" in values else "")
    return [f"learning rate {values['learning_rate']:.2g}", f"gradient norm {values['grad_norm']:.2f}", speed, memory]
