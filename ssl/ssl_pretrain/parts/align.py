"""Features of one view at the positions of another view of the same image.

Shapes: B images, (h, w) the map's cells, D features a cell, N points. Points are (row, column) as shares of a view in [0,
1]: the centre of cell i of n is (i + 0.5) / n. Geometry is (B, 6), as in `data.batch.Batch`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.views import from_image, to_image


def cell_centres(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """The centres of the cells of a grid (h, w), in raster order: float32 (h * w, 2)."""
    rows, columns = ((torch.arange(n, device=device) + 0.5) / n for n in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear samples of maps (B, h, w, D) at points (B, N, 2): float32 (B, N, D). Beyond the outer cells' centres the
    border's values hold."""
    where = (2 * points.float() - 1).flip(-1).unsqueeze(1)  # grid_sample wants (x, y) in [-1, 1]
    values = maps.float().permute(0, 3, 1, 2)
    found = F.grid_sample(values, where, mode="bilinear", padding_mode="border", align_corners=False)
    return found[:, :, 0].mT


def aligned(maps: Tensor, own: Tensor, other: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What a view's map shows at the cells of another view.

    maps: (B, h, w, D) of the view with the geometry `own`. other: the geometry of the view whose `grid` of cells is asked
    for. Flips of both axes and of both views are undone. Returns float32 (B, N, D) with N cells of `grid` in raster order,
    and bool (B, N): whether the cell's centre lies inside the view.
    """
    centres = cell_centres(grid, maps.device).expand(len(maps), -1, -1)
    points = from_image(to_image(centres, other), own)
    inside = ((points >= 0) & (points <= 1)).all(-1)
    return sample(maps, points), inside


def resized(
    tokens: Tensor, grid: tuple[int, int], to: tuple[int, int], mode: Literal["bicubic", "bilinear"] = "bicubic"
) -> Tensor:
    """Patch tokens (B, h * w, D) of a grid (h, w) as those of another grid: (B, h' * w', D). Without antialiasing; bicubic
    as DINOv3 matches a Gram teacher's map to the student's grid. Unchanged where both are equal."""
    if grid == to:
        return tokens
    maps = tokens.mT.unflatten(2, grid).float()
    return F.interpolate(maps, size=to, mode=mode, align_corners=False).flatten(2).mT.to(tokens.dtype)
