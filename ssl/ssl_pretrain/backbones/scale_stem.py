"""A ViT that reads the ids of several scales of an image, the coarsest first (VAR; Tian et al., "Visual Autoregressive
Modeling", NeurIPS 2024, section 3.3): the input of a scale is the sum of the coarser ones at its size, so a place never
sees its own id.

Shapes: B images, S scales of an (h, w) grid with L places together, d channels of a code, D width of the ViT, P prefix
tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Features
from .scales import Grid, Levels, grids_of, resampled
from .vit import ViT


class ScaleEmbed(nn.Module):
    """Tokens of all scales, in the place of a ViT's patch embedding: a linear layer from the sum of the coarser scales, a
    learned vector for the first one, and a learned vector of each scale."""

    def __init__(self, sides: Sequence[int], width: int, dim: int) -> None:
        super().__init__()
        self.sides, self.width = tuple(sides), width
        self.proj = nn.Linear(width, dim)
        nn.init.normal_(self.proj.weight, std=width**-0.5)
        nn.init.zeros_(self.proj.bias)
        self.start = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.level = nn.Parameter(torch.randn(len(self.sides), dim) * 0.02)

    def forward(self, maps: Tensor, keep: Tensor | None = None) -> Tensor:
        """Maps (B, (S - 1) * d, h, w), the sums up to each scale but the last, to (B, L, D). keep: the places of the tokens
        (`places`), for the ViT; nothing is left out here."""
        grid = (maps.shape[2], maps.shape[3])
        shapes = grids_of(self.sides, grid)
        first = shapes[0][0] * shapes[0][1]
        rows = [(self.start + self.level[0]).expand(len(maps), first, -1)]
        for i, (shape, sums) in enumerate(zip(shapes[1:], maps.split(self.width, dim=1), strict=True), start=1):
            tokens = self.proj(resampled(sums, shape, "area").flatten(2).mT)
            rows.append(tokens + self.level[i].to(tokens.dtype))
        return torch.cat([each.to(rows[-1].dtype) for each in rows], dim=1)


def read_scales_of(vit: ViT, sides: Sequence[int], width: int) -> None:
    """From now on the ViT takes maps (B, (S - 1) * d, h, w) of `sums_of` instead of images, with `places` as `keep` and
    `block_mask` as attention. `image_size` and `stride` stay those of the images."""
    vit.patch_embed = ScaleEmbed(sides, width, vit.dim)  # type: ignore[assignment]
    vit.config, vit.in_chans = replace(vit.config, patch_size=1), (len(sides) - 1) * width


def sums_of(levels: Levels, grid: Grid) -> Tensor:
    """What the ViT reads of ids of all scales: the sums up to each scale but the last, (B, (S - 1) * d, h, w)."""
    sums = levels.sums[:-1].detach()
    return sums.permute(1, 0, 3, 2).flatten(1, 2).unflatten(2, grid).contiguous()


def places(sides: Sequence[int], grid: Grid) -> Tensor:
    """The cell of the grid in which the centre of each place of each scale lies, in raster order: (L,) int64."""
    found = []
    for shape in grids_of(sides, grid):
        rows, columns = (
            ((torch.arange(n, dtype=torch.float64) + 0.5) * whole / n).long()
            for n, whole in zip(shape, grid, strict=True)
        )
        found.append((rows[:, None] * grid[1] + columns).flatten())
    return torch.cat(found)


def block_mask(sides: Sequence[int], grid: Grid, prefix: int) -> Tensor:
    """Attention (1, P + L, P + L) bool: a place sees all places of its own and of coarser scales, and the prefix tokens;
    these see each other."""
    counts = torch.tensor([h * w for h, w in grids_of(sides, grid)])
    level = torch.cat([torch.full((prefix,), -1), torch.arange(len(counts)).repeat_interleave(counts)])
    return (level <= level[:, None])[None]


def reading(vit: ViT, levels: Levels, grid: Grid) -> tuple[Tensor, dict[str, Any]]:
    """The maps and the options of the ViT's forward for ids of all scales."""
    assert isinstance(vit.patch_embed, ScaleEmbed)
    sides, device = vit.patch_embed.sides, levels.ids.device
    where = places(sides, grid).to(device, non_blocking=True)
    mask = block_mask(sides, grid, vit.prefix_tokens).to(device, non_blocking=True)
    return sums_of(levels, grid), {"keep": where.expand(len(levels.ids), -1), "attention": mask}


def by_scale(vit: ViT, levels: Levels, grid: Grid, **options: Any) -> Features:
    """Features of ids of all scales: those of the finest one's places, which see all coarser ones. The ViT pools by their
    mean."""
    maps, how = reading(vit, levels, grid)
    seen = vit(maps, **how, **options)
    prefix, count = vit.prefix_tokens, grid[0] * grid[1]

    def finest(tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, :prefix], tokens[:, -count:]], dim=1)

    patches = seen.patches[:, -count:]
    return replace(
        seen,
        patches=patches,
        pooled=patches.mean(1),
        tokens=None if seen.tokens is None else finest(seen.tokens),
        blocks=tuple(finest(each) for each in seen.blocks),
    )
