"""Distance correlation (Szekely, Rizzo & Bakirov, "Measuring and testing dependence by correlation of distances", Annals of
Statistics 2007): how strongly two vectors of each sample depend on one another, linearly or not, whatever their widths.

It is 0 only for independent vectors, in the limit of many samples, and 1 for vectors that are equal up to a scale, a shift
and a rotation. Shapes: N samples, D floats of a vector.
"""

import torch
from torch import Tensor

TINY = 1e-8  # smallest squared distance, and smallest correlation under a root: their roots have finite gradients
LEAST = 4  # samples that `unbiased` needs


def distances(rows: Tensor) -> Tensor:
    """Euclidean distances (N, N), float32 or wider, of rows (N, D). The diagonal is 0, and so is a square below 1e-8."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    with torch.autocast(rows.device.type, enabled=False):
        rows = rows - rows.mean(0)  # differences of large squares would lose what is small
        squares = rows.square().sum(1)
        squared = squares[:, None] + squares - 2 * (rows @ rows.T)
    # What is below is 0, and not the bound: equal distances of all pairs would be a structure that correlates with others.
    distinct = (squared > TINY) & ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return torch.where(distinct, squared.clamp_min(TINY).sqrt(), 0.0)


def biased(a: Tensor, b: Tensor) -> Tensor:
    """The distance correlation () in [0, 1] of two matrices of distances (N, N), as a V-statistic: of few samples it is far
    from 0 also for independent vectors. 0 where all vectors of a matrix are equal."""
    a, b = (each - each.mean(0) - each.mean(1, keepdim=True) + each.mean() for each in (a, b))
    return _ratio(a, b).clamp_min(TINY).sqrt()


def unbiased(a: Tensor, b: Tensor) -> Tensor:
    """The bias-corrected square of it () (Szekely & Rizzo, 2013, "The distance correlation t-test of independence in high
    dimension"), by U-centred matrices: its mean is 0 for independent vectors, so it may be below 0. N of at least 4."""
    return _ratio(_u_centred(a), _u_centred(b))


def _u_centred(a: Tensor) -> Tensor:
    n = len(a)
    centred = a - a.sum(0) / (n - 2) - a.sum(1, keepdim=True) / (n - 2) + a.sum() / ((n - 1) * (n - 2))
    return centred * (1 - torch.eye(n, dtype=a.dtype, device=a.device))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """The cosine () of two centred matrices; 0 where one is 0."""
    norms = (a.square().mean() * b.square().mean()).clamp_min(TINY**2).sqrt()
    return (a * b).mean() / norms
