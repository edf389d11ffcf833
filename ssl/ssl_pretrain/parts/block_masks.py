"""Masks made of rectangles (BEiT: Bao et al., 2022, algorithm 1), as iBOT and the DINOv2 family draw them, for a whole
batch at once where the noise is: shapes are static and nothing waits.

Shapes: B masks, N = h * w patches on a grid in raster order, A tries at a rectangle, M patches at most in a mask.
"""

import math

import torch
from torch import Tensor

TRIES = 10  # at one rectangle; where all fail, the mask stays as it is
ATTEMPTS = (
    40  # at all rectangles of a mask together; 31 do for 999 masks of 1,000 at 14 x 14 patches with half of them wanted
)


def block_masks(
    noise: Tensor, grid: tuple[int, int], wanted: Tensor, *, smallest: int, largest: float = math.inf
) -> Tensor:
    """Union of random rectangles with at most `wanted` patches in all: bool (B, N), True where masked.

    Rectangles are put one after another until `wanted` (B,) patches (any real number from 0) are masked. One has an area
    drawn uniformly from `smallest` to what is still wanted (at most `largest`), a ratio of height to width drawn between
    0.3 and 1 / 0.3, uniformly in its logarithm, and any place; it is smaller than the grid both ways. It is taken if
    it masks a patch that was not masked before and no more of them than the upper limit of its area. After ten
    failures on end the mask is left short of `wanted`.

    noise: uniform [0, 1), (B, A, 4); `ATTEMPTS` is a good A. A mask that needs more tries is left short.
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
    """Masks (B, N) bool, none with more than `wanted` (B,) patches, filled up to exactly so many with random ones (as
    DINOv3 does after the rectangles; from empty masks, a random mask). noise: uniform [0, 1), (B, N)."""
    order = torch.argsort(noise + 1.0 * ~masks, dim=1)  # the masked first
    place = torch.argsort(order, dim=1)
    return place < wanted[:, None]


def stratified_ratios(order: Tensor, noise: Tensor, probability: float, ratio: tuple[float, float]) -> Tensor:
    """Shares of patches to mask (R,) for R crops: int(R * probability) of them have one stratum each of the range `ratio`,
    cut into so many equal ones, and draw from it uniformly; the others have 0 (DINOv2, as released).

    order, noise: uniform [0, 1), (R,); the first says which crop has which stratum, the second where in it.
    """
    masked = int(len(order) * probability)
    place = torch.argsort(torch.argsort(order))
    ratios = ratio[0] + (ratio[1] - ratio[0]) * (place + noise) / max(masked, 1)
    return torch.where(place < masked, ratios, 0.0)


def listed(masks: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Masks (B, N) bool of at most `most` patches each as lists: int64 (B, M = most) indices of the masked patches in
    raster order, then of others as padding, and bool (B, M), True where an index is a masked patch's."""
    index = torch.argsort(masks.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]
    return index, masks.gather(1, index)
