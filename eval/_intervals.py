"""Confidence intervals of shares and means, and precision and F1 of each class.

Shapes: n images, C classes.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from ssl_pretrain.randomness import numpy_generator

Z = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
DRAWS = 1000  # bootstrap samples


def wilson(hits: int, n: int) -> list[float]:
    """The 95 % interval [low, high], in percent, of a share with `hits` of `n` >= 1 (Wilson, 1927). It also holds for
    few images and at 0 and 100 %, where the normal approximation has no width."""
    share, z2 = hits / n, Z * Z / n
    middle = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n)) / (1 + z2)
    # at 0 and 100 % the interval ends exactly there, without rounding errors
    return [100 * (middle - half) if hits else 0.0, 100 * (middle + half) if hits < n else 100.0]


def bootstrap(values: np.ndarray, seed: int) -> list[float]:
    """The 95 % interval [low, high] of the mean of `values` (n,), by `resampled`."""
    return resampled(lambda chosen: values[chosen].mean(), len(values), seed)


def resampled(statistic: Callable[[np.ndarray], float], n: int, seed: int) -> list[float]:
    """The 95 % bootstrap interval [low, high] of a statistic of n images (Efron, 1979).

    `statistic` is computed on 1000 samples of n images drawn with replacement, each given as indices (n,); the interval
    is between the percentiles. It is a function of the seed. Samples with a NaN statistic do not count."""
    generator = numpy_generator(seed, "bootstrap")
    found = [statistic(generator.integers(0, n, n)) for _ in range(DRAWS)]
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return [float(low), float(high)]


def by_class(found: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Measures of each class that has images, by name: "n" images, and "recall" (its accuracy), "precision" and "f1" in
    percent. found, labels: predicted and true classes, both (n,) int64 in [0, C); found is negative where no class was
    predicted. A class that is never predicted has precision 0."""
    count = len(classes)
    right = np.bincount(labels[found == labels], minlength=count)
    true, predicted = np.bincount(labels, minlength=count), np.bincount(found[found >= 0], minlength=count)
    return {
        name: {
            "n": int(true[c]),
            "recall": 100 * float(right[c] / true[c]),
            "precision": 100 * float(right[c] / max(predicted[c], 1)),
            "f1": 200 * float(right[c] / (true[c] + predicted[c])),
        }
        for c, name in enumerate(classes)
        if true[c]
    }
