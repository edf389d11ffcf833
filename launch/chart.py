"""Draws curves as SVG text, for self-contained pages."""

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT = 520, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 12, 28  # margins around the curves, pixels; RIGHT: half of the last label
POINTS = 400  # largest number of points of a curve; more are averaged
# Distinguishable with all common colour blindness (Okabe and Ito, "Color Universal Design", 2008); then dashes are used
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

Curve = Sequence[tuple[float, float | None]]  # (x, y) in order of x; None: not a finite number


def colour(number: int) -> tuple[str, str]:
    """The colour of the curve of that number, and its dashes ("" for a solid line)."""
    dashes = ("", "6 3", "2 2", "8 2 2 2")
    return COLOURS[number % len(COLOURS)], dashes[number // len(COLOURS) % len(dashes)]


def draw(curves: Sequence[tuple[int, Curve]]) -> str:
    """An SVG of curves, each with the number that determines its colour. The line has a gap where y is None; a single y
    is a dot. Returns "" if no curve has a finite y."""
    drawn = [(number, _thinned(curve)) for number, curve in curves]
    xs = [x for _, curve in drawn for x, y in curve if y is not None]
    ys = [y for _, curve in drawn for _, y in curve if y is not None]
    if not ys:
        return ""
    across, up = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    low, high = (across[0], up[0]), (across[-1], up[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        """Position of a point in pixels from the left and from the top."""
        share = (x - low[0]) / (high[0] - low[0]), (y - low[1]) / (high[1] - low[1])
        return LEFT + share[0] * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share[1] * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}">']
    for y in up:
        down = place(low[0], y)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{html.escape(label(y))}</text>')
    for x in across:
        right = place(x, low[1])[0]
        parts.append(f'<text x="{right:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(label(x))}</text>')
    for number, curve in drawn:
        ink, dashes = colour(number)
        for run in _unbroken(curve):
            points = [place(x, y) for x, y in run]
            if len(points) == 1:
                parts.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{ink}"/>')
            else:
                line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                parts.append(f'<polyline points="{line}" stroke="{ink}" stroke-dasharray="{dashes}"/>')
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers (1, 2 or 5 times a power of ten apart) from below `low` to above `high`."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, max(last, first + 1) + 1)]


def label(value: float) -> str:
    """Short text of a tick's number."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e+")
    return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"


def _thinned(curve: Curve) -> Curve:
    """At most POINTS points: the means of neighbouring points. A group with a y that is not finite has y None."""
    if len(curve) <= POINTS:
        return curve
    groups = [curve[i * len(curve) // POINTS : (i + 1) * len(curve) // POINTS] for i in range(POINTS)]
    found: list[tuple[float, float | None]] = []
    for group in groups:
        values = [y for _, y in group if y is not None]
        middle = sum(x for x, _ in group) / len(group)
        found.append((middle, sum(values) / len(values) if len(values) == len(group) else None))
    return found


def _unbroken(curve: Curve) -> list[list[tuple[float, float]]]:
    """The segments of a curve between its gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in curve:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]
