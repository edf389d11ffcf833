"""Predicts multiple labels and numbers of images, given in a CSV file, from frozen features. Each target has its own
linear model; scores are average precision and R2.

Labels: logistic regression with an L2 penalty. Numbers: ridge regression, in closed form for all penalties at once.

Shapes: n images of a split, F floats a feature, T targets.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ssl_pretrain.eval._logistic_regression import Rotation, path

from ssl_pretrain.data.source import Source
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Pixels, Tap
from ssl_pretrain.randomness import numpy_generator

from ._intervals import resampled
from ._results import Outcome
from ._targets import TEST, TRAIN, Targets
from ._task import Data, Images, Task

IMAGES = "pair"
BASELINES = ("random", "pixels")
SHARED = True
PENALTIES = tuple(10.0**power for power in range(-7, 3))  # of the mean loss; features have unit variance on average


@dataclass(frozen=True, kw_only=True)
class Config:
    """Targets."""

    targets: Path
    """CSV file: a column `file` with image names, optionally `split` (train, val, test), and one column for each
    target: 0 and 1 for a label, other numbers for a quantity; empty if unknown."""
    columns: tuple[str, ...] | None = None
    """Targets to predict (default: all)."""
    feature: str = "pooled"
    """Feature to predict from: pooled, cls, mean, or of an earlier block cls@-4, mean@-4."""
    held_out: float = 0.1
    """Share of the training images that is held out to select each target's penalty."""


def example(data: Path) -> list[str]:
    """Flags of a run of seconds, and the table that they name, for the conformance check."""
    path = data.with_name("targets.csv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("file", "first", "size"))
        for i, image in enumerate(sorted(data.rglob("*.png"))):
            table.writerow((image.relative_to(data).as_posix(), int(image.parent.name == "class0"), i % 7))
    return ["--targets", str(path)]


def evaluate(task: Task, config: Config) -> Outcome:
    """Fit each target with every penalty on a part of the training images, select on the others, fit again on all of
    them, and test once.

    `map` is the mean average precision of the labels in percent (labels without a positive or a negative test image are
    left out). `r2` is the mean coefficient of determination of the numbers. Raises UserError for a file that does not
    fit the images, targets without training images of both values, and as `Task.features`.
    """
    if not 0 < config.held_out < 1:
        raise UserError(f"--held-out is {config.held_out}; it must lie between 0 and 1")
    feature = "pooled" if isinstance(task.encoder.backbone, Pixels) else str(Tap.parse(config.feature))
    table = Targets.read(config.targets, config.columns)
    task = replace(task, data=_data(task.data, table))
    train, test = task.features([feature])
    known, test_values = (table.values[side.labels] for side in (train, test))  # (n, T)

    scale = float(np.sqrt(train.features[feature].var(0).mean())) or 1.0
    rows, others = train.features[feature] / scale, test.features[feature] / scale
    rotated = _RotatedFeatures(rows, others, task) if table.labels.any() else None
    tried: list[dict[str, Any]] = []
    scores: dict[str, float | None] = {}
    predicted = np.full(test_values.shape, np.nan)
    for t, name in enumerate(table.names):
        index = np.flatnonzero(np.isfinite(known[:, t]))  # training images with a value
        values = known[index, t]
        _check(name, values, bool(table.labels[t]), len(np.flatnonzero(np.isfinite(test_values[:, t]))))
        fit, held_out = _hold_out(values, bool(table.labels[t]), config.held_out, task.seed, name)
        if rotated is not None and table.labels[t]:
            found = rotated.log_odds(index[fit], values[fit], PENALTIES, index[held_out])
        else:
            found = _numbers(task, rows[index[fit]], values[fit], rows[index[held_out]], PENALTIES)
        by_penalty = [_loss(each, values[held_out], bool(table.labels[t])) for each in found]
        best = int(np.argmin(by_penalty))
        chosen = PENALTIES[best : best + 1]
        if rotated is not None and table.labels[t]:
            (predicted[:, t],) = rotated.log_odds(index, values, chosen, None)
        else:
            (predicted[:, t],) = _numbers(task, rows[index], values, others, chosen)
        scores[name] = _score(predicted[:, t], test_values[:, t], bool(table.labels[t]))
        tried.append({
            "target": name,
            "kind": "label" if table.labels[t] else "number",
            "penalty": PENALTIES[best],
            "train": len(index),
            "test": int(np.isfinite(test_values[:, t]).sum()),
            "positive": int(np.nansum(test_values[:, t])) if table.labels[t] else None,
            "score": scores[name],
        })  # fmt: skip
        task.report("targets", t + 1, len(table.names))

    metrics: dict[str, Any] = {"n": len(test_values)}
    for key, of_kind, factor in (("map", table.labels, 100), ("r2", ~table.labels, 1)):
        columns = [t for t, name in enumerate(table.names) if of_kind[t] and scores[name] is not None]
        if columns:
            metrics[key] = factor * float(np.mean([scores[table.names[t]] for t in columns]))
            interval = _interval(predicted, test_values, columns, key == "map", task.seed)
            metrics[f"{key}_interval"] = [factor * value for value in interval]
            if key == "map":
                metrics["chance_map"] = 100 * float(np.nanmean(test_values[:, columns], axis=0).mean())
    metrics["per_target"] = scores
    if not {"map", "r2"} & set(metrics):
        raise UserError("no target can be scored: the test images have no values, or all the same value")
    left_out = [name for name, score in scores.items() if score is None]
    metrics["findings"] = (
        [f"not scored, because all test images have the same value: {', '.join(left_out)}"] if left_out else []
    )
    return Outcome(
        metrics,
        {
            "headline": f"feature {feature}, {int(table.labels.sum())} label(s) and {int((~table.labels).sum())} number(s)",
            "feature": feature,
            "targets": str(config.targets),
            "penalties": list(PENALTIES),
            "selection": f"each target's penalty by the loss on {config.held_out:g} of the training images, then fitted "
            f"again on all of them and tested once",
            "all_scored_on": "test",
            **task.protocol(train, test),
        },
        tried,
    )


def _data(data: Data, table: Targets) -> Data:
    """The images of both sides that have a line in the table; the line's number replaces the label."""
    if data.train.split != data.test.split:
        train, test = (_images_with_targets(data, images, table) for images in (data.train, data.test))
        return replace(data, train=train, test=test)
    if table.splits is None:
        raise UserError(
            f"{data.name} has no splits, and --targets no column 'split': add one with train or test for each image"
        )
    whole = _images_with_targets(data, data.test, table)
    sides = []
    for wanted in (TRAIN, next(((name,) for name in TEST if table.split([name]).any()), TEST)):
        chosen = np.flatnonzero(table.split(wanted)[whole.labels])
        if not len(chosen):
            existing = _first_names(table.splits)
            raise UserError(f"--targets: no image has the split {' or '.join(wanted)}; there are {existing}")
        sides.append(Images(wanted[0], Subset(whole.source, chosen), whole.labels[chosen], 0))
    return replace(data, train=sides[0], test=sides[1])


def _images_with_targets(data: Data, images: Images, table: Targets) -> Images:
    source = images.source
    lines = table.rows([source.name(i) for i in range(len(source))], data.name.rstrip("/"))
    index = np.flatnonzero(lines >= 0)
    with_targets: Source = source if len(index) == len(source) else Subset(source, index)
    return Images(images.split, with_targets, lines[index], len(source) - len(index))


def _first_names(names: Any) -> str:
    found = sorted(set(names))
    return ", ".join(map(repr, found[:5])) + (", ..." if len(found) > 5 else "")


def _check(name: str, known: np.ndarray, label: bool, test_values: int) -> None:
    if len(known) < 4 or len(np.unique(known)) < 2:
        raise UserError(
            f"target {name!r}: {len(known)} training images have a value"
            + (", and all have the same" if len(known) else "")
            + ": it cannot be learnt; leave it out (--columns)"
        )
    if label and min((known == 0).sum(), (known == 1).sum()) < 2:
        raise UserError(f"target {name!r}: one of its two values has a single training image; leave it out (--columns)")
    if not test_values:
        raise UserError(f"target {name!r}: no test image has a value; leave it out (--columns)")


def _hold_out(values: np.ndarray, label: bool, share: float, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Indices for the fit and for the selection; for a label, both values are on both sides."""
    groups = [np.flatnonzero(values == kind) for kind in (0, 1)] if label else [np.arange(len(values))]
    held_out = []
    for number, members in enumerate(groups):
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held_out.append(numpy_generator(seed, "targets", name, number).permutation(members)[:count])
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(values)), chosen), chosen


class _RotatedFeatures:
    """Features in the axes of the training images' covariance, computed once for all labels: logistic regression does
    not depend on the axes."""

    def __init__(self, rows: np.ndarray, others: np.ndarray, task: Task) -> None:
        self.rotation = Rotation(rows, device=task.device)
        self.rows, self.others = self.rotation(rows).double(), self.rotation(others).double()

    def log_odds(
        self, fit: np.ndarray, values: np.ndarray, penalties: tuple[float, ...], test_values: np.ndarray | None
    ) -> list[np.ndarray]:
        """For each penalty the log-odds (m,) float64 of the training images with the indices `test_values`, or of all
        test images (None), by the fit to the training images `fit` (n,) with values (n,) of 0 and 1."""
        known = torch.from_numpy(values.astype(np.int64)).to(self.rows.device)
        scored = self.others if test_values is None else self.rows[test_values]
        fits = {each.penalty: each for each in path(self.rows[fit], known, 2, penalties, self.rotation.variance)}
        odds = (scored @ fits[p].weight.T + fits[p].bias for p in penalties)
        return [(each[:, 1] - each[:, 0]).cpu().numpy() for each in odds]


def _numbers(
    task: Task, rows: np.ndarray, values: np.ndarray, others: np.ndarray, penalties: tuple[float, ...]
) -> list[np.ndarray]:
    """For each penalty the prediction (m,) float64 for `others` (m, F) by the fit to rows (n, F) with values (n,)."""
    # In the axes of the rows' covariance the normal equations are diagonal (Hoerl & Kennard, 1970).
    rotation = Rotation(rows, device=task.device)
    rotated, rotated_others = rotation(rows).double(), rotation(others).double()
    numbers = torch.from_numpy(values).to(task.device)
    mean = numbers.mean()
    moment = rotated.T @ (numbers - mean) / len(rotated)
    return [(rotated_others @ (moment / (rotation.variance + p)) + mean).cpu().numpy() for p in penalties]


def _loss(predicted: np.ndarray, values: np.ndarray, label: bool) -> float:
    """Mean cross-entropy of log-odds, or mean squared error."""
    if label:
        return float(np.logaddexp(0, np.where(values == 1, -predicted, predicted)).mean())
    return float(np.square(predicted - values).mean())


def _score(predicted: np.ndarray, values: np.ndarray, label: bool) -> float | None:
    """Average precision or R2 of the images that have a value; None if all values are the same."""
    known = np.isfinite(values)
    predicted, values = predicted[known], values[known]
    if len(np.unique(values)) < 2:
        return None
    return average_precision(predicted, values == 1) if label else r2(predicted, values)


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """The sum over thresholds of the precision times the gain in recall, for scores (n,) with positives (n,) bool, at
    least one. Equal scores are one threshold, so their order does not matter."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.diff(scores[order]) != 0, True)  # the end of each run of equal scores
    precision, recall = hits[last] / (np.flatnonzero(last) + 1), hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def r2(predicted: np.ndarray, values: np.ndarray) -> float:
    """1 - (squared error / squared error of the values' mean)."""
    return 1 - float(np.square(predicted - values).sum() / np.square(values - values.mean()).sum())


def _interval(
    predicted: np.ndarray, test_values: np.ndarray, columns: list[int], label: bool, seed: int
) -> list[float]:
    """The 95 % bootstrap interval of the mean score of the targets `columns`, over samples of the test images."""

    def mean(chosen: np.ndarray) -> float:
        found = [_score(predicted[chosen, t], test_values[chosen, t], label) for t in columns]
        return float(np.mean([score for score in found if score is not None] or [np.nan]))

    return resampled(mean, len(test_values), seed)
