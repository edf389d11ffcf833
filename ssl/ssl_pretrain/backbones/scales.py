"""Residual quantisation of a map over several scales (VAR; Tian et al., "Visual Autoregressive Modeling", NeurIPS 2024,
section 3.2): the coarsest map is quantised first, and each finer one gets what the coarser ones leave.

Shapes: B images, (h, w) the grid of the finest scale, N = h * w, S scales, n places of one scale, L of all, K codes of d
channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .nearest_codes import nearest, without_autocast

MIXERS = 4  # convolutions that the scales share
MOST = 2**12  # cells along a side that a description may ask for
RATIO = 0.5  # of a convolution's output in what is added to the map
Grid = tuple[int, int]


@dataclass(frozen=True)
class Levels:
    """A map as ids of several scales: `ids` (B, L) int64, the coarsest scale first, each in raster order; `residuals`
    (B, L, d), the vectors that they stand for, without gradients; `sums` (S, B, N, d), the map after each scale, with
    gradients for codes and convolutions."""

    ids: Tensor
    residuals: Tensor
    sums: Tensor


@final
class Scales(nn.Module):
    """The scales of a quantizer, and the convolutions after up-sampling, each of which serves neighbouring scales.

    Attributes: `sides`: cells of each scale along a grid whose finest one has the last of them.
    """

    def __init__(self, sides: Sequence[int], width: int) -> None:
        super().__init__()
        self.sides = tuple(sides)
        count = min(MIXERS, len(self.sides))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(count))
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.dirac_(conv.weight)  # changes nothing, so that the codes begin as parts of the map
            nn.init.zeros_(conv.bias)
        ticks = torch.linspace(1 / (3 * count), 1 - 1 / (3 * count), count, dtype=torch.float64)
        places = torch.arange(len(self.sides), dtype=torch.float64) / max(1, len(self.sides) - 1)
        self._conv_of = (places[:, None] - ticks).abs().argmin(1).tolist()

    def shapes(self, grid: Grid) -> tuple[Grid, ...]:
        """The grid of each scale; the last one is `grid`."""
        return grids_of(self.sides, grid)

    def forward(self, z: Tensor, grid: Grid, codes: Tensor, started: Tensor | None = None) -> Levels:
        """Quantise vectors (B, N, d) on a grid with codes (K, d). started: () bool; where it is false, each vector takes
        the place of its code, so that residuals are those of codes without error. The maps get no gradient from z."""
        with without_autocast(z.device):
            rest = z.detach().mT.unflatten(2, grid)
            total = torch.zeros_like(rest)
            ids, residuals, sums = [], [], []
            for i, shape in enumerate(self.shapes(grid)):
                small = resampled(rest, shape, "area").flatten(2).mT
                found = nearest(small, codes.detach().to(small.dtype))
                vectors = F.embedding(found, codes.to(small.dtype))
                vectors = vectors if started is None else torch.where(started, vectors, small)
                added = self._added(i, vectors, shape, grid)
                total, rest = total + added, rest - added.detach()
                ids.append(found)
                residuals.append(small)
                sums.append(total.flatten(2).mT)
            return Levels(torch.cat(ids, 1), torch.cat(residuals, 1), torch.stack(sums))

    def lookup(self, ids: Tensor, grid: Grid, codes: Tensor) -> Tensor:
        """`Levels.sums` (S, B, N, d) of ids (B, L)."""
        shapes, sums = self.shapes(grid), []
        total: Tensor | None = None
        for i, (shape, own) in enumerate(zip(shapes, ids.split([h * w for h, w in shapes], dim=1), strict=True)):
            added = self._added(i, F.embedding(own, codes), shape, grid)
            total = added if total is None else total + added
            sums.append(total.flatten(2).mT)
        return torch.stack(sums)

    def _added(self, scale: int, vectors: Tensor, shape: Grid, grid: Grid) -> Tensor:
        """What the vectors (B, n, d) of a scale add to the map, (B, d, h, w)."""
        large = resampled(vectors.mT.unflatten(2, shape), grid, "bicubic")
        conv = self.convs[self._conv_of[scale]]
        assert isinstance(conv, nn.Conv2d)
        assert conv.bias is not None
        mixed = F.conv2d(large, conv.weight.to(large.dtype), conv.bias.to(large.dtype), padding=1)
        return (1 - RATIO) * large + RATIO * mixed


def grids_of(sides: Sequence[int], grid: Grid) -> tuple[Grid, ...]:
    """The grid of each scale of these sides, whose finest one is `grid`."""
    zooms = [side / sides[-1] for side in sides[:-1]]
    coarser = [[max(1, int(side * zoom + 0.5)) for side in grid] for zoom in zooms]
    return (*((rows, columns) for rows, columns in coarser), grid)


def read_scales(described: Mapping[str, Any]) -> tuple[int, ...]:
    """The scales of a quantizer's description; () for one scale. Raises ValueError for what are none."""
    sides = described.get("scales", [])
    if not isinstance(sides, list) or not all(isinstance(side, int) and 0 < side <= MOST for side in sides):
        raise ValueError(f"scales are {sides!r}")
    if sides != sorted(set(sides)) or len(sides) == 1:
        raise ValueError(f"scales are {sides!r}, not several ascending numbers")
    return tuple(sides)


def resampled(maps: Tensor, to: Grid, mode: Literal["area", "bicubic"]) -> Tensor:
    """Maps (B, d, h, w) on another grid: means over areas, or bicubic. Unchanged where both grids are equal. By products
    with matrices, because the backward pass of `interpolate` is not deterministic on an accelerator."""
    grid = (maps.shape[2], maps.shape[3])
    if grid == to:
        return maps
    rows, columns = (_matrix(old, new, mode, maps) for old, new in zip(grid, to, strict=True))
    return torch.einsum("ih,jw,bdhw->bdij", rows, columns, maps)


def _matrix(old: int, new: int, mode: Literal["area", "bicubic"], like: Tensor) -> Tensor:
    """The matrix (new, old) that resamples along one axis."""
    unit = torch.eye(old, dtype=like.dtype, device=like.device)[None, None]
    corners = {} if mode == "area" else {"align_corners": False}
    return F.interpolate(unit, size=(new, old), mode=mode, **corners)[0, 0]
