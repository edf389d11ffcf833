"""The feature pyramid of an encoder that has one map only: the simple feature pyramid of ViTDet (Li et al., "Exploring
Plain Vision Transformer Backbones for Object Detection", ECCV 2022, section 3) with resampling in the place of its
learned convolutions. So an export needs no weights for it, and a detector's own layers can follow.

Shapes: B images, D channels, (h, w) the grid of patches.
"""

import torch.nn.functional as F
from torch import Tensor

SCALES = (4.0, 2.0, 1.0, 0.5)  # sides of the maps, as multiples of the grid's: strides 4, 8, 16, 32 of patches of 16


def strides(patch: tuple[int, int]) -> tuple[tuple[float, float], ...]:
    """Pixels a position (down, right) of each map of `simple_pyramid`, of patches of that size: 4, 8, 16 and 32 of patches
    of 16; whole numbers are int."""
    return tuple((whole(patch[0] / scale), whole(patch[1] / scale)) for scale in SCALES)


def simple_pyramid(x: Tensor) -> tuple[Tensor, ...]:
    """Maps (B, D, 4h, 4w), (B, D, 2h, 2w), (B, D, h, w) and (B, D, ceil(h / 2), ceil(w / 2)) of a map (B, D, h, w): two of
    them bilinear, the third is `x`, and the last is the maximum of 2 x 2 positions, fewer at an odd edge."""
    larger = (F.interpolate(x, scale_factor=scale, mode="bilinear") for scale in SCALES[:2])
    return (*larger, x, F.max_pool2d(x, 2, ceil_mode=True))


def whole(number: float) -> float:
    """The number, as int where it is whole."""
    return int(number) if number == int(number) else number
