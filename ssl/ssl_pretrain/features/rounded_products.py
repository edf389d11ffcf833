"""Products of rows in bfloat16, and a bound on how far each is from the exact one: CPUs with such arithmetic take them
in a quarter of the time. Shapes: Q queries, N rows, D channels.

With a centre m, x . y = (x - m) . (y - m) + m . x + m . y - m . m. What features share is the most of them, and does not
tell them apart; without it the numbers to round are small, and so are the errors. The term of the row goes through the
same product as three more channels, the one of the query is added to the bar instead.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = 2.0**-8  # half the distance of two neighbouring bfloat16, relative


@dataclass(frozen=True)
class Queries:
    """The left side of a product."""

    values: Tensor  # (Q, D + 3) bfloat16
    length: Tensor  # (Q,) of the rows less the centre
    lost: Tensor  # (Q,) length of what rounding changed
    base: Tensor  # (Q,) what the product lacks


@dataclass(frozen=True)
class Rows:
    """The right side of a product."""

    values: Tensor  # (N, D + 3) bfloat16
    length: Tensor  # () the greatest, after rounding
    lost: Tensor  # () the greatest
    base: Tensor  # () what the product lacks
    offset: Tensor  # () the greatest of the terms in the last three channels


def queries(rows: Tensor, centre: Tensor) -> Queries:
    """Of rows (Q, D) float32."""
    less = rows - centre
    values = less.new_ones(len(less), less.shape[1] + 3, dtype=torch.bfloat16)
    values[:, :-3] = less
    lost = torch.linalg.vector_norm(less - values[:, :-3], dim=1)
    return Queries(values, torch.linalg.vector_norm(less, dim=1), lost, rows @ centre - centre @ centre)


def rows(rows: Tensor, centre: Tensor) -> Rows:
    """Of rows (N, D) float32."""
    less = rows - centre
    values = torch.empty(len(less), less.shape[1] + 3, dtype=torch.bfloat16, device=less.device)
    values[:, :-3] = less
    terms = rows @ centre
    base = terms.mean()
    terms -= base
    offset = terms.abs().amax()
    for channel in (-3, -2, -1):  # three times eight bits are a float32's
        values[:, channel] = terms
        terms = terms - values[:, channel]
    kept = values[:, :-3].float()
    length, lost = (torch.linalg.vector_norm(x, dim=1).amax() for x in (kept, less - kept))
    return Rows(values, length, lost, base, offset)


def least(product: Tensor, queries: Queries, rows: Rows) -> Tensor:
    """The least (Q,) that elements `product` (Q,) of `queries.values @ rows.values.T` can stand for, and just so the
    least that can stand for these: the exact products are those plus `queries.base + rows.base`, and their error is at
    most |x - m| times what rounding took from y, plus what it took from x times |y - m| (Cauchy and Schwarz), plus the
    rounding of float32 sums, plus that of the outcome to bfloat16."""
    width = queries.values.shape[1]
    sums = width * 2.0**-23 * ((queries.length + queries.lost) * rows.length + rows.offset) + 1e-6
    slack = queries.length * rows.lost + queries.lost * rows.length + sums
    return product - 1.02 * slack - 1.02 * UNIT * product.abs()
