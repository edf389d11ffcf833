"""Pixels of pictures for people: images, maps of patches as colours, and their arrangement in rows.

Shapes: n images of C channels and H x W pixels, N patches of each on a (h, w) grid, D features. Pixels for display are
uint8 (n, H, W, 3). Nothing here uses the process's random state.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = (
    112  # of a shown image, in pixels, at most: larger ones are reduced, smaller ones enlarged a whole number of times
)
GAP = 2  # white pixels between images
SPREAD = 2.0  # standard deviations from the mean to the end of a colour's range
WEAKEST = 0.05  # standard deviation of a component, as a share of the first one's, below which it gets a weaker colour
PLACE = 0.25  # weight of a patch's position beside its colour, where the components are turned
# From low to high: dark blue, blue, green, yellow, in shares of full red, green and blue
HEAT = np.array([(0.12, 0.05, 0.32), (0.18, 0.32, 0.60), (0.16, 0.58, 0.54), (0.50, 0.78, 0.32), (0.99, 0.91, 0.25)])


def shown(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised images (n, C, H, W) as pixels for display, on the host: the first three channels as red, green and blue;
    of fewer than three channels the first one, in grey."""
    x = images.detach().float().cpu()
    x = (x * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)).clamp(0, 1)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def as_rgb(pixels: Tensor) -> Tensor:
    """Pixels (n, H, W, C) uint8 of any number of channels for display, as `shown` chooses them."""
    return pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].expand(*pixels.shape[:-1], 3)


def zoom(sizes: Sequence[tuple[int, int]]) -> float:
    """The factor with which images of these sizes (height, width) are shown together, so that the largest one fits."""
    longest = max(max(size) for size in sizes)
    return SIDE / longest if longest > SIDE else float(SIDE // longest)


def scaled(pixels: Tensor, factor: float) -> Tensor:
    """Pixels (n, H, W, 3) enlarged (factor >= 1, a whole number: each pixel becomes a square) or reduced."""
    if factor >= 1:
        return pixels.repeat_interleave(int(factor), 1).repeat_interleave(int(factor), 2)
    size = [max(1, round(side * factor)) for side in pixels.shape[1:3]]
    x = F.interpolate(pixels.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", antialias=True)
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def patches_scaled(colours: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Colours of patches (n, N, 3) uint8 as images (n, H, W, 3) of `size`, each patch a rectangle of one colour."""
    x = colours.unflatten(1, grid).permute(0, 3, 1, 2).float()
    return F.interpolate(x, size=size, mode="nearest").to(torch.uint8).permute(0, 2, 3, 1)


def arranged(rows: Sequence[Sequence[Tensor]], lead: int = GAP) -> np.ndarray:
    """Rows of images (H, W, 3) uint8 on white, each in the middle of its place: (height, width, 3) uint8. A row is as high
    as its highest image, and every column as wide as the widest of all. lead: white pixels after the first column."""
    width = max(image.shape[1] for row in rows for image in row)
    heights = [max(image.shape[0] for image in row) for row in rows]
    columns = max(len(row) for row in rows)
    lefts = [column * (width + GAP) + (lead - GAP if column else 0) for column in range(columns)]
    canvas = np.full((sum(heights) + GAP * (len(rows) - 1), lefts[-1] + width, 3), 255, np.uint8)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, image in enumerate(row):
            h, w = image.shape[:2]
            y, x = top + (height - h) // 2, lefts[column] + (width - w) // 2
            canvas[y : y + h, x : x + w] = image.numpy()
        top += height + GAP
    return canvas


def components(patches: Tensor, colours: Tensor, grid: tuple[int, int]) -> Tensor:
    """The first three principal components of all patch features (n, N, D) as colours (n, N, 3) uint8.

    colours: the mean colour (n, N, 3), any scale, of each patch in the image. Components have no sign, and components of
    nearly equal variance no order. So their scores, each with variance 1, are turned (and mirrored) as a whole until they
    are as near as possible to the patches' colours and positions (orthogonal Procrustes; Schönemann, 1966). These do not
    change in a run, so the same content keeps its colour over the steps. Components are computed in float64. Raises
    ValueError for a feature that is not finite.
    """
    x = patches.detach().cpu().double().flatten(0, 1)
    if not bool(x.isfinite().all()):
        raise ValueError("features are not finite")
    x = x - x.mean(0)
    narrow = x.shape[1] <= x.shape[0]  # the smaller one of the covariance and of the Gram matrix
    values, vectors = torch.linalg.eigh(x.T @ x if narrow else x @ x.T)
    values, vectors = values.flip(0)[:3].clamp_min(0), vectors.flip(1)[:, :3]
    scores = x @ vectors if narrow else vectors * values.sqrt()
    deviation = (values / len(x)).sqrt()
    largest = float(deviation[0])
    if largest <= 1e-9 * float(1 + patches.detach().abs().max()):
        return torch.full((*patches.shape[:2], 3), 128, dtype=torch.uint8)
    scores = F.pad(scores / deviation.clamp_min(WEAKEST * largest), (0, 3 - scores.shape[1]))
    left, _, right = torch.linalg.svd(scores.T @ _reference(colours, grid))
    turned = scores @ (left @ right)
    return ((0.5 + turned / (2 * SPREAD)).clamp(0, 1) * 255).round().to(torch.uint8).view(*patches.shape[:2], 3)


def _reference(colours: Tensor, grid: tuple[int, int]) -> Tensor:
    """What components are turned towards: (n * N, 3) float64 with mean 0, of colours and a little of the position."""
    x = colours.detach().cpu().double().flatten(0, 1)
    x = x - x.mean(0)
    down, along = (torch.linspace(-1, 1, side, dtype=torch.float64) for side in grid)
    place = torch.stack(torch.meshgrid(down, along, indexing="ij"), dim=-1).flatten(0, 1)  # (N, 2)
    place = F.pad(place, (0, 1)) - place.sum(1, keepdim=True) / 3  # orthogonal to brightness
    return x + PLACE * (float(x.std(correction=0)) or 1.0) * place.repeat(len(colours), 1)


def attention(weights: Tensor, patches: int, *, from_first: bool) -> Tensor:
    """How much patches are attended to, (n, N) float32: the mean over heads of attention weights (n, heads, L, L), of the
    first token (the class token) or, if not `from_first`, of all tokens. The patches are the last N = `patches` tokens.
    Raises ValueError for a weight that is not finite."""
    x = weights.detach().float().cpu().mean(1)
    if not bool(x.isfinite().all()):
        raise ValueError("attention is not finite")
    return (x[:, 0] if from_first else x.mean(1))[:, -patches:]


def heat(values: Tensor) -> Tensor:
    """Values (n, N) as colours (n, N, 3) uint8, from dark blue (the lowest of each image) to yellow (its highest)."""
    x = values.detach().float().cpu()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    shares = ((x - low) / (high - low).clamp_min(1e-6)).numpy()
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(shares, stops, HEAT[:, channel]) for channel in range(3)]
    return torch.from_numpy((np.stack(channels, axis=-1) * 255).round().astype(np.uint8))
