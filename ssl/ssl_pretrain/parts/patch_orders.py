"""Orders in which patches can be read, for methods to which the order matters (compared by Kutscher et al., "REOrdering
Patches Improves Vision Models", 2025). Shapes: N patches on an (h, w) grid. An order is (N,) int64: indices of patches in
raster order, the first to be read first."""

import functools
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

Order = Literal["row", "column", "snake", "diagonal", "spiral", "hilbert"]
ORDERS: tuple[str, ...] = get_args(Order)

Place = tuple[int, int]  # row and column


@functools.lru_cache(maxsize=64)
def patch_order(name: str, grid: tuple[int, int]) -> Tensor:
    """The order of that name (of `ORDERS`), (N,) int64.

    row: raster order. column: by columns. snake: rows, every second one from right to left. diagonal: diagonals from the
    top left corner, each upwards. spiral: from the top left corner around the border and inwards. hilbert: along a Hilbert
    curve of the next power of 2, without the places that are not in the grid. Raises ValueError for another name.
    """
    makers = {
        "row": _rows,
        "column": lambda h, w: ((i, j) for j in range(w) for i in range(h)),
        "snake": lambda h, w: ((i, j if i % 2 == 0 else w - 1 - j) for i in range(h) for j in range(w)),
        "diagonal": lambda h, w: sorted(_rows(h, w), key=lambda at: (at[0] + at[1], at[1])),
        "spiral": _spiral,
        "hilbert": _hilbert,
    }
    if name not in makers:
        raise ValueError(f"{name!r} is no order of patches; there are {', '.join(ORDERS)}")
    h, w = grid
    return torch.tensor([i * w + j for i, j in makers[name](h, w)])


def _rows(h: int, w: int) -> Iterator[Place]:
    return ((i, j) for i in range(h) for j in range(w))


def _spiral(h: int, w: int) -> Iterator[Place]:
    top, left, bottom, right = 0, 0, h - 1, w - 1
    while top <= bottom and left <= right:
        yield from ((top, j) for j in range(left, right + 1))
        yield from ((i, right) for i in range(top + 1, bottom + 1))
        if top < bottom:
            yield from ((bottom, j) for j in range(right - 1, left - 1, -1))
        if left < right:
            yield from ((i, left) for i in range(bottom - 1, top, -1))
        top, left, bottom, right = top + 1, left + 1, bottom - 1, right - 1


def _hilbert(h: int, w: int) -> Iterator[Place]:
    side = 1 << (max(h, w) - 1).bit_length()
    for index in range(side * side):
        row = column = 0
        size, rest = 1, index
        while size < side:  # from the smallest square to the whole one
            across, down = 1 & (rest // 2), 1 & (rest ^ (rest // 2))
            if down == 0:
                if across == 1:
                    row, column = size - 1 - row, size - 1 - column
                row, column = column, row
            column, row = column + size * across, row + size * down
            rest, size = rest // 4, size * 2
        if row < h and column < w:
            yield row, column
