"""The numbers that a run logged, prepared for the charts of `ssl-report`: titles, units, and fewer points."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .run_folder import NOT_DRAWN, Column, Run

LOSS, SCORES, FEATURES, OPTIMISER, SPEED = "Loss", "Scores while training", "Features", "Optimiser", "Speed"
GROUPS = (LOSS, SCORES, FEATURES, OPTIMISER, SPEED)
# Title, unit and group of numbers that the loop logs. Others are terms of a method's loss.
TITLES = {
    "loss": ("Training loss", "", LOSS),
    "val/loss": ("Validation loss", "", LOSS),
    "accuracy": ("Training accuracy", "%", SCORES),
    "knn/top1": ("kNN accuracy", "%", SCORES),
    "knn/teacher_top1": ("kNN accuracy of the teacher", "%", SCORES),
    "knn/teacher_share": ("Share of the teacher's kNN accuracy", "1: as good as the teacher", SCORES),
    "features/feature_rank": ("Effective rank of the features", "dimensions", FEATURES),
    "features/feature_std": ("Spread of the features", "0: all alike, 1: fill the sphere", FEATURES),
    "lr": ("Learning rate", "", OPTIMISER),
    "weight_decay": ("Weight decay", "", OPTIMISER),
    "grad_norm": ("Gradient norm", "", OPTIMISER),
    "images_per_s": ("Speed", "images/s", SPEED),
    "data_wait": ("Waiting for images", "share of time", SPEED),
    "checkpoint_wait": ("Waiting for checkpoints", "share of time", SPEED),
}


@dataclass(frozen=True)
class Curve:
    """One number of one run, in order of the steps: a point is the mean of `each` or fewer logged values, between the
    lowest and the highest of them. NaN: values that were not finite (a gap)."""

    run: int
    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    each: int  # logged values a point; 1 where all are there
    logged: int  # how many values were logged
    not_finite: int  # and how many of them were not finite
    first: tuple[int, float]  # step and value, the finite ones
    last: tuple[int, float]
    lowest: tuple[int, float]
    highest: tuple[int, float]

    @property
    def constant(self) -> bool:
        """Whether this is one number and no curve."""
        return self.lowest[1] == self.highest[1] and self.not_finite == 0


@dataclass(frozen=True)
class Chart:
    """One number of all runs that logged it."""

    name: str  # as in metrics.jsonl
    title: str
    unit: str
    group: str
    curves: list[Curve]

    @property
    def constant(self) -> bool:
        """Whether no run has a curve: each logged one value, or always the same."""
        return all(curve.constant for curve in self.curves)


def charts(runs: Sequence[Run], points: int) -> list[Chart]:
    """The charts of the runs, in groups, the loss first. points: the largest number of points of a curve."""
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.columns if name not in NOT_DRAWN):
        title, unit, group = titled(name)
        curves = [thinned(i, run.columns[name], points) for i, run in enumerate(runs) if name in run.columns]
        drawn = [curve for curve in curves if curve is not None]
        if drawn:
            found.append(Chart(name, title, unit, group, drawn))
    places = list(TITLES)
    return sorted(
        found,
        key=lambda chart: (
            GROUPS.index(chart.group),
            places.index(chart.name) if chart.name in places else len(places),
        ),
    )


def never_finite(runs: Sequence[Run]) -> list[str]:
    """The names of numbers that were logged, but never were finite."""
    names = dict.fromkeys(name for run in runs for name in run.columns if name not in NOT_DRAWN)
    columns = {name: [run.columns[name] for run in runs if name in run.columns] for name in names}
    return [name for name, each in columns.items() if not any(map(math.isfinite, (v for c in each for v in c.values)))]


def titled(name: str) -> tuple[str, str, str]:
    """Title, unit and group of a number by its name in metrics.jsonl."""
    if name in TITLES:
        return TITLES[name]
    group, _, rest = name.rpartition("/")
    words = rest.replace("_", " ")
    kind = LOSS if not group or group == "train" else SCORES
    return (words[:1].upper() + words[1:] + (f" ({group})" if group else "")) or name, "", kind


def thinned(run: int, column: Column, points: int) -> Curve | None:
    """At most `points` points: means of neighbouring values, with the lowest and the highest. A point is a gap where a
    value of it was not finite, or where all were if most points would be gaps. None if no value was finite."""
    import numpy as np  # not for --help

    steps, values = np.array(column.steps, np.int64), np.array(column.values, np.float64)
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    only = np.append(steps[1:] != steps[:-1], True)  # of several values at a step the one logged last
    steps, values = steps[only], values[only]
    finite = np.isfinite(values)
    if not finite.any():
        return None
    count = len(values)
    starts = np.arange(count) if count <= points else np.arange(points) * count // points
    each = np.diff(np.append(starts, count))
    known = np.add.reduceat(finite.astype(np.int64), starts)
    gap = known < each
    if gap.mean() > 0.5:
        gap = known == 0
    # Divided before they are added: the sum of numbers near 1e300 may be too large for a float
    total = np.add.reduceat(np.where(finite, values, 0.0) / np.maximum(each, 1).repeat(each), starts)
    mean = np.where(gap, np.nan, total * (each / np.maximum(known, 1)))
    low = np.where(gap, np.nan, np.minimum.reduceat(np.where(finite, values, np.inf), starts))
    high = np.where(gap, np.nan, np.maximum.reduceat(np.where(finite, values, -np.inf), starts))
    middle = np.add.reduceat(steps, starts) // each

    def at(index: Any) -> tuple[int, float]:
        return int(steps[index]), float(values[index])

    known_at = np.flatnonzero(finite)
    return Curve(
        run,
        middle.tolist(),
        mean.tolist(),
        low.tolist(),
        high.tolist(),
        int(each.max()),
        count,
        int(count - finite.sum()),
        at(known_at[0]),
        at(known_at[-1]),
        at(known_at[np.argmin(values[known_at])]),
        at(known_at[np.argmax(values[known_at])]),
    )


def number(value: float) -> str:
    """A number for people: four digits that count, or more where it is large."""
    if not math.isfinite(value):
        return "not finite"
    size = abs(value)
    if size and (size >= 1e7 or size < 1e-3):
        digits, _, power = f"{value:.3e}".partition("e")
        return f"{float(digits):.4g}e{int(power)}"
    return f"{value:,.0f}" if size >= 1e4 or (size >= 1000 and value == int(value)) else f"{value:.4g}"
