"""L2-penalised softmax regression on fixed features, for many strengths of the penalty, by preconditioned L-BFGS.

    objective(W, b) = mean over i of cross-entropy(softmax(x_i W + b), y_i) + penalty / 2 * |W|^2        (b is free)

Shapes: n rows, F floats each, R <= min(n, F) directions in which the rows vary, C classes; W (F, C) is kept as its
transpose (C, F), which makes the two products of a step twice as fast where C is small; b (C,). In scikit-learn's and
LIBLINEAR's terms penalty = 1 / (C n).

The rows are centred and rotated once into the axes of their covariance, whose eigenvalues are s_1, ..., s_R. In these
axes the Hessian is about a s_r + penalty for axis r of W, and a for b, where a is the mean of p (1 - p) over rows and
classes. L-BFGS runs on weights divided by the square roots of these values, so directions of very different variance do
not slow down the convergence. All penalties share the axes. Each starts from the solution of the next stronger penalty.
The rotation is orthogonal, so it does not change the penalty. Directions without variance are dropped: at the minimum
their weights are 0.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

CHUNK = 4096  # rows read, rotated or scored at a time
LOGITS = 2**20  # logits in memory at a time
MEMORY = 10  # pairs of L-BFGS
DECREASE = 1e-4  # share of the decrease predicted by the slope that a step must reach (Armijo)
HALVINGS = 20
SEPARATED = 0.01  # nats: below this value nearly all rows are classified correctly, and the tolerance is relative to it


@dataclass(frozen=True)
class Fit:
    """A minimum, in the axes of a `Rotation`."""

    penalty: float
    weight: Tensor  # (C, R) float64
    bias: Tensor  # (C,) float64
    objective: float
    iterations: int


@final
class Rotation:
    """Centres rows and rotates them into the axes of their covariance.

    The axes are computed from `rows` (n, F), float32 or float64 (memory-mapped arrays too), or from the rows with the
    indices `chosen`."""

    def __init__(self, rows: np.ndarray, chosen: np.ndarray | None = None, device: torch.device | str = "cpu") -> None:
        chosen = np.arange(len(rows)) if chosen is None else chosen
        n, width = len(chosen), rows.shape[1]
        parts = [np.sort(chosen[start : start + CHUNK]) for start in range(0, n, CHUNK)]
        mean = sum((rows[part].sum(0, dtype=np.float64) for part in parts), np.zeros(width)) / n
        self.mean = torch.from_numpy(mean).to(device)
        if n <= width:
            _, singular, axes = torch.linalg.svd(self._centred(rows[chosen]).double(), full_matrices=False)
            variance, axes = singular.square() / n, axes.T
        else:
            covariance = torch.zeros(width, width, dtype=torch.float64, device=device)
            for part in parts:
                centred = self._centred(rows[part])
                covariance += centred.T @ centred
            variance, axes = torch.linalg.eigh(covariance / n)
            variance, axes = variance.flip(0), axes.flip(1)
        nonzero = variance > variance[0].clamp_min(1e-300) * 1e-12
        self.variance, self.axes = variance[nonzero], axes[:, nonzero].contiguous()  # (R,), (F, R)

    def __call__(self, rows: np.ndarray, chosen: np.ndarray | None = None) -> Tensor:
        """Rows (n, F), or those with the indices `chosen`, rotated: (n, R) in their own precision, on the device."""
        order = np.arange(len(rows)) if chosen is None else chosen
        like = self._centred(rows[:0])
        turned = torch.empty(len(order), self.axes.shape[1], dtype=like.dtype, device=like.device)
        axes = self.axes.to(like.dtype)
        for start in range(0, len(order), CHUNK):
            turned[start : start + CHUNK] = self._centred(rows[order[start : start + CHUNK]]) @ axes
        return turned

    def original(self, fit: Fit) -> tuple[Tensor, Tensor]:
        """The weights (C, F) and biases (C,), float64, for rows that are not centred and rotated."""
        weight = fit.weight @ self.axes.T
        return weight, fit.bias - weight @ self.mean

    def _centred(self, rows: np.ndarray) -> Tensor:
        given = torch.from_numpy(np.array(rows)).to(self.mean.device)
        return given - self.mean.to(given.dtype)


def path(
    rows: Tensor,
    labels: Tensor,
    classes: int,
    penalties: Sequence[float],
    variance: Tensor,
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
) -> Iterator[Fit]:
    """Yields the minimum for each penalty > 0, from the strongest to the weakest, in any order of `penalties`.

    rows (n, R): centred and rotated by a `Rotation`, float32 or float64 (products have that precision, sums and weights
    are float64); variance (R,): the rotation's; labels (n,) int64 in [0, C). A fit ends when L-BFGS's quadratic model
    estimates that the objective is less than `tolerance` times its value (times SEPARATED, if it is smaller) above the
    minimum, when a step's gain is below rounding errors, or after `max_iterations`.
    """
    tolerance = max(tolerance, torch.finfo(rows.dtype).eps)
    weight = torch.zeros(classes, rows.shape[1], dtype=torch.float64, device=rows.device)
    # The minimum for an infinite penalty. A class without rows counts as half a row, because log 0 is not finite.
    share = torch.bincount(labels, minlength=classes).double().clamp_min(0.5) / len(rows)
    bias = share.log() - share.log().mean()
    for penalty in sorted(penalties, reverse=True):
        fit = _minimise(_Objective(rows, labels, penalty), weight, bias, variance, tolerance, max_iterations)
        weight, bias = fit.weight, fit.bias
        yield fit


@final
class _Objective:
    """The value and the gradient at (W, b), side by side in one matrix (C, R + 1) with b last."""

    def __init__(self, rows: Tensor, labels: Tensor, penalty: float) -> None:
        self.rows, self.labels, self.penalty = rows, labels, penalty

    def __call__(self, point: Tensor) -> tuple[float, Tensor, float]:
        """The objective, its gradient (C, R + 1), and the mean of p (1 - p) over rows and classes."""
        n, classes = len(self.rows), len(point)
        weight, bias = point[:, :-1].to(self.rows.dtype).contiguous(), point[:, -1].to(self.rows.dtype)
        gradient = torch.zeros_like(point)
        loss = torch.zeros((), dtype=torch.float64, device=point.device)
        squares = loss.clone()
        step = max(1, LOGITS // classes)
        for start in range(0, n, step):
            x, y = self.rows[start : start + step], self.labels[start : start + step, None]
            log_p = (x @ weight.T).add_(bias).log_softmax(1)
            loss -= log_p.gather(1, y).sum(dtype=torch.float64)
            error = log_p.exp_()
            squares += error.square().sum(dtype=torch.float64)
            error.scatter_add_(1, y, error.new_full((1, 1), -1.0).expand(y.shape))
            gradient[:, :-1] += error.T @ x
            gradient[:, -1] += error.sum(0, dtype=torch.float64)
        gradient /= n
        gradient[:, :-1] += self.penalty * point[:, :-1]
        value = loss / n + self.penalty / 2 * point[:, :-1].square().sum()
        return float(value), gradient, float((1 - squares / n) / classes)


def _minimise(
    objective: _Objective, weight: Tensor, bias: Tensor, variance: Tensor, tolerance: float, max_iterations: int
) -> Fit:
    """L-BFGS (Nocedal & Wright, "Numerical Optimization", algorithm 7.5) on the scaled weights."""
    point = torch.cat([weight, bias[:, None]], 1)
    value, gradient, curvature = objective(point)
    curvature = max(curvature, 1e-6)
    scale = (curvature * torch.cat([variance, variance.new_ones(1)])).add_(objective.penalty).rsqrt_()
    gradient = gradient * scale
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=MEMORY)
    iteration = 0
    while iteration < max_iterations:
        direction = -_times_inverse_hessian(gradient, pairs)
        slope = float((gradient * direction).sum())
        if -slope / 2 <= tolerance * max(value, SEPARATED) or not math.isfinite(slope):
            break
        length = 1.0
        for _ in range(HALVINGS):
            trial = point + length * scale * direction
            trial_value, slopes, _ = objective(trial)
            if trial_value <= value + DECREASE * length * slope:
                break
            # the minimum of the parabola through the value and slope at the point and the value at the trial
            length *= min(max(-slope * length / (2 * (trial_value - value - slope * length)), 0.1), 0.5)
        else:
            break  # the remaining gain is below rounding errors
        slopes = slopes * scale
        change, turn = length * direction, slopes - gradient
        bend = float((change * turn).sum())
        if bend > 1e-12 * float(change.norm() * turn.norm()):
            pairs.append((change, turn, bend))
        point, value, gradient = trial, trial_value, slopes
        iteration += 1
    return Fit(objective.penalty, point[:, :-1], point[:, -1], value, iteration)


def _times_inverse_hessian(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """L-BFGS's two loops (algorithm 7.4)."""
    vector = gradient.clone()
    shares = []
    for change, turn, bend in reversed(pairs):
        share = float((change * vector).sum()) / bend
        vector.sub_(turn, alpha=share)
        shares.append(share)
    if pairs:
        _, turn, bend = pairs[-1]
        vector *= bend / float(turn.square().sum())
    for (change, turn, bend), share in zip(pairs, reversed(shares), strict=True):
        vector.add_(change, alpha=share - float((turn * vector).sum()) / bend)
    return vector
