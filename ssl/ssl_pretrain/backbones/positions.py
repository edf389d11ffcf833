"""Where a patch is: fixed sine-cosine tables, resizing of tables to another grid, rotary positions.

Shapes: (h, w) grid of patches, N = h * w in raster order, D channels, d channels of an attention head, L tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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


def resize_table(table: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """A table (1, N, D) of one grid for another, bicubic without antialiasing, in the table's dtype; the very same
    tensor where the grids are the same.

    As two products with matrices of bicubic weights: the backward of `interpolate` itself does not give the same bits
    twice on an accelerator.
    """
    if to == grid:
        return table
    with torch.autocast(table.device.type, enabled=False):
        rows, columns = (_bicubic(old, new, table) for old, new in zip(grid, to, strict=True))
        resized = torch.einsum("ih,jw,hwd->ijd", rows, columns, table.unflatten(1, grid)[0])
    return resized.flatten(0, 1)[None]


def _bicubic(old: int, new: int, like: Tensor) -> Tensor:
    """The matrix (new, old) of bicubic interpolation along one axis."""
    unit = torch.eye(old, dtype=like.dtype, device=like.device)
    return F.interpolate(unit[None, None], size=(new, old), mode="bicubic", align_corners=False)[0, 0]


def rope_angles(grid: tuple[int, int], head_dim: int, device: torch.device | str | None = None) -> Tensor:
    """Angles of axial rotary positions (DINOv3: Siméoni et al., 2025, section 3.2), (N, d / 2) float32, radians.

    Patch centres are normalised to [-1, 1] on each axis apart. The first d / 4 angles are 2 pi y / period_k of the row,
    the others of the column, period_k = 100^(k / (d / 4)). Raises ValueError unless 4 divides head_dim.
    """
    if head_dim % 4:
        raise ValueError(f"rotary positions need a multiple of 4 channels a head, not {head_dim}")
    quarter = head_dim // 4
    period = ROPE_BASE ** (torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    y, x = (
        2 * torch.pi * ((2 * torch.arange(n, dtype=torch.float32, device=device) + 1) / n - 1)[:, None] / period
        for n in grid
    )
    h, w = grid
    return torch.cat([y[:, None].expand(h, w, quarter), x.expand(h, w, quarter)], dim=2).flatten(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + d/2) of x (..., L, d) by the angle whose cosine and sine (..., L, d / 2) are
    given; in float32, returned in the dtype of x."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
