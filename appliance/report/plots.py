"""Plots as inline SVG: pure functions of numbers, so that equal cards have equal bytes.

Colours are CSS classes of the page; nothing is drawn that a screen reader would not be told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Points = Sequence[tuple[float, float]]
_W, _H, _L, _R, _T, _B = 320.0, 190.0, 46.0, 10.0, 10.0, 34.0


def draw_lines(series: dict[str, Points], *, label: str, is_log: bool = False) -> str:
    """A line chart of named series over steps; the n-th series has the class `s<n>`."""
    shown = {
        name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not is_log)]
        for name, points in series.items()
    }
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    xs = [x for points in shown.values() for x, _ in points]
    ys = [_scale(y, is_log) for points in shown.values() for _, y in points]
    left, right = min(xs), max(*xs, min(xs) + 1)
    low, high = min(ys if is_log else [0.0, *ys]), max(ys)
    high = high if high > low else low + 1.0
    parts = [_open(label), *_draw_grid(low, high, is_log=is_log), *_draw_steps(left, right)]
    for index, points in enumerate(shown.values()):
        placed = [(_x(x, left, right), _y(_scale(y, is_log), low, high)) for x, y in _thin(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="s{index}" points="{path}"/>')
        if len(points) <= 20:
            parts += [f'<circle class="s{index}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed]
    legend = "".join(f'<span class="k s{i}">{escape(name)}</span>' for i, name in enumerate(shown))
    caption = f'<figcaption>{escape(label)}<span class="legend">{legend}</span></figcaption>'
    return f"<figure>{caption}{''.join(parts)}</svg></figure>"


def draw_bar(value: float, interval: Sequence[float], *, css: str) -> str:
    """One horizontal bar of a share with its interval as a whisker."""
    low, high = interval[0] * 100, interval[1] * 100
    return (
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
        f'aria-label="{value * 100:.1f}%, interval {low:.1f} to {high:.1f}%">'
        f'<rect class="track" width="100" height="10" rx="1"/>'
        f'<rect class="{css}" width="{value * 100:.2f}" height="10" rx="1"/>'
        f'<line class="whisker" x1="{low:.2f}" x2="{high:.2f}" y1="5" y2="5"/></svg>'
    )


def _open(label: str) -> str:
    return f'<svg class="plot" viewBox="0 0 {_W:.0f} {_H:.0f}" role="img" aria-label="{escape(label, quote=True)}">'


def _draw_grid(low: float, high: float, *, is_log: bool) -> list[str]:
    parts = []
    for tick in _ticks(low, high):
        y = _y(tick, low, high)
        text = f"{10**tick:.2g}" if is_log else f"{tick:.3g}"
        parts.append(f'<line class="grid" x1="{_L}" x2="{_W - _R}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_L - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    return parts


def _draw_steps(left: float, right: float) -> list[str]:
    ticks = [t for t in _ticks(left, right) if t == int(t)]
    labels = [f'<text x="{_x(t, left, right):.1f}" y="{_H - 18}" text-anchor="middle">{t:.0f}</text>' for t in ticks]
    return [*labels, f'<text x="{_W - _R}" y="{_H - 4}" text-anchor="end" class="axis">step</text>']


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers within [low, high]."""
    rough = (high - low) / 5
    magnitude = 10 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _thin(points: Points, limit: int = 400) -> Points:
    """At most `limit` points; the last one always."""
    every = max(1, len(points) // limit)
    return [*points[:-1:every], points[-1]]


def _scale(y: float, is_log: bool) -> float:
    return math.log10(y) if is_log else y


def _x(x: float, left: float, right: float) -> float:
    return _L + (x - left) / (right - left) * (_W - _L - _R)


def _y(y: float, low: float, high: float) -> float:
    return _H - _B - (y - low) / (high - low) * (_H - _T - _B)
