"""A projector by cross-attention from a student's map to a teacher's, after ScaleKD (Fan et al., "ScaleKD: Strong Vision
Transformers Could Be Excellent Teachers", NeurIPS 2024): each place of the teacher's map has a query of its own.

Shapes: B images, D and T channels of the student's and the teacher's maps, N and M places of their grids.
"""

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .align import resized


@final
class QueryProjector(nn.Module):
    """Maps (B, N, D) to (B, M, T). Keys and values: a 3 x 3 convolution with norm and ReLU, and learned positions.
    Queries: learned vectors of the teacher's places, through a linear layer and ReLU. Then an MLP of 4 times the width
    without a residual connection, and a layer norm.

    grid and target_grid: for which the learned positions and queries are made; they are resized to others.
    """

    def __init__(self, dim: int, grid: tuple[int, int], width: int, target_grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.target_grid = grid, target_grid
        self.conv = nn.Conv2d(dim, width, 3, padding=1, bias=False)
        # Layer norm, where ScaleKD has batch norm: so each image is treated by itself, and micro-batches change nothing.
        self.norm = nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.empty(1, math.prod(grid), width))
        self.queries = nn.Parameter(torch.empty(1, math.prod(target_grid), width))
        self.query = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.last = nn.LayerNorm(width)
        for part in (self.positions, self.queries):
            nn.init.trunc_normal_(part, std=0.02)

    def forward(self, patches: Tensor, grid: tuple[int, int], target_grid: tuple[int, int]) -> Tensor:
        """Patches (B, N, D) of the student on `grid` to (B, M, T) on `target_grid`."""
        maps = self.conv(patches.mT.unflatten(2, grid)).flatten(2).mT
        keys = self.norm(maps).relu() + resized(self.positions, self.grid, grid)
        queries = self.query(resized(self.queries, self.target_grid, target_grid)).relu()
        seen = F.scaled_dot_product_attention(queries.to(keys.dtype).expand(len(keys), -1, -1), keys, keys)
        return self.last(self.mlp(seen))
