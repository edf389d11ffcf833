"""k-means with k-means++ seeding (Arthur & Vassilvitskii, 2007), Lloyd's iterations and several starts, in bounded
memory.

Shapes: n rows, F floats each, K clusters.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..randomness import numpy_generator
from .products import exact

CHUNK = 8192  # rows whose distances to all centres are in memory at a time


@dataclass(frozen=True)
class Clusters:
    """A partition of rows."""

    assigned: Tensor  # (n,) int64 in [0, K)
    centres: Tensor  # (K, F)
    inertia: float  # the sum of squared distances of the rows to their centres
    iterations: int


@torch.no_grad()
@exact()
def kmeans(
    rows: Tensor, k: int, *, seed: int, starts: int = 10, max_iterations: int = 300, tolerance: float = 1e-4
) -> Clusters:
    """The partition with the lowest inertia of `starts` runs. rows: (n, F), float32 or float64, n >= k >= 1.

    A run ends when no row changes its cluster, or when the centres' squared movement falls below `tolerance` times the
    mean variance of a float (scikit-learn's rule), or after `max_iterations`. A cluster that loses all its rows gets the
    row that is farthest from its centre. All randomness is a function of the seed.
    """
    if not 1 <= k <= len(rows):
        raise ValueError(f"{k} clusters of {len(rows)} rows")
    mean = rows.mean(0, dtype=torch.float64).to(rows.dtype)
    centred = rows - mean  # distances are differences of squares: without a common offset they lose less precision
    least = tolerance * float(centred.var(0, correction=0).mean())
    runs = (
        lloyd(centred, seeds(centred, k, numpy_generator(seed, "k-means", start)), max_iterations, least)
        for start in range(starts)
    )
    best = min(runs, key=lambda run: run.inertia)
    return Clusters(best.assigned, best.centres + mean, best.inertia, best.iterations)


def seeds(rows: Tensor, k: int, generator: np.random.Generator) -> Tensor:
    """k rows (k, F), each drawn with a probability proportional to its squared distance from the previous ones; of 2 +
    log k candidates the one that reduces the inertia most."""
    n = len(rows)
    squares = rows.square().sum(1)
    tries = 2 + int(np.log(k))
    chosen = [int(generator.integers(n))]
    nearest = _squared(rows, squares, rows[chosen])[:, 0]
    for _ in range(1, k):
        total = nearest.double().cumsum(0)
        drawn = torch.from_numpy(generator.random(tries)).to(rows.device) * total[-1]
        picks = torch.searchsorted(total, drawn).clamp_max_(n - 1)
        distances = torch.minimum(_squared(rows, squares, rows[picks]), nearest[:, None])  # (n, tries)
        best = int(distances.sum(0, dtype=torch.float64).argmin())
        nearest = distances[:, best].contiguous()
        chosen.append(int(picks[best]))
    return rows[chosen]


def lloyd(rows: Tensor, centres: Tensor, max_iterations: int, least: float) -> Clusters:
    """Lloyd's iterations from those centres (K, F); see `kmeans`. A squared movement of at most `least` ends them."""
    k = len(centres)
    squares = rows.square().sum(1)
    assigned = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
    sums = torch.zeros(k, rows.shape[1], dtype=torch.float64, device=rows.device)
    iteration = 0
    while iteration < max_iterations:
        before, (assigned, distance) = assigned, _assign(rows, squares, centres)
        if torch.equal(before, assigned):
            break
        iteration += 1
        counts = torch.bincount(assigned, minlength=k)
        for empty in (counts == 0).nonzero()[:, 0].tolist():
            distance[counts[assigned] < 2] = -1.0  # a cluster's last row is not moved
            far = int(distance.argmax())
            counts[assigned[far]] -= 1
            counts[empty], assigned[far] = 1, empty
        # After the first iterations few rows change their cluster; only these update the sums (float64).
        for part in (assigned != before).nonzero()[:, 0].split(CHUNK):
            moving = rows[part].double()
            sums.index_add_(0, assigned[part], moving)
            if iteration > 1:
                sums.index_add_(0, before[part], moving, alpha=-1)
        moved = (sums / counts[:, None]).to(rows.dtype)
        shift = float((moved - centres).square().sum())
        centres = moved
        if shift <= least:
            break
    assigned, _ = _assign(rows, squares, centres)
    inertia = sum(
        float((rows[start : start + CHUNK] - centres[assigned[start : start + CHUNK]]).double().square().sum())
        for start in range(0, len(rows), CHUNK)
    )
    return Clusters(assigned, centres, inertia, iteration)


def _assign(rows: Tensor, squares: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, (n,) int64, and its squared distance (n,); of equal ones the first."""
    parts = [
        _squared(rows[start : start + CHUNK], squares[start : start + CHUNK], centres).min(1)
        for start in range(0, len(rows), CHUNK)
    ]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _squared(rows: Tensor, squares: Tensor, centres: Tensor) -> Tensor:
    """Squared distances (n, K)."""
    return torch.addmm(centres.square().sum(1), rows, centres.T, alpha=-2).add_(squares[:, None]).clamp_min_(0)
