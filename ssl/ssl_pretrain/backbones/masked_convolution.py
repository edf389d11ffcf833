"""Convolutional encoders of a part of an image: sparse convolutions, emulated by dense ones (Tian et al., "Designing BERT
for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023, section 3.1).

A map is 0 where the image does not exist. A convolution or a pooling of such a map gives values there, and they are set to
0 again. So at every layer a position is visible if the pixels below it are. Norms have statistics of visible positions
alone: batch norm over the global batch (`distributed.batch_norm`), a global response norm over an image, and a layer norm
over one position.

Shapes: B images, C channels, H x W pixels, U = h * w units on a (h, w) grid in raster order, c channels of a map of Y x X
positions.
"""

import torch
from torch import Tensor

from ..errors import UserError


class Visible:
    """Which units of a batch of images exist, as masks of the maps of an encoder."""

    def __init__(self, units: Tensor) -> None:
        """units: (B, h, w) bool."""
        self.units = units
        self._masks: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def of(cls, images: Tensor, visible: Tensor, unit: tuple[int, int]) -> "Visible":
        """Of `visible` (B, U) bool, as `Backbone.forward` takes it, for images (B, C, H, W) with units of that size. Raises
        UserError if units do not divide the images, and ValueError for another shape of `visible`."""
        height, width = images.shape[-2:]
        if height % unit[0] or width % unit[1]:
            raise UserError(
                f"images of {height} x {width} pixels (height x width) cannot be masked in units of {unit[0]} x {unit[1]}: "
                f"use an --image-size that is a multiple of them"
            )
        grid = (height // unit[0], width // unit[1])
        if visible.shape != (len(images), grid[0] * grid[1]) or visible.dtype != torch.bool:
            raise ValueError(
                f"`visible` must be bool ({len(images)}, {grid[0] * grid[1]}), not {visible.dtype} {tuple(visible.shape)}"
            )
        return cls(visible.unflatten(1, grid))

    def at(self, height: int, width: int) -> Tensor:
        """Which positions of a map of that size exist: (B, 1, Y, X) bool. A side of the map must be a multiple of the
        grid's: all positions of a unit are alike."""
        size = (height, width)
        if size not in self._masks:
            rows, columns = (side // of for side, of in zip(size, self.units.shape[1:], strict=True))
            assert (rows * self.units.shape[1], columns * self.units.shape[2]) == size
            mask = self.units[:, :, None, :, None].expand(-1, -1, rows, -1, columns)
            self._masks[size] = mask.reshape(len(mask), 1, height, width)
        return self._masks[size]

    def only(self, x: Tensor) -> Tensor:
        """A map or images (B, c, Y, X) with 0 where they do not exist, whatever was there."""
        return x.masked_fill(~self.at(x.shape[2], x.shape[3]), 0)

    def count(self, height: int, width: int) -> Tensor:
        """How many positions of a map of that size exist, at least 1: (B, 1) int64."""
        return self.at(height, width).sum((1, 2, 3)).clamp(min=1)[:, None]
