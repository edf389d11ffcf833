"""Self-distillation written out in float64 NumPy for the tests of its methods: heads, pairs, patches, Sinkhorn-Knopp."""

import math

import numpy as np
import torch
from torch import nn

_erf = np.vectorize(math.erf)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def head(module: nn.Module, x: torch.Tensor) -> np.ndarray:
    """DINO's head from its parameters in their order: three linear maps with GELU between, unit vectors, prototypes."""
    w1, b1, w2, b2, w3, b3, prototypes = [p.detach().double().numpy() for _, p in ordered(module)]
    y = x.detach().double().numpy()
    for w, b in ((w1, b1), (w2, b2)):
        y = y @ w.T + b
        y = y * (1 + _erf(y / math.sqrt(2))) / 2
    return unit(y @ w3.T + b3) @ unit(prototypes).T


def ordered(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    found = sorted(
        module.named_parameters(), key=lambda item: item[0]
    )  # mlp.0.bias, mlp.0.weight, ..., prototypes.weight
    return [found[i] for i in (1, 0, 3, 2, 5, 4, 6)]


def pairs(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """student (S, B, K) logits, teacher (T, B, K) probabilities."""
    total, count = 0.0, 0
    for t in range(len(teacher)):
        for s in range(len(student)):
            if s != t:
                total -= (teacher[t] * np.log(softmax(student[s] / temperature))).sum(-1).mean()
                count += 1
    return total / count


def patches(student: np.ndarray, teacher: np.ndarray, masks: np.ndarray, temperature: float) -> float:
    """student, teacher (crops, N, K) of all patches; masks (crops, N)."""
    total = 0.0
    for s, t, mask in zip(student, teacher, masks, strict=True):
        if mask.any():
            total -= (t[mask] * np.log(softmax(s[mask] / temperature))).sum(-1).mean()
    return total / len(masks)


def sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """(rows, K) to distributions: columns to equal sums, then rows to one, again and again."""
    q = np.exp((logits - logits.max()) / temperature)
    for _ in range(iterations):
        q = q / q.sum(0, keepdims=True)
        q = q / q.sum(1, keepdims=True)
    return q


def slope_along(
    parameters: list[nn.Parameter], directions: list[torch.Tensor], loss: object, step: float = 1e-5
) -> float:
    """The derivative of `loss()` (a float) along a direction in the space of parameters, by central differences."""
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(loss())
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=sign * step)
    return (values[0] - values[1]) / (2 * step)
