"""Sinkhorn-Knopp: assignments that use all prototypes equally. Shapes: B vectors of this process, K prototypes."""

import torch
from torch import Tensor

from .. import memory
from ..distributed import all_reduce_

NOTHING = -1e30  # below every logit, but finite: minus infinity minus itself is NaN


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3, counted: Tensor | None = None) -> Tensor:
    """Distributions over the prototypes (B, K), float32, whose sums over the global batch are nearly equal (Caron et al.,
    "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", 2020, section 3.1).

    logits: (B, K) of any magnitude; `temperature` is the paper's epsilon. counted: (B,) bool, rows that take part; the
    others (padding) give zeros. Adding a constant to the logits does not change the result, and nothing overflows: the
    divisors of the columns are stored as logarithms, one number each, and the table is only read.
    """
    count, width = logits.shape
    slices = memory.in_cache(count, width, logits.device)
    weights = torch.ones(count, device=logits.device) if counted is None else counted.float()

    def scaled(rows: slice, less: Tensor) -> Tensor:
        return torch.add(-less, logits[rows].float(), alpha=1 / temperature)

    # The first division of the columns, whose sums can have any magnitude.
    absent = weights.log()[:, None]  # minus infinity for rows that do not count
    top = torch.full((width,), NOTHING, device=logits.device)
    total = torch.zeros_like(top)
    for rows in slices:
        x = scaled(rows, -absent[rows])
        higher = torch.maximum(top, x.amax(0))
        total.mul_((top - higher).exp_()).add_(x.sub_(higher).exp_().sum(0))
        top = higher
    highest = all_reduce_(top.clone(), "max")
    columns = all_reduce_(total.mul_((top - highest).exp_())).log_().add_(highest)

    # From here on a column's sum is 1 before the rows are divided, by at most K: so values are never too small.
    for _ in range(iterations - 1):
        sums = torch.zeros_like(columns)
        for rows in slices:
            sums.addmv_(torch.softmax(scaled(rows, columns), dim=1).T, weights[rows])
        columns += all_reduce_(sums).log_()

    found = memory.empty(count, width, dtype=torch.float32, device=logits.device)
    for rows in slices:
        torch.softmax(scaled(rows, columns), dim=1, out=found[rows])
    return found if counted is None else found.masked_fill_(~counted[:, None], 0)
