"""Sinkhorn-Knopp: assignments that use all prototypes alike. Shapes: B vectors of this process, K prototypes."""

import torch
from torch import Tensor

from ..distributed import all_reduce_


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3, counted: Tensor | None = None) -> Tensor:
    """Distributions over the prototypes (B, K), float32, whose sums over the global batch are nearly equal (Caron et al.,
    "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2020, section 3.1).

    logits: (B, K) of any size; `temperature` is the paper's epsilon. counted: (B,) bool, rows that take part; the others
    (padding) come out as zeros. Works on logarithms, so nothing overflows, and no shift changes the result.
    """
    x = logits.float() / temperature
    if counted is not None:
        x = x.masked_fill(~counted[:, None], -torch.inf)
    for _ in range(iterations):
        top = all_reduce_(x.max(dim=0).values, "max")
        x = x - (all_reduce_((x - top).exp().sum(0)).log() + top)
        x = x - torch.logsumexp(x, dim=1, keepdim=True)
        if counted is not None:  # -inf less -inf
            x = x.masked_fill(~counted[:, None], -torch.inf)
    return x.exp()
