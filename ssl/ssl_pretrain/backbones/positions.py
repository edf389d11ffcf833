"""Positions of patches: fixed sine-cosine tables, resizing of tables to another grid, rotary and relative positions.

Shapes: (h, w) grid of patches, N = h * w in raster order, D channels, d channels of an attention head, B images, P prefix
tokens, L tokens (P + N, or P + the number of kept patches).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..randomness import numpy_generator

ROPE_BASE = 100.0  # DINOv3's longest period, in units of half an image side


def sincos_table(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed two-dimensional sine-cosine positions as MAE released them (He et al., 2022, appendix A.1).

    The first half of the channels encodes the column x, the second the row y; each half is [sin(x w_k) | cos(x w_k)]
    with w_k = 10000^(-k / (D / 4)). Returns (N, D) float32, computed in float64. Raises ValueError unless 4 divides
    dim.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a multiple of 4 channels, not {dim}")
    quarter = dim // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * frequency for n in grid)
    h, w = grid
    x = torch.cat([columns.sin(), columns.cos()], dim=1).expand(h, w, 2 * quarter)
    y = torch.cat([rows.sin(), rows.cos()], dim=1)[:, None].expand(h, w, 2 * quarter)
    return torch.cat([x, y], dim=2).reshape(h * w, dim).float()


def patch_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """The grid (h, w) of patches of an image of height x width pixels. Raises UserError unless they divide it."""
    if height % patch or width % patch or height < patch or width < patch:
        fits = [max(patch, round(side / patch) * patch) for side in (height, width)]
        raise UserError(
            f"images of {height} x {width} pixels (height x width) do not divide into patches of {patch} x {patch}: "
            f"use --image-size {fits[0]} {fits[1]} or another --patch-size"
        )
    return height // patch, width // patch


def fixed(grid: tuple[int, int]) -> bool:
    """Whether a grid is two numbers. torch.export for images of any size makes it two symbols: comparing one with a
    number would limit the program to sizes with that answer."""
    return not any(isinstance(side, torch.SymInt) for side in grid)


def resize_table(table: Tensor, grid: tuple[int, int], to: tuple[int, int], *, antialias: bool = False) -> Tensor:
    """A table (1, N, D) resized from one grid to another, bicubic, in the table's dtype. The same tensor is returned if
    the grids are the same. antialias: along an axis that becomes shorter, each position is a mean over all that it
    replaces.

    It uses two products with matrices of bicubic weights, because the backward pass of `interpolate` is not
    deterministic on an accelerator.
    """
    if fixed(to) and to == grid:
        return table
    with torch.autocast(table.device.type, enabled=False):
        rows, columns = (_bicubic(old, new, table, antialias and new < old) for old, new in zip(grid, to, strict=True))
        resized = torch.einsum("ih,jw,hwd->ijd", rows, columns, table.unflatten(1, grid)[0])
    return resized.flatten(0, 1)[None]


def _bicubic(old: int, new: int, like: Tensor, antialias: bool = False) -> Tensor:
    """The matrix (new, old) of bicubic interpolation along one axis."""
    unit = torch.eye(old, dtype=like.dtype, device=like.device)[None, None]
    return F.interpolate(unit, size=(new, old), mode="bicubic", align_corners=False, antialias=antialias)[0, 0]


Change = tuple[
    tuple[float, float], tuple[float, float]
]  # (shift, factor) of the rows' coordinates, and of the columns'


def augmented(
    key: int, grid: tuple[int, int], shift: float | None, jitter: float | None, rescale: float | None
) -> Change | None:
    """How coordinates change in a training step (DINOv3's augmentation of coordinates): on each axis they are shifted by
    U(-shift, shift), then multiplied by a log-uniform factor in [1 / jitter, jitter], and both by one in [1 / rescale,
    rescale]. The draw depends on the key of the step and on the grid only; images of one size have the same one. None: no
    change."""
    if shift is None and jitter is None and rescale is None:
        return None
    draw = numpy_generator(key, "rope", *map(int, grid)).uniform(-1.0, 1.0, 5).tolist()
    both = (rescale or 1.0) ** draw[4]
    down, right = (((shift or 0.0) * draw[i], (jitter or 1.0) ** draw[2 + i] * both) for i in range(2))
    return down, right


def rope_angles(
    grid: tuple[int, int], head_dim: int, device: torch.device | str | None = None, change: Change | None = None
) -> Tensor:
    """Angles of axial rotary positions (DINOv3: Siméoni et al., 2025, section 3.2), (N, d / 2) float32, radians.

    Patch centres are normalised to [-1, 1] on each axis separately. The first d / 4 angles are 2 pi y / period_k of the
    row, the others of the column, period_k = 100^(k / (d / 4)). change: of the coordinates in training. Raises ValueError
    unless 4 divides head_dim.
    """
    if head_dim % 4:
        raise ValueError(f"rotary positions need a multiple of 4 channels a head, not {head_dim}")
    quarter = head_dim // 4
    period = ROPE_BASE ** (torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    at = [(2 * torch.arange(n, dtype=torch.float32, device=device) + 1) / n - 1 for n in grid]
    if change is not None:
        at = [(each + shift) * factor for each, (shift, factor) in zip(at, change, strict=True)]
    y, x = (2 * torch.pi * each[:, None] / period for each in at)
    h, w = grid
    return torch.cat([y[:, None].expand(h, w, quarter), x.expand(h, w, quarter)], dim=2).flatten(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels (i, i + d/2) of x (..., L, d) by the angle with the given cosine and sine
    (..., L, d / 2); computed in float32, returned in the dtype of x."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


@dataclass(frozen=True)
class Offsets:
    """Offset between each query and each key, for a learned score of every offset (BEiT: Bao et al., 2022, in the form
    of its released tables).

    A table (R, heads) has a row for each offset (query minus key) of two patches of its grid, image rows before
    columns: R = (2h - 1)(2w - 1). Prefix tokens have no position and add three rows: for a prefix token that attends to
    a patch, for a patch that attends to a prefix token, and for two prefix tokens.
    """

    rows: Tensor  # (1 or B, L, L) int64, of the table of `grid`
    trained: tuple[int, int]  # the grid that the tables are for
    grid: tuple[int, int]

    @staticmethod
    def count(grid: tuple[int, int], prefix: int) -> int:
        """R, the number of rows of a table for this grid."""
        return (2 * grid[0] - 1) * (2 * grid[1] - 1) + (3 if prefix else 0)

    @classmethod
    def of(
        cls,
        trained: tuple[int, int],
        grid: tuple[int, int],
        prefix: int,
        keep: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> "Offsets":
        """Offsets for images of `grid` patches after `prefix` tokens; keep: (B, K) int64, indices of the kept
        patches."""
        (h, w), count = grid, prefix + grid[0] * grid[1]
        row = torch.arange(h, device=device)[:, None].expand(h, w).flatten()
        column = torch.arange(w, device=device).expand(h, w).flatten()
        down, right = row[:, None] - row, column[:, None] - column
        between = (down + h - 1) * (2 * w - 1) + right + w - 1  # (N, N)
        first = cls.count(grid, 0)
        rows = torch.full((count, count), first + 2, device=device)
        rows[:prefix, prefix:] = first
        rows[prefix:, :prefix] = first + 1
        rows[prefix:, prefix:] = between
        if keep is None:
            return cls(rows[None], trained, grid)
        index = torch.cat([torch.arange(prefix, device=device).expand(len(keep), -1), keep + prefix], dim=1)
        return cls(rows[index[:, :, None], index[:, None, :]], trained, grid)

    def scores(self, table: Tensor) -> Tensor:
        """The scores that a table (R, heads) of the trained grid adds to those of queries and keys: (1 or B, heads, L,
        L)."""
        return F.embedding(self.rows, resize_offsets(table, self.trained, self.grid)).movedim(-1, 1)


def resize_offsets(table: Tensor, grid: tuple[int, int], to: tuple[int, int], *, antialias: bool = False) -> Tensor:
    """A table (R, heads) of relative positions (`Offsets`) resized from one grid to another, as in `resize_table`: an
    offset is the same share of the image before and after. The rows of prefix tokens do not change."""
    if fixed(to) and to == grid:
        return table
    count = Offsets.count(grid, 0)
    sides, new = ((2 * h - 1, 2 * w - 1) for h, w in (grid, to))
    return torch.cat([resize_table(table[None, :count], sides, new, antialias=antialias)[0], table[count:]])
