"""Masks made of rectangles (BEiT: Bao et al., 2022, algorithm 1), as in iBOT and the DINOv2 family. They are computed
for a whole batch at once on the device of the noise, with static shapes and without a synchronisation.

Shapes: B masks, N = h * w patches on a grid in raster order, A attempts to place a rectangle, at most M patches in a
mask.
"""

import math

import torch
from torch import Tensor

TRIES = 10  # for one rectangle; if all fail, the mask is not changed any more
ATTEMPTS = 40  # for all rectangles of a mask together; 31 are enough for 999 of 1,000 masks of half of 14 x 14 patches


def block_masks(
    noise: Tensor, grid: tuple[int, int], wanted: Tensor, *, smallest: int, largest: float = math.inf
) -> Tensor:
    """Union of random rectangles with at most `wanted` patches in all: bool (B, N), True where masked.

    Rectangles are placed one after another until `wanted` (B,) patches (any real number from 0) are masked. The area of
    a rectangle is drawn uniformly between `smallest` and the number of patches still wanted (at most `largest`). Its
    ratio of height to width is drawn between 0.3 and 1 / 0.3, uniformly in the logarithm. Its position is random, and
    it is smaller than the grid on both axes. It is accepted if it masks at least one new patch and not more new patches
    than the upper limit of its area. After ten failures in a row the mask stays below `wanted`.

    noise: uniform [0, 1), (B, A, 4); `ATTEMPTS` is a good A. A mask that needs more attempts stays below `wanted`.
    """
    height, width = grid
    ys = torch.arange(height, device=noise.device)[:, None]
    xs = torch.arange(width, device=noise.device)
    wanted = wanted.to(noise.dtype)
    area_noise, shape_noise, top_noise, left_noise = noise.unbind(-1)  # (B, A) each
    stretch = torch.exp((shape_noise - 0.5) * math.log(1 / 0.3))  # square root of the ratio
    masked = torch.zeros(len(noise), height, width, dtype=torch.bool, device=noise.device)
    count = torch.zeros_like(wanted)
    failures = torch.zeros(len(noise), dtype=torch.int64, device=noise.device)
    for a in range(noise.shape[1]):
        most = (wanted - count).clamp(max=largest)
        side = (smallest + (most - smallest) * area_noise[:, a]).clamp_min(0).sqrt()
        h, w = (side * stretch[:, a]).round(), (side / stretch[:, a]).round()
        top = (top_noise[:, a] * (height - h + 1)).floor()
        left = (left_noise[:, a] * (width - w + 1)).floor()
        down = (ys >= top[:, None, None]) & (ys < (top + h)[:, None, None])
        across = (xs >= left[:, None, None]) & (xs < (left + w)[:, None, None])
        fresh = down & across & ~masked
        gain = fresh.sum((1, 2))
        goes_on = (count < wanted) & (failures < TRIES)
        taken = goes_on & (h < height) & (w < width) & (gain > 0) & (gain <= most)
        masked = masked | (fresh & taken[:, None, None])
        count = count + gain * taken
        failures = torch.where(taken, 0, failures + goes_on)
    return masked.flatten(1)


def completed(masks: Tensor, wanted: Tensor, noise: Tensor) -> Tensor:
    """Add random patches to masks (B, N) bool, which have at most `wanted` (B,) patches, until they have exactly
    `wanted` (as DINOv3 does after the rectangles; empty masks become random masks). noise: uniform [0, 1), (B, N)."""
    order = torch.argsort(noise + 1.0 * ~masks, dim=1)  # masked patches come first
    place = torch.argsort(order, dim=1)
    return place < wanted[:, None]


def stratified_ratios(order: Tensor, noise: Tensor, probability: float, ratio: tuple[float, float]) -> Tensor:
    """Masking ratios (R,) for R crops (DINOv2, as released). The range `ratio` is divided into int(R * probability)
    equal strata. Each stratum belongs to one crop, whose ratio is drawn uniformly from it; the other crops have 0.

    order, noise: uniform [0, 1), (R,); `order` assigns strata to crops, `noise` gives the position in the stratum.
    """
    masked = int(len(order) * probability)
    place = torch.argsort(torch.argsort(order))
    ratios = ratio[0] + (ratio[1] - ratio[0]) * (place + noise) / max(masked, 1)
    return torch.where(place < masked, ratios, 0.0)


def listed(masks: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Masks (B, N) bool of at most `most` patches each as index lists: int64 (B, M = most) indices of the masked
    patches in raster order, followed by other patches as padding; and bool (B, M), True for indices of masked
    patches."""
    index = torch.argsort(masks.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]
    return index, masks.gather(1, index)
