"""Heads, losses and layouts written out in float64 NumPy from the papers, and finite differences. Tests of several methods
compare with them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ssl_pretrain.parts.sigreg import END, KNOTS

Weights = dict[str, np.ndarray]  # by the parameter's name
_erf = np.vectorize(math.erf)


def weights_of(module: nn.Module, prefix: str) -> Weights:
    """Copies of the module's parameters, their names after `prefix`."""
    return {f"{prefix}{n}": v.detach().numpy().copy() for n, v in module.named_parameters()}


def numpy_normalize(x: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def numpy_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_attention(block: Any, entering: np.ndarray, moved: np.ndarray | None = None) -> np.ndarray:
    """The attention weights (B, heads, L, L) of a pre-norm block of a ViT without rotary or relative positions, for the
    tokens (B, L, D) that enter it. moved: is added to the bias of the queries, keys and values."""
    scale, shift = (value.detach().double().numpy() for value in (block.norm1.weight, block.norm1.bias))
    x = entering - entering.mean(-1, keepdims=True)
    x = x / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + shift
    weight, bias = (value.detach().double().numpy() for value in (block.attn.qkv.weight, block.attn.qkv.bias))
    q, k, _ = np.split(x @ weight.T + bias + (0 if moved is None else moved), 3, axis=-1)
    heads = zip(*(np.split(part, block.attn.heads, axis=-1) for part in (q, k)), strict=True)
    scores = [a @ b.swapaxes(1, 2) / np.sqrt(a.shape[-1]) for a, b in heads]
    return numpy_softmax(np.stack(scores, axis=1))


# ---- Heads


def numpy_head(weights: Weights, prefix: str, layout: str, x: np.ndarray) -> np.ndarray:
    """A head's output from its parameters, by the numbers of its layers; batch norm with this batch's statistics.

    layout: "linear norm relu linear" and the like.
    """
    for i, layer in enumerate(layout.split()):
        gain, shift = weights.get(f"{prefix}{i}.weight"), weights.get(f"{prefix}{i}.bias", 0.0)
        if layer == "linear":
            assert gain is not None
            x = x @ gain.T + shift
        elif layer == "norm":
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * (1.0 if gain is None else gain) + shift
        else:
            x = np.maximum(x, 0)
    return x


def numpy_prototype_head(module: nn.Module, x: torch.Tensor) -> np.ndarray:
    """DINO's head from its parameters in their order: three linear maps with GELU between, unit vectors, prototypes, each
    times its gain where there are gains."""
    found = sorted(module.named_parameters(), key=lambda item: item[0])  # mlp.0.bias, mlp.0.weight, ..., prototypes
    w1, b1, w2, b2, w3, b3, prototypes = [found[i][1].detach().double().numpy() for i in (1, 0, 3, 2, 5, 4, -1)]
    gain = found[6][1].detach().double().numpy() if len(found) == 8 else 1.0  # prototypes.gain, prototypes.weight
    y = x.detach().double().numpy()
    for w, b in ((w1, b1), (w2, b2)):
        y = y @ w.T + b
        y = y * (1 + _erf(y / math.sqrt(2))) / 2
    return numpy_normalize(y @ w3.T + b3) @ (gain * numpy_normalize(prototypes)).T


# ---- Losses


def numpy_view_pairs(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """DINO's loss of class tokens. student (S, B, K) logits, teacher (T, B, K) probabilities; a view is not compared with
    itself."""
    total, count = 0.0, 0
    for t in range(len(teacher)):
        for s in range(len(student)):
            if s != t:
                total -= (teacher[t] * np.log(numpy_softmax(student[s] / temperature))).sum(-1).mean()
                count += 1
    return total / count


def numpy_masked_patches(student: np.ndarray, teacher: np.ndarray, masks: np.ndarray, temperature: float) -> float:
    """iBOT's loss of patches. student, teacher (crops, N, K) of all patches; masks (crops, N)."""
    total = 0.0
    for s, t, mask in zip(student, teacher, masks, strict=True):
        if mask.any():
            total -= (t[mask] * np.log(numpy_softmax(s[mask] / temperature))).sum(-1).mean()
    return total / len(masks)


def numpy_sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """(rows, K) to distributions: columns to equal sums, then rows to one, again and again."""
    q = np.exp((logits - logits.max()) / temperature)
    for _ in range(iterations):
        q = q / q.sum(0, keepdims=True)
        q = q / q.sum(1, keepdims=True)
    return q


def numpy_sigreg(z: np.ndarray, directions: np.ndarray) -> float:
    """LeJEPA, section 4.2, as it stands: one direction and one knot after the other. z (N, D), directions (D, S)."""
    t = np.linspace(0, END, KNOTS)
    phi = np.exp(-(t**2) / 2)
    spacing = END / (KNOTS - 1)
    trapezoid = 2 * spacing * np.where((t == 0) | (t == END), 0.5, 1.0)
    total = []
    for a in directions.T:
        x = z @ (a / np.linalg.norm(a))
        ecf = np.array([np.exp(1j * tk * x).mean() for tk in t])
        total.append(len(z) * np.sum(trapezoid * phi * np.abs(ecf - phi) ** 2))
    return float(np.mean(total))


# ---- Layouts


def numpy_patches(x: np.ndarray, p: int) -> np.ndarray:
    """Images (B, C, H, W) to patches (B, N, p * p * C): rows of patches, in a patch rows of pixels, channels last."""
    b, c, height, width = x.shape
    out = np.empty((b, (height // p) * (width // p), p * p * c))
    for i in range(b):
        for n in range(out.shape[1]):
            top, left = n // (width // p) * p, n % (width // p) * p
            values = [x[i, ch, top + r, left + q] for r in range(p) for q in range(p) for ch in range(c)]
            out[i, n] = values
    return out


# ---- Gradients


def check_gradients(oracle: Callable[[Weights], float], at: Weights, gradients: Weights) -> None:
    """Every gradient along a random direction against the oracle's central difference."""
    rng = np.random.default_rng(0)
    for name, value in at.items():
        direction = rng.standard_normal(value.shape)
        up, down = (oracle({**at, name: value + sign * 1e-8 * direction}) for sign in (1, -1))
        slope = (up - down) / 2e-8  # so short that no ReLU turns
        assert (gradients[name] * direction).sum() == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def directional_derivative(
    parameters: list[nn.Parameter], directions: list[torch.Tensor], loss: Callable[[], float], step: float = 1e-5
) -> float:
    """The derivative of `loss` along a direction in the space of parameters, by central differences."""
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(loss())
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=sign * step)
    return (values[0] - values[1]) / (2 * step)
