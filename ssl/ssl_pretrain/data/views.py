"""Views: what a method wants to see of an image, declared; and the cutting of it, in the loader's workers."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Colour jitter as torchvision's ColorJitter: factors uniform in [1 - x, 1 + x] (hue: shift in [-x, x] of a turn),
    the four operations in a random order, all applied with probability `p`."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    p: float = 0.8


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One kind of view a method declares (`Method.views`); the engine makes it.

    A view is a random resized crop (`scale`: share of the image's area; `ratio`: width over height), flipped, and then
    coloured in the order jitter, grayscale, blur, solarize. Probabilities in [0, 1]; `size` in pixels (height, width).
    """

    name: str
    count: int = 1  # with count > 1 the batch holds views[name] as (count, B, C, H, W), else (B, C, H, W)
    size: tuple[int, int]
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    hflip: float = 0.5
    vflip: float = 0.0
    jitter: Jitter | None = None
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    solarize_threshold: float = 0.5  # of full scale; pixels at or above it are inverted
