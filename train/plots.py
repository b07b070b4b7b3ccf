"""Plots of the report as inline SVG: text and shapes only, styled by the page, no script and nothing loaded.

Every plot names and describes itself for screen readers, and tells its series apart by dash or shape as well as by colour. The
drawing is 420 units wide, so that its text stays readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 46


@dataclass(frozen=True, slots=True)
class Series:
    """A line through points (x, y), or the points alone. `style`: real, fake, one, two or three; `dash`: drawn dashed."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "one"
    dash: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from data to the drawing. `log`: decimal logarithm, `low` above 0."""

    label: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    ticks: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    def share(self, value: float) -> float:
        """Place between the ends, 0 to 1, cut at both."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(max(value, self.low)), math.log10(low), math.log10(high)
        return min(1.0, max(0.0, (value - low) / (high - low)))


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.share(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.share(value) * (HEIGHT - TOP - BOTTOM)


def figure(name: str, title: str, description: str, body: str, height: int = HEIGHT) -> str:
    """An SVG with a title and a description. `name`: unique on the page."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}</desc>{body}</svg>'
    )


def frame(x: Axis, y: Axis) -> str:
    """Grid, ticks and labels of both axes."""
    parts = [f'<path class="grid" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>']
    for value in x.ticks:
        at = _x(x, value)
        parts.append(f'<path class="grid" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_tick(value)}</text>')
    for value in y.ticks:
        at = _y(y, value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>')
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:g}"


def lines(series: Sequence[Series], x: Axis, y: Axis, diagonal: bool = False) -> str:
    """Lines, and the diagonal of chance or of perfect calibration where asked."""
    parts = [frame(x, y)]
    if diagonal:
        steps = [x.low * (x.high / x.low) ** (i / 60) if x.log else x.low + (x.high - x.low) * i / 60 for i in range(61)]
        parts.append(f'<polyline class="even" points="{_points(x, y, steps, steps)}"/>')
    for one in series:
        dash = ' stroke-dasharray="6 4"' if one.dash else ""
        parts.append(f'<polyline class="line {one.style}"{dash} points="{_points(x, y, one.x, one.y)}"/>')
    return "".join(parts)


def _points(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in zip(xs, ys, strict=True))


def marks(series: Sequence[Series], x: Axis, y: Axis, size: float = 3.0) -> str:
    """Points, without axes: circles for reals, squares for generated images and anything else."""
    parts = []
    for one in series:
        for a, b in zip(one.x, one.y, strict=True):
            cx, cy = _x(x, a), _y(y, b)
            if one.style == "real":
                parts.append(f'<circle class="mark real" cx="{cx:.1f}" cy="{cy:.1f}" r="{size:g}"/>')
            else:
                corner = f'x="{cx - size:.1f}" y="{cy - size:.1f}" width="{2 * size:g}" height="{2 * size:g}"'
                parts.append(f'<rect class="mark {one.style}" {corner}/>')
    return "".join(parts)


def histogram(series: Sequence[Series], x: Axis, y: Axis, band: tuple[float, float] | None, cuts: Sequence[float]) -> str:
    """Step outlines over equally wide bins of [0, 1]; a shaded band; upright lines at thresholds."""
    parts = []
    if band is not None:
        left, right = _x(x, band[0]), _x(x, band[1])
        parts.append(f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>')
    parts.append(frame(x, y))
    for one in series:
        edges = [i / len(one.y) for i in range(len(one.y) + 1)]
        path = f"M{_x(x, 0):.1f} {_y(y, 0):.1f}"
        for start, stop, value in zip(edges, edges[1:], one.y, strict=False):
            path += f"V{_y(y, value):.1f}M{_x(x, start):.1f} {_y(y, value):.1f}H{_x(x, stop):.1f}"
        dash = ' stroke-dasharray="6 4"' if one.dash else ""
        parts.append(f'<path class="line {one.style}"{dash} d="{path}V{_y(y, 0):.1f}"/>')
    for cut in cuts:
        parts.append(f'<path class="cut" d="M{_x(x, cut):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    return "".join(parts)


def interval(low: float | None, value: float | None, high: float | None, least: float = 0.0) -> str:
    """A small bar for a table's cell, hidden from screen readers because the numbers stand beside it. Axis `least` to 1."""
    if low is None or value is None or high is None:
        return ""
    a, b, c = (100 * min(1.0, max(0.0, (v - least) / (1 - least))) for v in (low, value, high))
    half = 100 * (0.5 - least) / (1 - least) if least < 0.5 else 0
    return (
        '<svg class="bar" viewBox="0 0 100 12" aria-hidden="true" preserveAspectRatio="none">'
        f'<path class="grid" d="M{half:.1f} 0V12"/><path class="range" d="M{a:.1f} 6H{c:.1f}"/>'
        f'<path class="value" d="M{b:.1f} 1V11"/></svg>'
    )


def legend(series: Sequence[Series], shapes: bool = False) -> str:
    """The key of a plot, as a list beside it. `shapes`: of `marks`, else of lines."""
    items = []
    for one in series:
        dash = ' stroke-dasharray="6 4"' if one.dash else ""
        if not shapes:
            drawn = f'<path class="line {one.style}"{dash} d="M1 6H27"/>'
        elif one.style == "real":
            drawn = '<circle class="mark real" cx="14" cy="6" r="4"/>'
        else:
            drawn = f'<rect class="mark {one.style}" x="10" y="2" width="8" height="8"/>'
        items.append(f'<li><svg viewBox="0 0 28 12" aria-hidden="true">{drawn}</svg>{escape(one.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'
