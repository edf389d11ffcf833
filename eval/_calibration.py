"""Calibration of a classifier: expected calibration error, negative log-likelihood, Brier score, the reliability table,
and temperature scaling (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).

Shapes: n images, C classes. Scores are logarithms of probabilities plus any constant for each image, float64.
"""

from typing import Any

import numpy as np

from ._intervals import wilson

BINS = 15  # of equal width, closed on the right
TEMPERATURES = 0.01, 100.0  # range of the search
HALVINGS = 50  # of that range's logarithm


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities (n, C) from scores (n, C)."""
    shifted = scores - scores.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def best_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """The T in TEMPERATURES for which scores / T have the lowest negative log-likelihood of labels (n,).

    1 if every image is classified correctly: then lower T are always better and the images do not determine T. The
    log-likelihood is concave in 1 / T. Its slope is the mean of (score of the true class - score expected under
    softmax(scores / T)); a bisection finds where it is 0.
    """
    if (scores.argmax(1) == labels).all():
        return 1.0
    true = scores[np.arange(len(labels)), labels].mean()
    low, high = (np.log(1 / t) for t in reversed(TEMPERATURES))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        p = np.exp(log_softmax(scores * np.exp(middle)))
        if (p * scores).sum(1).mean() < true:
            low = middle  # a lower temperature is better
        else:
            high = middle
    return float(np.exp(-(low + high) / 2))


def calibration(log_p: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Calibration measures of log-probabilities (n, C) with labels (n,).

    `ece`, in percent: the mean over images of |accuracy - confidence| of the image's bin. `nll`, in nats. `brier`, in
    [0, 2]: the mean over images of the squared distance between the probabilities and the one-hot label (Brier,
    1950)."""
    rows = reliability(log_p, labels)
    squares = np.exp(2 * log_p).sum(1) - 2 * np.exp(log_p[np.arange(len(labels)), labels]) + 1
    gaps = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    return {
        "ece": float(gaps / len(labels)),
        "nll": float(-log_p[np.arange(len(labels)), labels].mean()),
        "brier": float(squares.mean()),
    }


def reliability(log_p: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
    """One row for each non-empty bin of the highest probability: the bin's borders `low` and `high`, the mean
    `confidence` and the `accuracy` with its 95 % interval, all in percent; and the number of images `n`."""
    confidence, right = np.exp(log_p.max(1)), log_p.argmax(1) == labels
    place = (np.ceil(confidence * BINS) - 1).clip(0, BINS - 1).astype(int)
    return [
        {
            "low": 100 * b / BINS,
            "high": 100 * (b + 1) / BINS,
            "n": int(inside.sum()),
            "confidence": 100 * float(confidence[inside].mean()),
            "accuracy": 100 * float(right[inside].mean()),
            "accuracy_interval": wilson(int(right[inside].sum()), int(inside.sum())),
        }
        for b in range(BINS)
        if (inside := place == b).any()
    ]
