"""Soft labels, mixup and CutMix: a batch mixed with itself in reverse order, and its labels by the same shares.

Shapes: B images of a batch, C channels, H x W pixels, K classes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed."""

    share: float  # of each image itself; the rest is of the one it is paired with
    box: tuple[int, int, int, int] | None = None  # CutMix: top, left, bottom, right of what the other one covers


def soft_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Targets (B, K) float32 of labels (B,) int64: `smoothing` spread evenly over all classes, the rest on the label
    (Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, section 7)."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def draw(rng: np.random.Generator, size: tuple[int, int], *, mixup: float, cutmix: float) -> Mix | None:
    """Draw one mix for a batch of images of `size` (height, width); None where both are off.

    The share is Beta(alpha, alpha) with alpha `mixup` (Zhang et al., ICLR 2018) or `cutmix` (Yun et al., ICCV 2019); where
    both are above 0, either with equal probability. CutMix's box has the image's aspect ratio and its centre anywhere;
    the share is that of the pixels that stay, after what lies outside the image is cut off.
    """
    choice = rng.random()
    if mixup > 0 and (cutmix <= 0 or choice >= 0.5):
        return Mix(float(rng.beta(mixup, mixup)))
    if cutmix <= 0:
        return None
    height, width = size
    side = math.sqrt(1 - rng.beta(cutmix, cutmix))
    row, column = int(rng.integers(height)), int(rng.integers(width))
    half_height, half_width = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(0, row - half_height), min(height, row + half_height)
    left, right = max(0, column - half_width), min(width, column + half_width)
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return Mix(share, (top, left, bottom, right))


def apply(images: Tensor, targets: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Mix images (B, C, H, W) and targets (B, K), float, with themselves in reverse order; new tensors."""
    if mix.box is None:
        mixed = torch.lerp(images.flip(0), images, mix.share)
    else:
        top, left, bottom, right = mix.box
        mixed = images.clone()
        mixed[..., top:bottom, left:right] = images.flip(0)[..., top:bottom, left:right]
    return mixed, torch.lerp(targets.flip(0), targets, mix.share)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over images of the cross-entropy, (), of logits (B, K) with targets (B, K) that sum to 1; float32."""
    return -(targets * logits.float().log_softmax(1)).sum(1).mean()
