"""SIGReg: distance of a set of vectors from an isotropic normal distribution, measured along random directions.

Balestriero & LeCun, "LeJEPA" (2025), section 4: along each of S directions the Epps-Pulley statistic, the squared
distance between the empirical characteristic function and that of N(0, 1), weighted by a Gaussian window. Shapes: N
vectors of this process, D channels, S directions (slices), K knots of the integral.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..distributed import mean, size

KNOTS, END = 17, 3.0  # the integral over [-3, 3] is twice that over [0, 3], because the integrand is even
CACHED = 2**17  # projected values processed together


class _CharacteristicFunction(torch.autograd.Function):
    """Means over samples x (N, S) of cos(t x) and sin(t x) at evenly spaced t: (2, K, S). Only one sine and one cosine
    per value are computed; the other knots follow by a recurrence. It runs on a few samples at a time, and again in the
    backward pass, so that K values per sample need not be stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spacing: float, knots: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.spacing, ctx.knots = spacing, knots
        out = x.new_zeros(2, knots, x.shape[1])
        for samples in _slices(x):
            for k, cos, sin in _multiples(x[samples], spacing, knots):
                out[0, k] += cos.sum(0)
                out[1, k] += sin.sum(0)
        return out * (_signs(knots, x) / len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_mean: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        t = ctx.spacing * torch.arange(ctx.knots, dtype=x.dtype, device=x.device)[:, None]  # (K, 1)
        by_cos, by_sin = by_mean * _signs(ctx.knots, x) * (t / len(x))  # (K, S) each
        total = torch.zeros_like(x)
        for samples in _slices(x):
            chunk_total = total[samples]
            for k, cos, sin in _multiples(x[samples], ctx.spacing, ctx.knots):
                chunk_total.addcmul_(cos, by_sin[k]).addcmul_(sin, by_cos[k], value=-1)
        return total, None, None


def _multiples(x: Tensor, spacing: float, knots: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (k, cos(k a), sin(k a)) for k < knots and a = spacing * x, with the signs of `_signs`; later steps
    overwrite both tensors.

    f((k + 1) a) = 2 cos(a) f(k a) - f((k - 1) a) for both; with these signs that is one operation in place.
    """
    angle = x * spacing
    cos, sin = angle.cos(), angle.sin()
    twice = 2 * cos
    cos_before, sin_before = torch.ones_like(x), torch.zeros_like(x)
    yield 0, cos_before, sin_before
    for k in range(1, knots):
        yield k, cos, sin
        sign = 1 if k % 2 == 0 else -1
        cos, cos_before = cos_before.addcmul_(twice, cos, value=sign), cos
        sin, sin_before = sin_before.addcmul_(twice, sin, value=sign), sin


def _signs(knots: int, like: Tensor) -> Tensor:
    """+ + - - + + - - ... as a column (K, 1)."""
    k = torch.arange(knots, device=like.device)
    return (1 - k % 4 // 2 * 2).to(like.dtype)[:, None]


def _slices(x: Tensor) -> list[slice]:
    """Slices of the samples: on a CPU so many that its cache holds several tables of them, else all."""
    n, s = x.shape
    step = max(1, CACHED // s) if x.device.type == "cpu" else n
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def sigreg(vectors: Tensor, directions: Tensor) -> Tensor:
    """The mean over directions of the Epps-Pulley statistic of the global batch (section 4.2), () with gradient; for
    several sets of vectors also the mean over them.

    vectors: (N, D) or (V, N, D), computed in float32 (or wider); directions: (D, S) normal noise, the same on every
    process, which this function normalises. The value is about 1 for normally distributed vectors, for any number of
    them, and grows with the number of vectors for any other distribution.
    """
    wide = torch.promote_types(vectors.dtype, torch.float32)
    clouds = vectors if vectors.ndim == 3 else vectors[None]
    with torch.autocast(vectors.device.type, enabled=False):
        along = directions.to(wide) / directions.to(wide).norm(dim=0)
        # the sets side by side, because columns are independent of each other: (N, V * S) One matrix: for three
        # dimensions torch computes N products of V rows each, which takes twice as long as the rest.
        x = (clouds.transpose(0, 1).to(wide).flatten(0, 1) @ along).view(clouds.shape[1], -1)
        cos, sin = mean(_CharacteristicFunction.apply(x, END / (KNOTS - 1), KNOTS))  # (K, V * S) each
        normal, weights = _knots(x.device, wide)
        statistic = weights @ ((cos - normal[:, None]).square() + sin.square())
        return statistic.mean() * len(x) * size()


def sigreg_of_a_point(vectors: int) -> float:
    """The value of `sigreg` for that number of vectors if all are zero: total collapse."""
    normal, weights = _knots(torch.device("cpu"), torch.float64)
    return vectors * float(weights @ (1 - normal).square())


def _knots(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The characteristic function of N(0, 1) at the knots (K,), and the weight of each: window times trapezoid rule,
    times two for the omitted half."""
    t = torch.linspace(0, END, KNOTS, dtype=dtype, device=device)
    normal = torch.exp(-t.square() / 2)
    spacing = torch.full_like(t, 2 * END / (KNOTS - 1))
    spacing[:: KNOTS - 1] /= 2  # both ends; a list of indices would be copied to the device
    return normal, spacing * normal
