"""Mask units of an encoder and the patches in them. On a plain ViT a unit is a patch, and all of this changes nothing.

Shapes: B images, U units on a (u, v) grid, a x b patches a unit, N = U * a * b patches on a (u * a, v * b) grid, K units of
each image.
"""

import torch
from torch import Tensor

from ..backbones.backbone import Backbone
from ..errors import UserError


def unit_grid(encoder: Backbone, size: tuple[int, int]) -> tuple[int, int]:
    """Units (down, right) of images of `size` (H, W) pixels. Raises UserError if the image is no whole number of units,
    where a unit is several patches."""
    grid = (size[0] // encoder.unit[0], size[1] // encoder.unit[1])
    whole = tuple(count * side for count, side in zip(grid, encoder.unit, strict=True)) == tuple(size)
    if encoder.unit != encoder.stride and not whole:
        raise UserError(
            f"images of {size[0]} x {size[1]} pixels (height x width) do not divide into the encoder's mask units of "
            f"{encoder.unit[0]} x {encoder.unit[1]} pixels: use another --image-size"
        )
    return grid


def patches_a_unit(encoder: Backbone) -> tuple[int, int]:
    """Patches (a, b) down and right of a unit."""
    return encoder.unit[0] // encoder.stride[0], encoder.unit[1] // encoder.stride[1]


def patches_of(units: Tensor, encoder: Backbone, grid: tuple[int, int]) -> Tensor:
    """Indices (B, K * a * b) of the patches in units (B, K), int64, in raster order of the patches' grid: unit after unit,
    in raster order within a unit. grid: the units' (u, v)."""
    down, right = patches_a_unit(encoder)
    if (down, right) == (1, 1):
        return units
    row, column = units // grid[1], units % grid[1]
    i = torch.arange(down, device=units.device)[:, None]
    j = torch.arange(right, device=units.device)
    rows = row[:, :, None, None] * down + i
    columns = column[:, :, None, None] * right + j
    return (rows * (grid[1] * right) + columns).flatten(1)


def mask_of_patches(mask: Tensor, encoder: Backbone, grid: tuple[int, int]) -> Tensor:
    """A mask of units (B, U) as one of patches (B, N), in raster order. grid: the units' (u, v)."""
    down, right = patches_a_unit(encoder)
    if (down, right) == (1, 1):
        return mask
    return mask.unflatten(1, grid).repeat_interleave(down, 1).repeat_interleave(right, 2).flatten(1)
