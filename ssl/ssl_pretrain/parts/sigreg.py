"""SIGReg: how far a cloud of vectors is from an isotropic normal one, seen along random directions.

Balestriero & LeCun, "LeJEPA" (2025), section 4: along each of S directions the Epps-Pulley statistic, the squared
distance between the empirical characteristic function and that of N(0, 1), weighted by a Gaussian window. Shapes: N
vectors of this process, D channels, S directions (slices), K knots of the integral.
"""

from typing import Any

import torch
from torch import Tensor

from ..distributed import mean, size

KNOTS, END = 17, 3.0  # the integral over [-3, 3] is twice that over [0, 3], for the integrand is even


class _CharacteristicFunction(torch.autograd.Function):
    """Means over samples of cos(t x) and sin(t x) at evenly spaced t, from one sine and cosine a value: the other knots
    come by turning on by the same angle. Backward turns again instead of keeping K values for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spacing: float, knots: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.spacing, ctx.knots = spacing, knots
        out = x.new_empty(2, knots, x.shape[1])
        for k, cos, sin in _turns(x, spacing, knots):
            torch.mean(cos, 0, out=out[0, k])
            torch.mean(sin, 0, out=out[1, k])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        by_cos, by_sin = grads[0]
        total = torch.zeros_like(x)
        for k, cos, sin in _turns(x, ctx.spacing, ctx.knots):
            t = k * ctx.spacing / len(x)
            total.addcmul_(cos, by_sin[k], value=t).addcmul_(sin, by_cos[k], value=-t)
        return total, None, None


def _turns(x: Tensor, spacing: float, knots: int) -> Any:
    """(k, cos(k * spacing * x), sin(k * spacing * x)) for k < knots."""
    c, s = torch.cos(x * spacing), torch.sin(x * spacing)
    cos, sin = torch.ones_like(x), torch.zeros_like(x)
    for k in range(knots):
        yield k, cos, sin
        if k < knots - 1:
            cos, sin = cos * c - sin * s, sin * c + cos * s


def sigreg(vectors: Tensor, directions: Tensor) -> Tensor:
    """The mean over directions of the Epps-Pulley statistic of the global batch (section 4.2), () with gradient.

    vectors: (N, D), computed in float32 (or wider); directions: (D, S) normal noise, the same on every process, made
    unit here. It is about 1 for a normal cloud, of whatever size, and grows with the number of vectors for any other.
    """
    wide = torch.promote_types(vectors.dtype, torch.float32)
    with torch.autocast(vectors.device.type, enabled=False):
        along = directions.to(wide) / directions.to(wide).norm(dim=0)
        x = vectors.to(wide) @ along  # (N, S)
        cos, sin = mean(_CharacteristicFunction.apply(x, END / (KNOTS - 1), KNOTS))  # (K, S) each
        normal, weights = _knots(x.device, wide)
        statistic = weights @ ((cos - normal[:, None]).square() + sin.square())
        return statistic.mean() * len(vectors) * size()


def sigreg_of_a_point(vectors: int) -> float:
    """What `sigreg` gives for so many vectors that are all zero: total collapse."""
    normal, weights = _knots(torch.device("cpu"), torch.float64)
    return vectors * float(weights @ (1 - normal).square())


def _knots(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The characteristic function of N(0, 1) at the knots (K,), and what each weighs: window times trapezoid rule, twice
    for the half that is left out."""
    t = torch.linspace(0, END, KNOTS, dtype=dtype, device=device)
    normal = torch.exp(-t.square() / 2)
    spacing = torch.full_like(t, 2 * END / (KNOTS - 1))
    spacing[[0, -1]] /= 2
    return normal, spacing * normal
