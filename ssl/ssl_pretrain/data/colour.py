"""Colour: jitter, grayscale, blur, solarize and noise of a batch at once, on its device, from parameters drawn beforehand.

Shapes: B images, C channels, H x W pixels, P = views.COLOUR_PARAMS numbers an image. The parameters stay on the CPU,
where they say which images each operation touches, so nothing here waits for the device.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import empty
from .views import (
    BLUR_SIGMA,
    FACTORS,
    GRAYSCALE,
    JITTER,
    NOISE_KEY,
    NOISE_SIGMA,
    NOISE_SQUARE,
    ORDER,
    SOLARIZE,
    ViewSpec,
)

LUMA = (0.2989, 0.587, 0.114)  # ITU-R BT.601, as torchvision rounds it

CACHED = 2**15  # values of images, of which the copies that an operation makes fit a core's cache


def coloured(spec: ViewSpec) -> bool:
    """Whether the spec changes colours at all."""
    jitter = spec.jitter is not None and spec.jitter.p > 0
    return jitter or spec.grayscale > 0 or spec.blur > 0 or spec.solarize > 0 or spec.noise_patch > 0


def finish(raw: Tensor, params: np.ndarray, spec: ViewSpec, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Views as the workers cut them, to what a method sees.

    raw: uint8 (..., H, W, C) on the device; params: float32 (..., P) on the CPU, with the same leading sizes; mean,
    std: C numbers each, of pixels in [0, 1]. Returns float32 (..., C, H, W), coloured by `apply` and normalised.
    """
    pixels = raw.flatten(0, -4).permute(0, 3, 1, 2)
    out = empty(*pixels.shape, dtype=torch.float32, device=raw.device)
    tinted = coloured(spec)
    scale, bias = _normalisation(mean, std, 1 if tinted else 255, raw.device)
    size = chunk_size(out)
    for at, (seen, planes) in enumerate(zip(pixels.split(size), out.split(size), strict=True)):
        values = planes.copy_(seen)
        if tinted:
            rows = params.reshape(-1, params.shape[-1])[at * size : (at + 1) * size]
            values = apply(values.div_(255), rows, spec)
        torch.addcmul(bias, values, scale, out=planes)
    return out.view(*raw.shape[:-3], *out.shape[1:])


@lru_cache(maxsize=64)
def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], white: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Factor and summand (C, 1, 1) of values up to `white`; kept, for every batch needs the same ones."""
    centre, deviation = (torch.tensor(each, dtype=torch.float32).view(-1, 1, 1) for each in (mean, std))
    scale = 1 / deviation
    return (scale / white).to(device, non_blocking=True), (-centre * scale).to(device, non_blocking=True)


def chunk_size(images: Tensor, cached: int = CACHED) -> int:
    """How many images of a batch (B, ...) to work on at once: all of it on a GPU; on a CPU so few (of `cached` values, or
    one) that they stay in its cache, for a batch would go to memory and back with every operation."""
    size = max(1, len(images))
    return size if images.device.type != "cpu" else max(1, min(size, cached * size // max(1, images.numel())))


def apply(images: Tensor, params: np.ndarray, spec: ViewSpec) -> Tensor:
    """Change colours as the rows of `params` (B, P) say (`views.Draw.colour`), in the order jitter, grayscale, blur,
    solarize, noise.

    images: float32 (B, C, H, W) in [0, 1]; returns the same, in place where it can. The operations are torchvision's
    on float images (v2.functional): each jitter result is clamped to [0, 1]; contrast blends with the mean luma of
    the whole image; hue turns in HSV; grayscale is luma in all channels; solarize inverts pixels at or above the
    threshold. Where C is not 3 there is no luma and no hue: saturation, hue and grayscale are left out, contrast
    blends with the mean of all channels, and the rest is the same. The blur is Gaussian, sigma in pixels, mirrored at
    the border (the edge pixel itself not repeated), over ceil(3 sigma) pixels each way of the spec's largest sigma,
    ceil(4 sigma) of the image's own, or the side less one, whichever is least: the tail cut off holds 0.3 %. (SimCLR and
    DINO: the same sigmas; their kernels differ in the tail only.)
    """
    if spec.jitter is not None:
        strengths = (spec.jitter.brightness, spec.jitter.contrast, spec.jitter.saturation, spec.jitter.hue)
        operations = (_brightness, _contrast, _saturation, _hue)
        jittered = params[:, JITTER] > 0
        for place in range(4):
            for number, operation in enumerate(operations):
                if strengths[number] == 0 or (number >= 2 and images.shape[1] != 3):
                    continue
                rows = np.flatnonzero(jittered & (params[:, ORDER][:, place] == number))
                if rows.size:
                    factors = torch.from_numpy(params[rows, FACTORS][:, number].astype(np.float32))
                    factors = factors.to(images.device, non_blocking=True).view(-1, 1, 1, 1)
                    images = _changed(images, rows, partial(operation, factor=factors))
    rows = np.flatnonzero(params[:, GRAYSCALE] > 0)
    if rows.size and images.shape[1] == 3:
        images = _changed(images, rows, lambda chosen: _luma(chosen).expand(-1, 3, -1, -1).contiguous())
    rows = np.flatnonzero(params[:, BLUR_SIGMA] > 0)
    if rows.size:
        images = _changed(images, rows, lambda chosen: blur(chosen, params[rows, BLUR_SIGMA], spec.blur_sigma[1]))
    rows = np.flatnonzero(params[:, SOLARIZE] > 0)
    if rows.size:
        threshold = spec.solarize_threshold
        images = _changed(images, rows, lambda chosen: torch.where(chosen >= threshold, 1 - chosen, chosen))
    for row in np.flatnonzero(params[:, NOISE_SIGMA] > 0):
        noise(images[row], params[row])
    return images


def noise(image: Tensor, params: np.ndarray) -> Tensor:
    """Add noise to the square of an image (C, H, W) in [0, 1] that its row of parameters (P,) says, in place."""
    top, left, bottom, right = _square(params[NOISE_SQUARE], image.shape[-2], image.shape[-1])
    generator = torch.Generator().manual_seed(int(params[NOISE_KEY]))
    drawn = torch.randn(image.shape[0], bottom - top, right - left, generator=generator)
    square = image[:, top:bottom, left:right]
    square.add_(drawn.to(image.device, non_blocking=True), alpha=float(params[NOISE_SIGMA])).clamp_(0, 1)
    return image


def _square(place: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of the part of a square (centre row and column, half its side) inside the image."""
    row, column, half = place.tolist()
    top, left = max(0, round(row - half)), max(0, round(column - half))
    return top, left, max(top, min(height, round(row + half))), max(left, min(width, round(column + half)))


def _changed(images: Tensor, rows: np.ndarray, operation: Callable[[Tensor], Tensor]) -> Tensor:
    """The images with those rows as `operation` makes them; in place, without a copy where it is all of them."""
    if len(rows) == len(images):
        return operation(images)
    at = torch.from_numpy(rows).to(images.device, non_blocking=True)
    images[at] = operation(images[at])
    return images


# Operations change their images in place where they can: an image and its copies are more than a core's cache holds.


def _luma(images: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).add_(other.mul_(1 - factor)).clamp_(0, 1)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return images.mul_(factor).clamp_(0, 1)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    grey = _luma(images) if images.shape[1] == 3 else images
    return _blend(images, grey.mean((1, 2, 3), keepdim=True), factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _luma(images), factor)


def _hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by `factor` of a full circle, hexcone HSV (Smith, "Color gamut transform pairs", SIGGRAPH 1978)."""
    red, green, blue = images.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    # 1 where red is the highest, else 0; of the rest where green is; where blue is. Products instead of comparisons and
    # selections, which take five times as long.
    not_red, not_green = (high - red).sign_(), (high - green).sign_()
    first, second, third = 1 - not_red, not_red * (1 - not_green), not_red * not_green
    sixth = (green - blue).mul_(first).addcmul_(blue - red, second).addcmul_(red - green, third)
    sixth.div_(chroma.clamp_min(1e-30)).add_(second, alpha=2).add_(third, alpha=4)
    sixth.add_(6 * factor.view(-1, 1, 1))
    # a channel is `high` within one sixth of its own hue, `low` beyond two, and on the straight line between
    for channel in range(3):
        away = sixth - 2 * channel
        away.add_((away / 6).round_(), alpha=-6)  # the shorter way around
        torch.addcmul(low, chroma, away.abs_().neg_().add_(2).clamp_(0, 1), out=images[:, channel])
    return images


def blur(images: Tensor, sigma: np.ndarray, largest: float) -> Tensor:
    """Gaussian blur with one sigma an image, as a weighted sum of shifted images: rows, then columns."""
    device = images.device
    for dim in (2, 3):
        side = images.shape[dim]
        radius = min(math.ceil(3 * largest), side - 1)
        shifts = np.arange(-radius, radius + 1)
        gauss = np.exp(-0.5 * (shifts / sigma[:, None].astype(np.float64)) ** 2)
        # What lies beyond 4 sigma weighs 6e-6 at most, and would take as long as the rest.
        gauss[np.abs(shifts) > np.ceil(4 * sigma[:, None])] = 0
        gauss /= gauss.sum(1, keepdims=True)
        near = min(radius, math.ceil(4 * float(sigma.max())))
        weights = torch.from_numpy(gauss[:, radius - near : radius + near + 1].astype(np.float32))
        radius = near
        weights = weights.to(device, non_blocking=True).view(len(sigma), -1, 1, 1, 1)
        pad = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        padded = F.pad(images, pad, mode="reflect")
        images = padded.narrow(dim, 0, side) * weights[:, 0]
        for shift in range(1, 2 * radius + 1):
            images.addcmul_(padded.narrow(dim, shift, side), weights[:, shift])
    return images
