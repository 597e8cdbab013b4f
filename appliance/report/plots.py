"""Plots as SVG, inline and as PNG: pure functions of numbers, so that equal cards have equal bytes.

Colours are CSS classes of the page; nothing is drawn that a screen reader would not be told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any, Literal

from appliance.errors import ApplianceError

Points = Sequence[tuple[float, float]]
Scale = Literal["linear", "log", "share"]
_FONT = "Appliance Plot Sans"
_STYLE = (
    f'text{{font:11px "{_FONT}";fill:#5b6570}}.title{{font-size:13px;fill:#1b1f24}}.grid{{stroke:#dde2e7}}'
    "polyline{fill:none;stroke-width:1.8}.s0{stroke:#1668b8}.s1{stroke:#b45309}line.s0,line.s1{stroke-width:3}"
    "circle.s0{fill:#1668b8}circle.s1{fill:#b45309}"
    "line.kept{stroke:#1a7f4b;stroke-dasharray:4 3}text.kept{fill:#1a7f4b}"
)
_W, _H, _L, _R, _T, _B = 320.0, 190.0, 46.0, 10.0, 10.0, 34.0


@dataclass(frozen=True, slots=True)
class Plot:
    """Named series over steps. `kept` marks the step whose weights were kept; `scale` is that of the values."""

    name: str
    label: str
    series: dict[str, Points]
    scale: Scale = "linear"
    kept: float | None = None

    @property
    def shown(self) -> dict[str, Points]:
        """The series that have points, without values that cannot be drawn."""
        is_log = self.scale == "log"
        drawn = {
            name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not is_log)]
            for name, points in self.series.items()
        }
        return {name: points for name, points in drawn.items() if points}


def list_plots(curves: Sequence[dict[str, Any]], *, kept: float | None) -> list[Plot]:
    """The plots of a run's curves, those without a point left out."""

    def pick(key: str) -> Points:
        return [(float(c["step"]), float(c[key])) for c in curves if key in c]

    losses = {"training": pick("loss"), "validation": pick("validation_loss")}
    plots = (
        Plot("loss", "Loss", losses, "log", kept),
        Plot("exact-match", "Exact match", {"validation": pick("validation_exact_match")}, "share", kept),
        Plot("learning-rate", "Learning rate", {"training": pick("learning_rate")}),
        Plot("gradient-norm", "Gradient norm", {"training": pick("grad_norm")}, "log"),
        Plot("speed", "Tokens per second", {"training": pick("tokens_per_second")}),
    )
    return [p for p in plots if p.shown]


def draw_figure(plot: Plot) -> str:
    """A plot as a figure of the page; the n-th series has the class `s<n>`."""
    legend = "".join(f'<span class="k s{i}">{escape(name)}</span>' for i, name in enumerate(plot.shown))
    caption = f'<figcaption>{escape(plot.label)}<span class="legend">{legend}</span></figcaption>'
    opened = f'<svg class="plot" viewBox="0 0 {_W:.0f} {_H:.0f}" role="img" aria-label="{escape(plot.label)}">'
    return f"<figure>{caption}{opened}{''.join(_draw_content(plot))}</svg></figure>"


def draw_image(plot: Plot) -> str:
    """A plot as a page of its own: an SVG document with its colours, title and legend."""
    parts = [f'<text x="{_L}" y="-8" class="title">{escape(plot.label)}</text>']
    at = _W - _R
    for index, name in reversed(list(enumerate(plot.shown))):
        at -= 6.2 * len(name) + 26
        parts.append(f'<line class="s{index}" x1="{at:.1f}" x2="{at + 14:.1f}" y1="-12" y2="-12"/>')
        parts.append(f'<text x="{at + 19:.1f}" y="-8">{escape(name)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -26 {_W:.0f} {_H + 26:.0f}" '
        f'width="{2 * _W:.0f}" height="{2 * (_H + 26):.0f}"><style>{_STYLE}</style>'
        f'<rect y="-26" width="{_W:.0f}" height="{_H + 26:.0f}" fill="#fff"/>'
        f"{''.join(_draw_content(plot))}{''.join(parts)}</svg>"
    )


def render_png(plot: Plot) -> bytes:
    """A plot as PNG, 960 pixels wide, with the font that lies beside this file: equal plots, equal bytes."""
    try:
        import resvg_py
    except ModuleNotFoundError as fault:
        raise ApplianceError(
            "resvg_py, which makes the card's PNG, is missing; install the appliance's extra 'train', in its clone: "
            "`uv pip install '.[train]'`"
        ) from fault
    font = resources.files("appliance.report").joinpath("plot.ttf")
    with resources.as_file(font) as file:
        png: bytes = resvg_py.svg_to_bytes(
            svg_string=draw_image(plot), width=960, skip_system_fonts=True, font_files=[str(file)], font_family=_FONT
        )
    return png


def _draw_content(plot: Plot) -> list[str]:
    is_log = plot.scale == "log"
    shown = plot.shown
    xs = [x for points in shown.values() for x, _ in points]
    ys = [_scale(y, is_log) for points in shown.values() for _, y in points]
    left, right = min(xs), max(*xs, min(xs) + 1)
    low, high = (0.0, 1.0) if plot.scale == "share" else (min(ys if is_log else [0.0, *ys]), max(ys))
    high = high if high > low else low + 1.0
    parts = [*_draw_grid(low, high, scale=plot.scale), *_draw_steps(left, right)]
    if plot.kept is not None and left <= plot.kept <= right:
        parts += _draw_kept(_x(plot.kept, left, right), step=plot.kept)
    for index, points in enumerate(shown.values()):
        placed = [(_x(x, left, right), _y(_scale(y, is_log), low, high)) for x, y in _thin(points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline class="s{index}" points="{path}"/>')
        if len(points) <= 20:
            parts += [f'<circle class="s{index}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed]
    return parts


def _draw_kept(x: float, *, step: float) -> list[str]:
    """A dashed line at the kept step; its words stand on the side with more room."""
    side, anchor = (4, "start") if x < (_L + _W - _R) / 2 else (-4, "end")
    return [
        f'<line class="kept" x1="{x:.1f}" x2="{x:.1f}" y1="{_T}" y2="{_H - _B}"/>',
        f'<text x="{x + side:.1f}" y="{_T + 9}" text-anchor="{anchor}" class="kept">kept: step {step:.0f}</text>',
    ]


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


def _draw_grid(low: float, high: float, *, scale: Scale) -> list[str]:
    parts = []
    for tick in _log_ticks(low, high) if scale == "log" else _ticks(low, high):
        y = _y(tick, low, high)
        parts.append(f'<line class="grid" x1="{_L}" x2="{_W - _R}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_L - 6}" y="{y + 4:.1f}" text-anchor="end">{_say_tick(tick, scale)}</text>')
    return parts


def _say_tick(tick: float, scale: Scale) -> str:
    """Shares as percentages; small and large numbers as 2e-4."""
    if scale == "share":
        return f"{tick:.0%}"
    value = 10**tick if scale == "log" else tick
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


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


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten within [low, high], as logarithms; round steps when those are too few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [p + math.log10(m) for p in powers for m in (1, 2, 5) if low <= p + math.log10(m) <= high]
    if len(ticks) > 8:
        return [float(p) for p in powers if low <= p <= high]
    return ticks if len(ticks) > 1 else _ticks(low, high)


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
