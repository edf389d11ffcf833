"""Colour in one go (`--aug fast`): all that jitter and grayscale do to an image, and the normalisation, as one 3 x 4
matrix; then blur, solarize and noise on normalised pixels.

What differs from `colour.apply`, whose parameters are the same: values are clamped once, at the end, not after each
operation; contrast blends with the mean luma that follows from the image's mean colour, as if nothing had been clamped;
hue turns about the grey axis of RGB instead of in HSV (the same at whole thirds of a turn, and for grey); the blur reaches
2 sigma each way instead of 3 of the spec's largest (on a CPU). The rest is the same to rounding.

Shapes: B images, H x W pixels, P = views.COLOUR_PARAMS numbers an image; channels are 3.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import empty
from . import colour
from .views import BLUR_SIGMA, FACTORS, GRAYSCALE, JITTER, NOISE_SIGMA, ORDER, SOLARIZE, ViewSpec

_LUMA = np.array(colour.LUMA)
_REACH = 2  # sigmas of a blur's kernel each way


def finish(raw: Tensor, params: np.ndarray, spec: ViewSpec, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """`colour.finish`, composed: raw uint8 (..., H, W, 3) and params float32 (..., P) to float32 (..., 3, H, W)."""
    flat, rows = raw.reshape(-1, *raw.shape[-3:]), params.reshape(-1, params.shape[-1])
    matrix, by_mean = matrices(rows, spec)
    scale, shift = 1 / np.array(std), -np.array(mean) / np.array(std)
    matrix, by_mean = matrix * scale[:, None] / 255, by_mean * scale[:, None] / 255
    low, high = shift, shift + scale  # where 0 and 1 are after normalisation
    out = empty(len(flat), 3, *flat.shape[1:3], dtype=torch.float32, device=raw.device)
    tables = (matrix, by_mean, shift[:, None], scale[:, None] / 255)
    weights, by_means, shifts, whites = (_on(each, raw.device) for each in tables)
    changed = (rows[:, JITTER] > 0) | (rows[:, GRAYSCALE] > 0)
    size = colour.chunk_size(flat, 4 * colour.CACHED)  # fewer copies are made than by `colour.apply`
    for part in (slice(start, start + size) for start in range(0, len(flat), size)):
        _split(flat[part], out[part])
        planes = out[part].flatten(2)
        if not changed[part].any():
            torch.addcmul(shifts, planes, whites, out=planes)
            continue
        offsets = torch.baddbmm(shifts, by_means[part], planes.mean(2, keepdim=True)) if by_mean[part].any() else shifts
        found = torch.baddbmm(offsets, weights[part], planes).view_as(out[part])
        for c in range(3):
            torch.clamp(found[:, c], float(low[c]), float(high[c]), out=out[part, c])
    blurred = np.flatnonzero(rows[:, BLUR_SIGMA] > 0)
    if raw.device.type == "cpu":
        for i in blurred:
            _blur(out[i], float(rows[i, BLUR_SIGMA]))
    elif blurred.size:  # hundreds of small kernels an image would keep an accelerator waiting
        at = torch.from_numpy(blurred).to(raw.device, non_blocking=True)
        out[at] = colour.blur(out[at], rows[blurred, BLUR_SIGMA], spec.blur_sigma[1])
    solarized = np.flatnonzero(rows[:, SOLARIZE] > 0)
    if raw.device.type != "cpu" and solarized.size:  # all at once, instead of three kernels an image and channel
        at = torch.from_numpy(solarized).to(raw.device, non_blocking=True)
        limits = (low + spec.solarize_threshold * scale, low + high)
        thresholds, sums = (_on(each[:, None, None], raw.device) for each in limits)
        chosen = out[at]
        out[at] = torch.where(chosen >= thresholds, sums - chosen, chosen)
        solarized = solarized[:0]
    for i in solarized:
        for c in range(3):
            threshold = float(low[c] + spec.solarize_threshold * scale[c])
            plane = out[i, c]
            plane.copy_(torch.where(plane >= threshold, float(low[c] + high[c]) - plane, plane))
    for i in np.flatnonzero(rows[:, NOISE_SIGMA] > 0):
        there, back = (_on(each[:, None, None], raw.device) for each in (scale, shift))
        out[i] = colour.noise((out[i] - back) / there, rows[i]) * there + back
    return out.view(*raw.shape[:-3], *out.shape[1:])


def matrices(params: np.ndarray, spec: ViewSpec) -> tuple[np.ndarray, np.ndarray]:
    """What jitter and grayscale do to a pixel x of an image with mean colour m, M x + A m: M and A, (B, 3, 3) float64."""
    count = len(params)
    matrix, by_mean = np.tile(np.eye(3), (count, 1, 1)), np.zeros((count, 3, 3))
    grey = np.broadcast_to(_LUMA, (3, 3))
    jitter = spec.jitter
    if jitter is not None:
        strengths = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        jittered = params[:, JITTER] > 0
        for place in range(4):
            for number, strength in enumerate(strengths):
                rows = np.flatnonzero(jittered & (params[:, ORDER][:, place] == number))
                if strength == 0 or not rows.size:
                    continue
                factor = params[rows, FACTORS][:, number].astype(np.float64)[:, None, None]
                if number == 1:
                    # the mean of what is there so far is (M + A) m, its luma the same in every channel
                    middle = grey @ (matrix[rows] + by_mean[rows])
                    matrix[rows] *= factor
                    by_mean[rows] = factor * by_mean[rows] + (1 - factor) * middle
                    continue
                if number == 0:
                    change = factor * np.eye(3)
                elif number == 2:
                    change = factor * np.eye(3) + (1 - factor) * grey
                else:
                    change = _turn(factor)
                matrix[rows], by_mean[rows] = change @ matrix[rows], change @ by_mean[rows]
    rows = np.flatnonzero(params[:, GRAYSCALE] > 0)
    matrix[rows], by_mean[rows] = grey @ matrix[rows], grey @ by_mean[rows]
    return matrix, by_mean


def _turn(turns: np.ndarray) -> np.ndarray:
    """The rotation about (1, 1, 1), which takes red towards green, by so many turns (n, 1, 1): Rodrigues' formula."""
    axis = np.full(3, 1 / math.sqrt(3))
    cross = np.cross(np.eye(3), axis)  # cross @ x is the cross product of the axis with x
    angle = 2 * math.pi * turns
    return np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)


def _split(pixels: Tensor, planes: Tensor) -> None:
    """Write uint8 (B, H, W, 3) into float32 (B, 3, H, W)."""
    if pixels.device.type != "cpu":
        planes.copy_(pixels.movedim(-1, 1))
        return
    source, target = pixels.numpy(), planes.numpy()
    for c in range(3):  # NumPy takes every third byte in half the time of torch
        target[:, c] = source[..., c]


def _blur(image: Tensor, sigma: float) -> None:
    """Gaussian blur of (3, H, W) in place, mirrored at the border: rows, then columns."""
    tall, wide = (min(math.ceil(_REACH * sigma), side - 1) for side in image.shape[1:])
    padded = F.pad(image, (wide, wide, tall, tall), mode="reflect")
    _weighted(_weighted(padded, 1, tall, sigma), 2, wide, sigma, out=image)


def _weighted(padded: Tensor, dim: int, radius: int, sigma: float, out: Tensor | None = None) -> Tensor:
    """The sum of an image shifted along `dim` by up to `radius` each way, weighted by a Gaussian; without its padding."""
    side = padded.shape[dim] - 2 * radius
    gauss = [math.exp(-0.5 * (shift / sigma) ** 2) for shift in range(-radius, radius + 1)]
    total = sum(gauss)
    out = torch.mul(padded.narrow(dim, 0, side), gauss[0] / total, out=out)
    for shift in range(1, 2 * radius + 1):
        out.add_(padded.narrow(dim, shift, side), alpha=gauss[shift] / total)
    return out


def _on(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device, non_blocking=True)
