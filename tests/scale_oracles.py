"""Quantisation over several scales in NumPy and float64, which shares nothing with the code."""

import math

import numpy as np

from ssl_pretrain.backbones.scales import Scales


def numpy_area(x: np.ndarray, to: tuple[int, int]) -> np.ndarray:
    """Means of a map (h, w, d) over areas."""
    h, w, _ = x.shape
    return np.array([
        [x[i * h // to[0] : -(-(i + 1) * h // to[0]), j * w // to[1] : -(-(j + 1) * w // to[1])].mean((0, 1))
         for j in range(to[1])] for i in range(to[0])
    ])  # fmt: skip


def cubic_weights(old: int, new: int) -> np.ndarray:
    """Keys' kernel with a = -0.75, cells' centres, the border repeated: (new, old)."""

    def kernel(t: float) -> float:
        a, t = -0.75, abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    found = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / new - 0.5
        for k in range(math.floor(place) - 1, math.floor(place) + 3):
            found[i, min(max(k, 0), old - 1)] += kernel(place - k)
    return found


def numpy_cubic(x: np.ndarray, to: tuple[int, int]) -> np.ndarray:
    return np.einsum("ih,jw,hwd->ijd", cubic_weights(x.shape[0], to[0]), cubic_weights(x.shape[1], to[1]), x)


def numpy_conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    h, w, _ = x.shape
    return bias + sum(
        padded[r : r + h, c : c + w] @ weight[:, :, r, c].T for r in range(3) for c in range(3)
    )  # fmt: skip


def numpy_levels(x: np.ndarray, codes: np.ndarray, shapes: list, convs: list) -> tuple[list, list, list]:
    """Of one map (h, w, d): ids, the vectors that they stand for, and the map after each scale."""
    rest, total, ids, vectors, sums = x, np.zeros_like(x), [], [], []
    for shape, (weight, bias) in zip(shapes, convs, strict=True):
        small = x - total if shape == x.shape[:2] else numpy_area(rest, shape)
        own = ((small[:, :, None] - codes) ** 2).sum(-1).argmin(-1)
        large = codes[own] if shape == x.shape[:2] else numpy_cubic(codes[own], x.shape[:2])
        added = 0.5 * large + 0.5 * numpy_conv(large, weight, bias)
        total, rest = total + added, rest - added
        ids.append(own.ravel())
        vectors.append(small.reshape(-1, x.shape[2]))
        sums.append(total)
    return ids, vectors, sums


def convs_of(scales: Scales) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weight and bias of the convolution of each scale."""
    count = len(scales.sides)
    ticks = [(2 * k + 1) / (2 * len(scales.convs)) for k in range(len(scales.convs))]
    ticks = list(np.linspace(1 / (3 * len(ticks)), 1 - 1 / (3 * len(ticks)), len(ticks)))
    nearest = [min(range(len(ticks)), key=lambda k: (abs(ticks[k] - i / (count - 1)), k)) for i in range(count)]
    return [
        (scales.convs[k].weight.detach().double().numpy(), scales.convs[k].bias.detach().double().numpy())
        for k in nearest
    ]
