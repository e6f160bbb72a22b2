"""Curves as inline SVG, which needs neither scripts nor other files."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 640, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 16, 10, 28
_TICKS = 8
"""The most intervals between the numbers at an axis."""
_ROUNDING, _TINY = 1e-9, 1e-300
_MAX_POINTS = 600
"""A curve of more points is thinned out: the page stays small and looks the same."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `style` is one or several classes of the page's style sheet: raw, smooth, second, dots."""

    label: str
    points: Points
    style: str


@dataclass(frozen=True)
class Level:
    """A horizontal line across a chart, with its meaning above it."""

    label: str
    value: float


def smoothed(points: Points, weight: float = 0.95) -> list[tuple[float, float]]:
    """Exponential moving average of the values, without the bias towards the first value (Kingma & Ba 2015, section 3)."""
    average, result = 0.0, []
    for count, (x, y) in enumerate(points, 1):
        average = weight * average + (1 - weight) * y
        result.append((x, average / (1 - weight**count)))
    return result


def line_chart(title: str, curves: Sequence[Curve], levels: Sequence[Level] = (), marked: Points = ()) -> Markup:
    """An SVG of all curves over one pair of axes, with a ring around the points in `marked`; a note instead if there is no finite
    value."""
    curves = [Curve(c.label, [(x, y) for x, y in c.points if isfinite(x) and isfinite(y)], c.style) for c in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return Markup('<p class="missing">{}: no values yet</p>').format(title)
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [*(y for curve in curves for _, y in curve.points), *(level.value for level in levels)]
    (x_low, x_high), (y_low, y_high) = _range(xs), _range(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = []
    for value, label in round_ticks(y_low, y_high).items():
        _, y = at(x_low, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in round_ticks(x_low, x_high, least=1).items():
        x, _ = at(value, y_low)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>')
    for level in levels:
        _, y = at(x_low, level.value)
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        above = y - 5 if y > _TOP + 16 else y + 14
        parts.append(f'<text class="tick" x="{WIDTH - _RIGHT}" y="{above:.1f}" text-anchor="end">{escape(level.label)}</text>')
    for curve in curves:
        points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in _thinned(curve.points))
        if len(curve.points) == 1 or "dots" in curve.style:
            for x, y in (at(*point) for point in curve.points):
                parts.append(f'<circle class="{curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        parts.append(f'<polyline class="{curve.style}" points="{points}"><title>{escape(curve.label)}</title></polyline>')
    for x, y in (at(*point) for point in marked):
        parts.append(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="7"/>')
    legend = "".join(f'<span class="key {curve.style}">{escape(curve.label)}</span>' for curve in curves if len(curves) > 1)
    return Markup(
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>{legend}</figure>'
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest value; if all are the same, a range with that in its middle that begins or ends at 0."""
    low, high = min(values), max(values)
    margin = abs(low) or 1.0
    return (low, high) if high > low else (low - margin, high + margin)


def round_ticks(low: float, high: float, least: float = 0.0) -> dict[float, str]:
    """The multiples of 1, 2 or 5 times a power of ten from `low` to `high`, at least `least` apart, with their labels: three
    to nine, unless `least` leaves fewer. Empty where floats are too coarse for that."""
    apart = max(least, (high - low) / _TICKS)
    if not _TINY < apart < 1 / _TINY:
        return {}
    exponent = floor(log10(apart))
    step = next(step for step in (factor * 10.0**exponent for factor in (1, 2, 5, 10)) if step >= apart * (1 - _ROUNDING))
    values = [number * step for number in range(ceil(low / step - _ROUNDING), floor(high / step + _ROUNDING) + 1)]
    decimals, largest = -floor(log10(step) + _ROUNDING), max(-low, high)
    if largest < 0.001:
        digits = max(0, decimals + floor(log10(largest) + _ROUNDING))
        return {value: f"{value:.{digits}e}" if value else "0" for value in values}
    return {value: f"{value:.{max(0, decimals)}f}" for value in values}


def _thinned(points: Points) -> Points:
    step = -(-len(points) // _MAX_POINTS)
    return [*points[::step], *points[-1:]] if step > 1 else points
