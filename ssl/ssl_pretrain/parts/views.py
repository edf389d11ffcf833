"""Several views of each image through one encoder. Shapes: V views, B images."""

from typing import Any

from torch import Tensor

from ..backbones.backbone import Backbone, Features
from ..data.views import Jitter
from ..pretext import Step


def encode(encoder: Backbone, views: Tensor, step: Step, **options: Any) -> Features:
    """Features of (V * B, ...) rows, view by view, from views (V, B, C, H, W) or (B, C, H, W) of one size.

    Draws the noise of drop path where the encoder wants it; `options` go to the encoder.
    """
    count = views.shape[0] if views.ndim == 5 else 1
    if encoder.training and "drop_path" in encoder.supports and encoder.config.drop_path > 0:
        noise = step.rand(count, 2 * encoder.depth)  # (B, V, 2 * depth)
        options["drop"] = noise.transpose(0, 1).flatten(0, 1)
    return encoder(views.flatten(0, 1) if views.ndim == 5 else views, **options)


def by_image(rows: Tensor, views: int) -> Tensor:
    """(V * B, ...) rows, view by view, as (B, V, ...)."""
    return rows.unflatten(0, (views, -1)).transpose(0, 1)


def jitter(strength: float = 1.0, p: float = 0.8) -> Jitter:
    """SimCLR's colour jitter (Chen et al., 2020, appendix A): brightness, contrast and saturation 0.8, hue 0.2, times a
    strength; at 0.5 it is that of BYOL, DINO and MoCo v3 but for their saturation of 0.2."""
    return Jitter(
        brightness=0.8 * strength, contrast=0.8 * strength, saturation=0.8 * strength, hue=0.2 * strength, p=p
    )


def crop_size(image_size: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Height and width of local views: `ratio` times the image's, to the nearest pixels."""
    return max(1, round(image_size[0] * ratio)), max(1, round(image_size[1] * ratio))
