"""Logistic regression on frozen features with an L2 penalty, solved to its minimum without learning rate and batches
(the "logreg" protocol of DINOv2; with few labels that of MSN, Assran et al., ECCV 2022, section 4.1).

Shapes: n training and m test images, F floats a feature, C classes. `C` of the penalty is scikit-learn's: the objective
is |W|^2 / 2 + C * the sum of the cross-entropies.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from ssl_pretrain.eval._logistic_regression import Rotation, path
from torch import Tensor

from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Pixels, Tap, poolings
from ssl_pretrain.randomness import numpy_generator

from ._results import Outcome, classification
from ._task import Task
from .linear import hold_out

BASELINES = ("random",)
SHARED = True
# DINOv2's "logreg": the CLS token after the final norm, 45 C from 1e-6 to 1e5, selected on a tenth of the training
# images.
PROTOCOLS: dict[str, dict[str, Any]] = {"dinov2": {"features": ("cls",), "normalise": "none"}}
CHUNK = 4096  # rows scored at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    """Logistic regression."""

    c_range: tuple[float, float] = (1e-6, 1e5)
    """Smallest and largest C to try, as in scikit-learn: a smaller C is a stronger penalty."""
    c_count: int = 45
    """Number of values of C to try, evenly spaced on a logarithmic scale (DINOv2: 45)."""
    features: tuple[str, ...] | None = None
    """Features to compare: pooled, cls, mean, or of earlier blocks cls@-4, mean@-4 (default: all pooled ones that the
    encoder has)."""
    normalise: Literal["none", "l2"] = "none"
    """Normalisation of the features: none, or l2 (each image's feature scaled to length 1)."""
    held_out: float = 0.1
    """Share of the training images of each class that is held out to select C and the feature."""
    budgets: tuple[str, ...] = ()
    """Also train with few labels: numbers of images of each class (1 2 5), or shares of each class (1% 10%)."""
    draws: int = 5
    """Number of random draws of the images of each budget."""
    c_single: float = 1.0
    """C for a budget of one image of each class, where no images are left to select it."""
    max_iterations: int = 1000
    """Largest number of L-BFGS steps for each C."""


def evaluate(task: Task, config: Config) -> Outcome:
    """Fit every C on a part of the training images, select on the others, fit again on all of them, and test once; and
    the same within each draw of each budget, on the first feature.

    Raises UserError for options out of range, if every class has a single training image, and as `Task.features`.
    """
    _check(config)
    names = tuple(dict.fromkeys(str(Tap.parse(name)) for name in config.features or ()))
    if isinstance(task.encoder.backbone, Pixels):
        names = ("pooled",)
    elif not names:
        names = poolings(task.encoder, task.device)
    train, test = task.features(names)
    fit, held_out = hold_out(train.labels, config.held_out, task.seed)
    cs = _grid(config)

    tried: list[dict[str, Any]] = []
    for number, name in enumerate(names):
        twin = next((one for one in names[:number] if np.array_equal(test.features[one], test.features[name])), None)
        if twin is not None:  # pooled is often the same as the CLS token or the mean
            tried += [{**entry, "feature": name} for entry in tried if entry["feature"] == twin]
            continue
        found = _sweep(task, config, train.features[name], train.labels, fit, held_out, cs)
        tried += [{"feature": name, **entry} for entry in found]
        task.report("features", number + 1, len(names))
    best = _best(tried)
    everything = np.arange(len(train.labels))
    ranked, iterations = _test(task, config, train, test, best["feature"], everything, best["C"])

    few_labels = []
    for number, budget in enumerate(config.budgets):
        few_labels.append(_few_labels(task, config, train, test, names[0], budget, cs))
        task.report("budgets", number + 1, len(config.budgets))
    metrics = classification(ranked, test.labels, task.data.classes)
    if few_labels:
        metrics["few_labels"] = few_labels
        metrics["findings"] = [_sentence(row) for row in few_labels]
    return Outcome(
        metrics,
        {
            "headline": f"feature {best['feature']}, C {best['C']:.3g}"
            + (" (at the edge of the grid)" if len(cs) > 1 and best["C"] in (min(cs), max(cs)) else ""),
            "features": list(names),
            "normalise": config.normalise,
            "C": cs,
            "selected": best,
            "selection": f"highest top-1 on {len(held_out)} held-out training images ({config.held_out:g} of each class), "
            f"of equal ones the lower loss; fitted again on all training images and tested once",
            "all_scored_on": "held-out training images",
            "optimizer": f"preconditioned L-BFGS, at most {config.max_iterations} steps ({iterations} for the headline)",
            **(
                {"budgets": f"on feature {names[0]}; C chosen within each draw by the same rule, {config.draws} draws"}
                if few_labels
                else {}
            ),
            **task.protocol(train, test),
        },
        tried,
    )


def _check(config: Config) -> None:
    low, high = config.c_range
    if not (0 < low <= high and math.isfinite(high)) or config.c_count < 1:
        raise UserError(
            f"--c-range {low:g} {high:g} and --c-count {config.c_count}: both C must be above 0, the count at least 1"
        )
    if not 0 < config.held_out < 1:
        raise UserError(f"--held-out is {config.held_out}; it must lie between 0 and 1")
    if config.draws < 1 or config.max_iterations < 1 or not config.c_single > 0:
        raise UserError(
            f"--draws is {config.draws}, --max-iterations {config.max_iterations} and --c-single {config.c_single}; all "
            f"must be above 0"
        )
    for budget in config.budgets:
        _share(budget)


def _grid(config: Config) -> list[float]:
    low, high = config.c_range
    return [float(c) for c in np.geomspace(low, high, config.c_count)]


def _share(budget: str) -> tuple[int, float]:
    """The number of images of each class and the share of each class that a budget means; one of them is 0."""
    number = budget.removesuffix("%")
    try:
        value = float(number)
        if budget.endswith("%") and 0 < value <= 100:
            return 0, value / 100
        if not budget.endswith("%") and value >= 1 and value == int(value):
            return int(value), 0.0
    except ValueError:
        pass
    raise UserError(f"--budgets {budget}: a number of images of each class (1, 2, 5) or a share of them (1%, 10%)")


def draw(labels: np.ndarray, budget: str, seed: int, number: int) -> np.ndarray:
    """Sorted indices of the images (of `labels` (n,)) of one draw of a budget: that number or that share of each class,
    but at least one image, and all images of a class that has no more. Raises UserError for an invalid budget."""
    count, share = _share(budget)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        size = count or max(1, round(share * len(members)))
        chosen.append(numpy_generator(seed, "budget", budget, number, int(label)).permutation(members)[:size])
    return np.sort(np.concatenate(chosen))


def _normalised(rows: np.ndarray, how: str) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) if how == "l2" else rows


def _sweep(
    task: Task,
    config: Config,
    features: np.ndarray,
    labels: np.ndarray,
    fit: np.ndarray,
    held_out: np.ndarray,
    cs: list[float],
) -> list[dict[str, Any]]:
    """Top-1 in percent and loss on the held-out rows, for each C; all share one rotation and one path of solutions."""
    rows = _normalised(features, config.normalise)
    rotation = Rotation(rows, fit, task.device)
    turned, held_out_rows = rotation(rows, fit), rotation(rows, held_out)
    known = torch.from_numpy(labels[fit]).to(task.device)
    wanted = torch.from_numpy(labels[held_out]).to(task.device)
    by_penalty = {1 / (c * len(fit)): c for c in cs}
    result = []
    for found in path(
        turned, known, len(task.data.classes), list(by_penalty), rotation.variance,
        max_iterations=config.max_iterations,
    ):  # fmt: skip
        right, loss = 0, 0.0
        for x, y in zip(held_out_rows.split(CHUNK), wanted.split(CHUNK), strict=True):
            log_p = (x.double() @ found.weight.T + found.bias).log_softmax(1)
            right += int((log_p.argmax(1) == y).sum())
            loss -= float(log_p.gather(1, y[:, None]).sum())
        result.append({
            "C": by_penalty[found.penalty],
            "iterations": found.iterations,
            "top1": 100 * right / len(held_out),
            "loss": loss / len(held_out),
        })  # fmt: skip
    return result


def _best(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The entry with the highest top-1; among equal ones the lowest loss, then the first."""
    return max(tried, key=lambda entry: (entry["top1"], -entry["loss"]))


def _test(
    task: Task, config: Config, train: Any, test: Any, name: str, chosen: np.ndarray, c: float
) -> tuple[np.ndarray, int]:
    """The most probable classes of the test images, best first, (m, min(5, C)) int64, by the fit on the training images
    `chosen`; and the number of steps of the fit."""
    rows = _normalised(train.features[name], config.normalise)
    rotation = Rotation(rows, chosen, task.device)
    labels = torch.from_numpy(train.labels[chosen]).to(task.device)
    fit = next(path(
        rotation(rows, chosen), labels, len(task.data.classes), [1 / (c * len(chosen))], rotation.variance,
        max_iterations=config.max_iterations,
    ))  # fmt: skip
    ranked: list[Tensor] = []
    for start in range(0, len(test.labels), CHUNK):
        part = rotation(_normalised(test.features[name][start : start + CHUNK], config.normalise))
        logits = part.double() @ fit.weight.T + fit.bias
        ranked.append(logits.sort(dim=1, descending=True, stable=True).indices[:, :5].cpu())
    return torch.cat(ranked).numpy(), fit.iterations


def _few_labels(
    task: Task, config: Config, train: Any, test: Any, name: str, budget: str, cs: list[float]
) -> dict[str, Any]:
    """Top-1 of each draw of a budget, in percent, their mean and standard deviation."""
    top1, used = [], []
    for number in range(config.draws):
        chosen = draw(train.labels, budget, task.seed, number)
        c = config.c_single
        if np.bincount(train.labels[chosen]).max() > 1:
            fit, held_out = hold_out(train.labels[chosen], config.held_out, task.seed)
            found = _sweep(task, config, train.features[name], train.labels, chosen[fit], chosen[held_out], cs)
            c = _best(found)["C"]
        ranked, _ = _test(task, config, train, test, name, chosen, c)
        top1.append(100 * float((ranked[:, 0] == test.labels).mean()))
        used.append(c)
    return {
        "budget": budget,
        "images": len(chosen),
        "top1": float(np.mean(top1)),
        "spread": float(np.std(top1, ddof=1)) if len(top1) > 1 else None,
        "draws": top1,
        "C": used,
    }


def _sentence(row: dict[str, Any]) -> str:
    what = (
        f"{row['budget']} of the labels" if row["budget"].endswith("%") else f"{row['budget']} image(s) of each class"
    )
    spread = "" if row["spread"] is None else f" +- {row['spread']:.2f}"
    return f"with {what} ({row['images']:,}): top-1 {row['top1']:.2f}{spread} % ({len(row['draws'])} draws)"
