"""Agreement of two partitions of the same images, independent of the clusters' numbers; and the silhouette of one.

Shapes: n images, K clusters, C classes; the table (K, C) counts the images in cluster k and class c.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._assignment import assignment
from ._intervals import wilson

CHUNK = 1024  # rows whose distances to all others are in memory at a time


def agreement(clusters: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    """Agreement of two partitions (n,) int64 >= 0.

    "nmi" and "ami" (normalised by the mean of the entropies; Vinh et al., JMLR 2010), "ari" (Hubert & Arabie, 1985),
    and "accuracy" in percent: the share of images whose cluster is matched with their class, under the best one-to-one
    matching of clusters and classes; with its 95 % interval (over images, for this matching)."""
    _, a = np.unique(clusters, return_inverse=True)
    _, b = np.unique(classes, return_inverse=True)
    table = np.zeros((a.max() + 1, b.max() + 1), np.int64)
    np.add.at(table, (a, b), 1)
    n, rows, columns = len(a), table.sum(1), table.sum(0)
    shared = table[table > 0]
    mutual = float((shared / n * (np.log(shared * n) - np.log(np.outer(rows, columns)[table > 0]))).sum())
    mean = (_entropy(rows) + _entropy(columns)) / 2
    if len(rows) == len(columns) and len(shared) == len(rows):  # the same partition
        nmi = ami = 1.0
    elif mean == 0:
        nmi = ami = 0.0
    else:
        expected = _expected(rows, columns)
        nmi = max(0.0, mutual / mean)
        ami = (mutual - expected) / (mean - expected) if abs(mean - expected) > 1e-15 else 0.0
    pairs = assignment(table)
    hits = int(sum(table[k, c] for k, c in enumerate(pairs) if c >= 0))
    return {
        "nmi": nmi,
        "ami": ami,
        "ari": _ari(table),
        "accuracy": 100 * hits / n,
        "accuracy_interval": wilson(hits, n),
    }


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _expected(rows: np.ndarray, columns: np.ndarray) -> float:
    """The expected mutual information of random partitions with those cluster sizes (Vinh et al., 2010, eq. 24a)."""
    n = int(rows.sum())
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    sizes, repeats = np.unique(columns, return_counts=True)  # clusters of the same size give the same terms
    total = 0.0
    for a, times in zip(*np.unique(rows, return_counts=True), strict=True):
        for b, count in zip(sizes, repeats, strict=True):
            x = np.arange(max(1, a + b - n), min(a, b) + 1)
            chance = np.exp(
                log_factorial[a] + log_factorial[b] + log_factorial[n - a] + log_factorial[n - b] - log_factorial[n]
                - log_factorial[x] - log_factorial[a - x] - log_factorial[b - x] - log_factorial[n - a - b + x]
            )  # fmt: skip
            total += times * count * float((x / n * np.log(n * x / (a * b)) * chance).sum())
    return total


def _ari(table: np.ndarray) -> float:
    def pairs(counts: np.ndarray) -> int:
        return sum(math.comb(int(count), 2) for count in counts.ravel())

    together, of_rows, of_columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    every = math.comb(int(table.sum()), 2)
    if of_rows == of_columns == together:
        return 1.0
    chance = of_rows * of_columns / every
    return (together - chance) / ((of_rows + of_columns) / 2 - chance)


def silhouette(rows: Tensor, clusters: np.ndarray) -> float | None:
    """The mean over rows (n, F) of (b - a) / max(a, b) (Rousseeuw, 1987). Needs no labels.

    a is the mean Euclidean distance to the other rows of the cluster, b the smallest mean distance to the rows of
    another cluster. A row alone in its cluster counts as 0. None unless there are between 2 and n - 1 clusters."""
    _, given = np.unique(clusters, return_inverse=True)
    k, n = given.max() + 1, len(given)
    if not 2 <= k <= n - 1:
        return None
    x = rows.double()
    assigned = torch.from_numpy(given).to(x.device)
    counts = torch.bincount(assigned, minlength=k).double()
    member = torch.nn.functional.one_hot(assigned, k).double()
    total = 0.0
    for start in range(0, n, CHUNK):
        part = slice(start, start + CHUNK)
        distances = torch.cdist(x[part], x)
        sums = distances @ member
        own = assigned[part, None]
        alone = counts[own[:, 0]] == 1
        a = sums.gather(1, own)[:, 0] / (counts[own[:, 0]] - 1).clamp_min(1)
        b = (sums / counts).scatter_(1, own, torch.inf).amin(1)
        score = (b - a) / torch.maximum(a, b).clamp_min(1e-300)
        total += float(score.masked_fill(alone, 0).sum())
    return total / n
