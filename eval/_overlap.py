"""Scores of segmentations: intersection over union of classes, and region similarity J and contour accuracy F of
objects (Perazzi et al., "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", CVPR 2016,
section 5.1), with bootstrap intervals.

Shapes: n images, C classes, H x W pixels, g groups of images, R = 1000 draws.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl_pretrain.randomness import numpy_generator

from ._intervals import DRAWS

Scores = list[tuple[str, dict[str, Any]]]  # settings and their scores on the test images, the headline first
TOLERANCE = 0.008  # as a share of the image's diagonal: the largest distance of contours that still match
HITS, TRUE, FOUND = 0, 1, 2


def counts(found: np.ndarray, true: np.ndarray, classes: int) -> np.ndarray:
    """Pixel counts of one image for each class, (3, C) int64: correctly predicted, true, and predicted pixels.

    found, true: predicted and true classes, (H, W) int64 in [0, C). Pixels with -1 in `true` are unknown and do not
    count."""
    known = true >= 0
    found, true = found[known], true[known]
    parts = found[found == true], true, found
    return np.stack([np.bincount(part, minlength=classes) for part in parts])


def segmentation(table: np.ndarray, names: Sequence[str], seed: int) -> dict[str, Any]:
    """Scores in percent from the `counts` of n images, (n, 3, C), with at least one known pixel.

    "miou": the mean of the intersection over union of all images together, over the classes that have pixels;
    "pixel_accuracy"; both with the 95 % interval of a bootstrap over images; "per_class_iou" of those classes; "n"."""
    total = table.sum(0, dtype=np.float64)
    iou, accuracy = _iou(total[None])
    drawn = np.tensordot(resamples(len(table), seed), table.astype(np.float64), axes=1)
    drawn = drawn[drawn[:, TRUE].sum(1) > 0]  # a bootstrap sample may contain only images without known pixels
    ious, accuracies = _iou(drawn)
    return {
        "miou": 100 * float(np.nanmean(iou)),
        "miou_interval": _percentiles(np.nanmean(ious, axis=1)),
        "pixel_accuracy": 100 * float(accuracy[0]),
        "pixel_accuracy_interval": _percentiles(accuracies),
        "per_class_iou": {
            name: 100 * float(value) for name, value in zip(names, iou[0], strict=True) if not np.isnan(value)
        },
        "n": len(table),
    }


def mean(sums: np.ndarray, sizes: np.ndarray, seed: int) -> tuple[float, list[float]]:
    """The mean of shares in groups, in percent, and its 95 % interval by a bootstrap over the groups. sums, sizes: (g,)
    the sum and the number of each group's shares."""
    drawn = resamples(len(sums), seed).astype(np.float64)
    return 100 * float(sums.sum() / sizes.sum()), _percentiles((drawn @ sums) / (drawn @ sizes))


def resamples(n: int, seed: int) -> np.ndarray:
    """How often each of n items is in each of R samples of n items drawn with replacement: (R, n) int64."""
    return numpy_generator(seed, "bootstrap").multinomial(n, np.full(n, 1 / n), size=DRAWS)


def region_similarity(found: np.ndarray, true: np.ndarray) -> float:
    """J: intersection over union of two masks (H, W) bool; 1 where both are empty."""
    union = (found | true).sum()
    return float((found & true).sum() / union) if union else 1.0


def contour_accuracy(found: np.ndarray, true: np.ndarray) -> float:
    """F: the harmonic mean of contour precision and contour recall of two masks (H, W) bool.

    Precision is the share of the found contour that lies within the tolerance of the true one; recall is the share of
    the true contour that lies within the tolerance of the found one. F is 1 if both masks have no contour, 0 if one has
    none. Contour pixels are those whose lower, right or lower right neighbour is on the other side. The tolerance is a
    disk whose radius is 0.008 of the image's diagonal, rounded up.
    """
    ours, theirs = _contour(found), _contour(true)
    if not ours.any() or not theirs.any():
        return float(not ours.any() and not theirs.any())
    radius = math.ceil(TOLERANCE * math.hypot(*found.shape))
    precision = (ours & _dilated(theirs, radius)).sum() / ours.sum()
    recall = (theirs & _dilated(ours, radius)).sum() / theirs.sum()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _contour(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[1:, :-1]) | (mask != padded[:-1, 1:]) | (mask != padded[1:, 1:])


def _dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    """(H, W) bool: whether a pixel of the mask lies within `radius` pixels."""
    side = np.arange(-radius, radius + 1)
    disk = np.argwhere(side[:, None] ** 2 + side**2 <= radius**2)
    reached = np.zeros([length + 2 * radius for length in mask.shape], bool)
    places = np.argwhere(mask)[:, None] + disk
    reached[places[..., 0], places[..., 1]] = True
    return reached[radius : radius + mask.shape[0], radius : radius + mask.shape[1]]


def _iou(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU (R, C), NaN for classes without pixels, and pixel accuracy (R,), from pixel counts (R, 3, C)."""
    hits, true, found = table[:, HITS], table[:, TRUE], table[:, FOUND]
    union = true + found - hits
    iou = np.where(true > 0, hits / np.maximum(union, 1), np.nan)
    return iou, hits.sum(1) / true.sum(1)


def _percentiles(shares: np.ndarray) -> list[float]:
    low, high = np.percentile(100 * shares, [2.5, 97.5])
    return [float(low), float(high)]
