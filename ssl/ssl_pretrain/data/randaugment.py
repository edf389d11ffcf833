"""Strong augmentation for training with labels: RandAugment on batches of uint8 images, and random erasing.

RandAugment (Cubuk et al., CVPR workshops 2020) in the form of MAE's fine-tuning, "rand-m9-mstd0.5-inc1": two
operations an image, each of 15 drawn alike and applied with probability 1/2, at a magnitude normal around m with deviation
0.5, in a form whose effect grows with the magnitude. Random erasing: Zhong et al., AAAI 2020.

Shapes: B images, b of them that an operation is applied to, C channels, H x W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..randomness import numpy_generator

LAYERS = 2  # operations an image
PROBABILITY = 0.5  # of each to be applied
DEVIATION = 0.5  # of the magnitude
MOST = 10.0  # the largest magnitude
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
TRIES = 10


# A sample's uniform draws, whatever is used of them
_OPERATION, _USED, _SIGN, _LEVEL, _ERASE, _NOISE = slice(0, 2), slice(2, 4), slice(4, 6), (6, 7), 8, 9
_AREA, _RATIO, _TOP, _LEFT = slice(10, 10 + TRIES), slice(10 + TRIES, 10 + 2 * TRIES), 10 + 2 * TRIES, 11 + 2 * TRIES
_DRAWS = 12 + 2 * TRIES


@dataclass(frozen=True)
class Plan:
    """What chance decided about each image of a batch."""

    operations: np.ndarray  # (B, LAYERS) int64: places in OPERATIONS, or -1 for none
    strengths: np.ndarray  # (B, LAYERS) float64 in [-1, 1]: magnitude over MOST, with a random sign
    boxes: np.ndarray  # (B, 4) int64: top, left, height and width of what is erased; all 0 where nothing is
    noise: np.ndarray  # (B,) int64: what each erased box's noise is drawn from


def draw(
    seed: int, epochs: np.ndarray, samples: np.ndarray, size: tuple[int, int], *, magnitude: float, erase: float
) -> Plan:
    """Draw for images by (seed, epoch, sample); epochs, samples: (B,) int64.

    size: height and width; magnitude: in [0, 10], 0 for no operation at all; erase: the probability of erasing.
    """
    each = zip(epochs.tolist(), samples.tolist(), strict=True)
    uniform = np.stack([numpy_generator(seed, "augment", epoch, sample).random(_DRAWS) for epoch, sample in each])
    used = (uniform[:, _USED] < PROBABILITY) & (magnitude > 0)
    first, second = (uniform[:, column] for column in _LEVEL)  # to two normal numbers (Box & Muller, 1958)
    radius, angle = np.sqrt(-2 * np.log1p(-first)), 2 * np.pi * second
    levels = magnitude + DEVIATION * np.stack((radius * np.cos(angle), radius * np.sin(angle)), 1)
    signs = np.where(uniform[:, _SIGN] < 0.5, -1.0, 1.0)
    return Plan(
        np.where(used, (uniform[:, _OPERATION] * len(OPERATIONS)).astype(np.int64), -1),
        signs * levels.clip(0, MOST) / MOST,
        _boxes(uniform, *size) * (uniform[:, _ERASE] < erase)[:, None],
        (uniform[:, _NOISE] * 2**53).astype(np.int64),
    )


def _boxes(uniform: np.ndarray, height: int, width: int) -> np.ndarray:
    """Top, left, height, width, (B, 4) int64: area uniform, ratio log-uniform, ten tries; all 0 where none fits."""
    rows = np.arange(len(uniform))
    low, high = np.log(ERASED_RATIO)
    area = height * width * (ERASED_AREA[0] + uniform[:, _AREA] * (ERASED_AREA[1] - ERASED_AREA[0]))
    ratio = np.exp(low + uniform[:, _RATIO] * (high - low))
    heights, widths = np.rint(np.sqrt(area * ratio)).astype(int), np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (heights > 0) & (widths > 0) & (heights < height) & (widths < width)
    first = fits.argmax(1)
    h, w = heights[rows, first], widths[rows, first]
    top, left = uniform[:, _TOP] * (height - h + 1), uniform[:, _LEFT] * (width - w + 1)
    return np.stack((top.astype(int), left.astype(int), h, w), 1) * fits.any(1)[:, None]


def apply(pixels: Tensor, plan: Plan, fill: tuple[float, ...]) -> Tensor:
    """RandAugment as planned, of uint8 images (B, H, W, C); returns the same kind. fill: C numbers in [0, 1], the colour
    of what comes in from outside the image. "colour" is left out where C is not 3."""
    if (plan.operations < 0).all():
        return pixels
    images = pixels.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
    outside = (255 * torch.tensor(fill)).to(images.device, non_blocking=True).view(1, -1, 1, 1)
    for layer in range(LAYERS):
        for place, operation in enumerate(OPERATIONS.values()):
            rows = np.flatnonzero(plan.operations[:, layer] == place)
            if rows.size:
                at = torch.from_numpy(rows).to(images.device, non_blocking=True)
                strength = torch.from_numpy(plan.strengths[rows, layer].astype(np.float32)).to(images.device)
                images[at] = operation(images[at], strength.view(-1, 1, 1, 1), outside)
    return images.permute(0, 2, 3, 1)


def erase_(images: Tensor, plan: Plan) -> Tensor:
    """Overwrite the planned boxes of normalised images (B, C, H, W) float32 with normal noise, in place."""
    for row in np.flatnonzero(plan.boxes[:, 2]):
        top, left, height, width = plan.boxes[row].tolist()
        generator = torch.Generator().manual_seed(int(plan.noise[row]))
        noise = torch.randn(images.shape[1], height, width, generator=generator)
        images[row, :, top : top + height, left : left + width] = noise.to(images.device, non_blocking=True)
    return images


# ---- The operations: of uint8 images (b, C, H, W), strengths (b, 1, 1, 1) in [-1, 1] and the colour outside, to uint8.


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp_(0, 255).to(torch.uint8)


def _blend(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """`other` at factor 0, the image at 1, and beyond it above."""
    factor = (1 + 0.9 * strength).clamp(min=0.1)
    return _bytes(other + factor * (images.float() - other))


def _grey(images: Tensor) -> Tensor:
    """Luma, float (b, 1, H, W), or the mean of the channels where there are not three."""
    if images.shape[1] != 3:
        return images.float().mean(1, keepdim=True)
    red, green, blue = images.float().unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def _auto_contrast(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    """Each channel's darkest value to 0 and its brightest to 255."""
    low, high = images.amin((2, 3), keepdim=True).float(), images.amax((2, 3), keepdim=True).float()
    flat = high <= low
    scale = torch.where(flat, 1.0, 255 / (high - low).clamp(min=1))
    return _bytes((images.float() - torch.where(flat, 0.0, low)) * scale)


def _equalize(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    """Each channel's histogram as even as a table of its values makes it (as Pillow's ImageOps.equalize)."""
    values = images.flatten(0, 1).flatten(1).long()  # (b * C, H * W)
    first = 256 * torch.arange(len(values), device=images.device)[:, None]
    counts = torch.bincount((values + first).flatten(), minlength=256 * len(values)).view(-1, 256)
    last = 255 - (counts > 0).flip(1).int().argmax(1, keepdim=True)
    step = (counts.sum(1, keepdim=True) - counts.gather(1, last)) // 255
    before = counts.cumsum(1) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table)
    return table.gather(1, values).to(torch.uint8).view(images.shape)


def _invert(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    """Keep the 4 highest bits at strength 0 down to 1 (none would leave nothing of the image)."""
    bits = (4 - (4 * strength.abs()).int()).clamp(min=1)
    return images & (256 - 2 ** (8 - bits)).to(torch.uint8)


def _solarize(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    """Invert what is at or above 256, at strength 0, down to 0."""
    return torch.where(images >= 256 - (256 * strength.abs()).int(), 255 - images, images)


def _solarize_add(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    """Add up to 110 to values below 128."""
    brighter = (images.int() + (110 * strength.abs()).int()).clamp_(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def _colour(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    return _blend(images, _grey(images), strength) if images.shape[1] == 3 else images


def _contrast(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), strength)


def _brightness(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(strength), strength)


def _sharpness(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    """Blend with a 3 x 3 smoothing whose centre weighs 5 of 13; the outermost pixels stay."""
    channels, smooth = images.shape[1], images.float()
    if min(images.shape[2:]) > 2:
        kernel = torch.ones(3, 3, device=images.device)
        kernel[1, 1] = 5
        kernel = (kernel / 13).expand(channels, 1, 3, 3)
        smooth[:, :, 1:-1, 1:-1] = F.conv2d(images.float(), kernel, groups=channels)
    return _blend(images, smooth, strength)


def _affine(images: Tensor, matrix: tuple[Tensor | float, ...], outside: Tensor) -> Tensor:
    """The image whose pixel at (x, y), from the centre, is the old one's at (a x + b y + c, d x + e y + f), bilinear.

    matrix: a, b, c, d, e, f, each (b,) or a number.
    """
    height, width = images.shape[2:]
    a, b, c, d, e, f = (
        torch.as_tensor(v, dtype=torch.float32, device=images.device).expand(len(images)) for v in matrix
    )
    rows = (
        torch.stack((a, b * height / width, 2 * c / width), 1),
        torch.stack((d * width / height, e, 2 * f / height), 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # nothing outside is black once the colour outside is the origin
    return _bytes(F.grid_sample(images - outside, grid, align_corners=False) + outside)


def _rotate(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    """By up to 30 degrees about the centre."""
    angle = strength.flatten() * math.radians(30)
    return _affine(images, (angle.cos(), angle.sin(), 0, -angle.sin(), angle.cos(), 0), outside)


def _shear_x(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    """Rows move by up to 0.3 of their distance from the first."""
    factor = 0.3 * strength.flatten()
    return _affine(images, (1, factor, factor * images.shape[2] / 2, 0, 1, 0), outside)


def _shear_y(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    factor = 0.3 * strength.flatten()
    return _affine(images, (1, 0, 0, factor, 1, factor * images.shape[3] / 2), outside)


def _translate_x(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    """By up to 0.45 of the width."""
    return _affine(images, (1, 0, 0.45 * images.shape[3] * strength.flatten(), 0, 1, 0), outside)


def _translate_y(images: Tensor, strength: Tensor, outside: Tensor) -> Tensor:
    return _affine(images, (1, 0, 0, 0, 1, 0.45 * images.shape[2] * strength.flatten()), outside)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "auto contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize add": _solarize_add,
    "colour": _colour,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear x": _shear_x,
    "shear y": _shear_y,
    "translate x": _translate_x,
    "translate y": _translate_y,
}
