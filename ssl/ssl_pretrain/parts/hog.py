"""Histograms of oriented gradients as a target, as MaskFeat computes them (Wei et al., "Masked Feature Prediction for
Self-Supervised Visual Pre-Training", CVPR 2022, section 3.3).

Shapes: B images, C channels, H x W pixels, c pixels a cell side, p pixels a patch side.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 9  # of 20 degrees each; gradients of opposite directions share a bin


def hog(images: Tensor, patch: tuple[int, int], cell: int) -> Tensor:
    """One vector for each patch of images (B, C, H, W): float32 (B, N, C * 9 * cells a patch).

    Each channel by itself: gradients by the 3 x 3 Sobel filters on the image mirrored at its border; their magnitudes are
    summed over cells of `cell` pixels into the bin of their direction, without interpolation; each cell's nine sums get
    length 1 (a flat cell stays 0). A patch has the values of its cells: channel first, then bin, then cell in raster order.
    `cell` must divide both sides of a patch.
    """
    x = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").flatten(0, 1)  # (B * C, H + 2, W + 2)
    # Left minus right and top minus bottom, then smoothed along the other axis. In this order the gradient across the
    # mirrored border is exactly 0, and not a rounding error with a direction of its own.
    across, down = x[:, :, :-2] - x[:, :, 2:], x[:, :-2] - x[:, 2:]
    gx = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    gy = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    magnitude = torch.sqrt(gx.square() + gy.square())
    # The angle is measured from the vertical: atan2(gx, gy).
    bins = torch.floor(torch.atan2(gx, gy) / math.pi * BINS).long() % BINS
    histogram = magnitude.new_zeros(len(magnitude), BINS, *magnitude.shape[1:])
    histogram.scatter_(1, bins.unsqueeze(1), magnitude.unsqueeze(1))
    cells = F.normalize(F.avg_pool2d(histogram, cell) * cell * cell, dim=1)  # (B * C, 9, H / c, W / c)
    cells = cells.unflatten(0, images.shape[:2]).flatten(1, 2)  # (B, C * 9, H / c, W / c)
    inside = patch[0] // cell, patch[1] // cell
    return F.unfold(cells, inside, stride=inside).mT


def values(channels: int, patch: tuple[int, int], cell: int) -> int:
    """How many values `hog` gives for a patch."""
    return channels * BINS * (patch[0] // cell) * (patch[1] // cell)
