"""Products of rows in bfloat16, with a bound on the error of each. CPUs with bfloat16 arithmetic compute them in a
quarter of the time. Shapes: Q queries, N rows, D channels.

With a centre m, x . y = (x - m) . (y - m) + m . x + m . y - m . m. The common part of features is the largest part of
them, but does not distinguish them; without it the numbers are small, and so are their rounding errors. The term of the
row is part of the same product as three more channels; the term of the query is added to the threshold instead.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = 2.0**-8  # half the relative distance of two neighbouring bfloat16 numbers


@dataclass(frozen=True)
class Queries:
    """The left side of a product."""

    values: Tensor  # (Q, D + 3) bfloat16
    length: Tensor  # (Q,) norms of rows - centre
    lost: Tensor  # (Q,) norms of the rounding errors
    base: Tensor  # (Q,) the term that the product does not contain


@dataclass(frozen=True)
class Rows:
    """The right side of a product."""

    values: Tensor  # (N, D + 3) bfloat16
    length: Tensor  # () the largest norm after rounding
    lost: Tensor  # () the greatest
    base: Tensor  # () the term that the product does not contain
    offset: Tensor  # () the largest of the terms in the last three channels


def queries(rows: Tensor, centre: Tensor) -> Queries:
    """The left side for rows (Q, D) float32."""
    less = rows - centre
    values = less.new_ones(len(less), less.shape[1] + 3, dtype=torch.bfloat16)
    values[:, :-3] = less
    lost = torch.linalg.vector_norm(less - values[:, :-3], dim=1)
    return Queries(values, torch.linalg.vector_norm(less, dim=1), lost, rows @ centre - centre @ centre)


def rows(rows: Tensor, centre: Tensor) -> Rows:
    """The right side for rows (N, D) float32."""
    less = rows - centre
    values = torch.empty(len(less), less.shape[1] + 3, dtype=torch.bfloat16, device=less.device)
    values[:, :-3] = less
    terms = rows @ centre
    base = terms.mean()
    terms -= base
    offset = terms.abs().amax()
    for channel in (-3, -2, -1):  # three times eight bits are the bits of a float32's mantissa
        values[:, channel] = terms
        terms = terms - values[:, channel]
    kept = values[:, :-3].float()
    length, lost = (torch.linalg.vector_norm(x, dim=1).amax() for x in (kept, less - kept))
    return Rows(values, length, lost, base, offset)


def lower_bound(product: Tensor, queries: Queries, rows: Rows) -> Tensor:
    """The smallest exact value (Q,) of elements `product` (Q,) of `queries.values @ rows.values.T`; and in the same way
    the smallest product for such exact values. Exact products are `product` plus `queries.base + rows.base`. The error
    is at most |x - m| times the rounding error of y, plus the rounding error of x times |y - m| (Cauchy and Schwarz),
    plus the rounding of float32 sums, plus the rounding of the result to bfloat16."""
    width = queries.values.shape[1]
    sums = width * 2.0**-23 * ((queries.length + queries.lost) * rows.length + rows.offset) + 1e-6
    slack = queries.length * rows.lost + queries.lost * rows.length + sums
    return product - 1.02 * slack - 1.02 * UNIT * product.abs()
