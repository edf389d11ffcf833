"""Heads: what stands between an encoder's vectors and a loss, and is thrown away after training.

Shapes: B vectors, D in, K out.
"""

import itertools
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import memory
from ..distributed.batch_norm import BatchNorm1d


def mlp(
    widths: tuple[int, ...],
    *,
    norm: bool = True,
    last_norm: Literal["none", "plain", "affine"] = "none",
    activation: type[nn.Module] = nn.ReLU,
    last_bias: bool = True,
) -> nn.Sequential:
    """Linear maps through `widths` (in, hidden ..., out), each but the last followed by batch norm (where `norm`) and the
    activation. A linear map before a batch norm has no bias: the norm would take it away.

    last_norm: batch norm after the last map, "affine" with a learned gain and shift, "plain" without.
    """
    parts: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        last = i == len(widths) - 2
        normed = last_norm != "none" if last else norm
        parts.append(nn.Linear(before, after, bias=not normed and (last_bias or not last)))
        if last and normed:
            parts.append(BatchNorm1d(after, affine=last_norm == "affine"))
        elif not last:
            parts += ([BatchNorm1d(after)] if norm else []) + [activation()]
    return nn.Sequential(*parts)


class Prototypes(nn.Module):
    """Cosine similarities to K learned directions: a linear map of unit rows, without bias, of unit vectors (the
    weight-normalised last layer of frozen gain of DINO; the prototypes of SwAV and MSN)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """(..., D) of any length to similarities (..., K) in [-1, 1]; `frozen`: the directions get gradients of zero."""
        weight = self.weight.detach() + 0 * self.weight if frozen else self.weight
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 cosines over a temperature of 0.04 are off by 0.1
            return F.linear(
                l2_normalize(x), _NormalizedRows.apply(weight.to(torch.promote_types(weight.dtype, torch.float32)))
            )


class PrototypeHead(nn.Module):
    """DINO's head (Caron et al., 2021, section 3.1 and appendix C): three linear maps with GELU and no batch norm, to
    unit vectors of `bottleneck` channels, compared with `count` prototypes. Weights truncated normal of deviation 0.02."""

    def __init__(self, dim: int, hidden: int, bottleneck: int, count: int) -> None:
        super().__init__()
        self.mlp = mlp((dim, hidden, hidden, bottleneck), norm=False, activation=nn.GELU)
        for part in self.mlp:
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        self.prototypes = Prototypes(bottleneck, count)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """(..., D) to similarities (..., K); `frozen`: the prototypes do not learn in this step."""
        return self.prototypes(self.mlp(x), frozen)


def l2_normalize(x: Tensor) -> Tensor:
    """Vectors (..., D) scaled to length 1, float32 (or wider)."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class _NormalizedRows(torch.autograd.Function):
    """`l2_normalize` of a large table (K, D): one pass over it forward and one backward, where autograd makes nine."""

    @staticmethod
    def forward(ctx: Any, table: Tensor) -> Tensor:
        directions = memory.empty(*table.shape, dtype=table.dtype, device=table.device)
        inverse = torch.linalg.vector_norm(table, dim=1, keepdim=True).clamp_min_(1e-12).reciprocal_()
        torch.mul(table, inverse, out=directions)
        ctx.save_for_backward(directions, inverse)
        return directions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # d unit(w) / dw takes away what lies along w: (g - <g, u> u) / |w|
        directions, inverse = ctx.saved_tensors
        out = memory.empty(*directions.shape, dtype=directions.dtype, device=directions.device)
        count, width = directions.shape
        for rows in memory.in_cache(count, width, directions.device):
            u, g = directions[rows], gradient[rows]
            along = (u * g).sum(1, keepdim=True)
            torch.addcmul(g, u, along, value=-1, out=out[rows]).mul_(inverse[rows])
        return out
