"""Heads: the layers between an encoder's vectors and a loss. They are discarded after training.

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
    """Linear layers with the given `widths` (in, hidden ..., out). All except the last are followed by batch norm (if
    `norm`) and the activation. A linear layer before a batch norm has no bias, because the norm would remove it.

    last_norm: batch norm after the last layer, "affine" with a learned gain and shift, "plain" without.
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
    """Cosine similarities to K learned directions: a linear layer without bias whose rows and inputs are unit vectors
    (DINO's weight-normalised last layer with frozen gain; the prototypes of SwAV and MSN). With `gain` each direction has
    a learned factor, 1 at the start (`norm_last_layer false` of DINO and iBOT)."""

    def __init__(self, dim: int, count: int, *, gain: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))
        self.gain = nn.Parameter(torch.ones(count, 1)) if gain else None  # (K, 1) as released: so weight decay takes it
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Vectors (..., D) of any norm to similarities (..., K) in [-1, 1], times the gain where there is one;
        `frozen`: the directions and the gain get zero gradients."""
        weight = self.weight.detach() + 0 * self.weight if frozen else self.weight
        with torch.autocast(x.device.type, enabled=False):  # errors of bfloat16 cosines / 0.04 reach 0.1
            cosines = F.linear(
                l2_normalize(x), _NormalizedRows.apply(weight.to(torch.promote_types(weight.dtype, torch.float32)))
            )
            if self.gain is None:
                return cosines
            gain = self.gain.detach() + 0 * self.gain if frozen else self.gain
            return cosines * gain[:, 0]


class PrototypeHead(nn.Module):
    """DINO's head (Caron et al., 2021, section 3.1 and appendix C): three linear layers with GELU and without batch
    norm, to unit vectors of `bottleneck` channels, which are compared with `count` prototypes (their lengths are learned
    with `gain`). Weights: truncated normal with standard deviation 0.02."""

    def __init__(self, dim: int, hidden: int, bottleneck: int, count: int, *, gain: bool = False) -> None:
        super().__init__()
        self.mlp = mlp((dim, hidden, hidden, bottleneck), norm=False, activation=nn.GELU)
        for part in self.mlp:
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        self.prototypes = Prototypes(bottleneck, count, gain=gain)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Vectors (..., D) to similarities (..., K); `frozen`: the prototypes are not trained in this step."""
        return self.prototypes(self.mlp(x), frozen)


def l2_normalize(x: Tensor) -> Tensor:
    """Vectors (..., D) scaled to length 1, float32 (or wider)."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class _NormalizedRows(torch.autograd.Function):
    """`l2_normalize` of a large table (K, D) with one pass over it forward and one backward; autograd needs nine."""

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
        # The gradient of the normalisation removes the component along w: (g - <g, u> u) / |w|
        directions, inverse = ctx.saved_tensors
        out = memory.empty(*directions.shape, dtype=directions.dtype, device=directions.device)
        count, width = directions.shape
        for rows in memory.in_cache(count, width, directions.device):
            u, g = directions[rows], gradient[rows]
            along = (u * g).sum(1, keepdim=True)
            torch.addcmul(g, u, along, value=-1, out=out[rows]).mul_(inverse[rows])
        return out
