"""Several views of each image through one encoder. Shapes: V views, B images."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..backbones.backbone import Backbone, Features
from ..data.views import Jitter, ViewSpec
from ..pretext import Step


def encode(encoder: Backbone, views: Tensor, step: Step, **options: Any) -> Features:
    """Features of (V * B, ...) rows, view by view, from views (V, B, C, H, W) or (B, C, H, W) of one size.

    Draws the noise of drop path where the encoder wants it; `options` go to the encoder.
    """
    images, options = _rows(encoder, views, step, options)
    return encoder(images, **options)


def encode_crops(encoder: Backbone, crops: Sequence[Tensor], step: Step, **options: Any) -> list[Features]:
    """What `encode` gives for each of `crops`, views of one size, each a batch of its own; `options` are for the first of
    them."""
    return encoder.forward_crops([_rows(encoder, views, step, {} if i else options) for i, views in enumerate(crops)])


def encode_pooled(encoder: Backbone, crops: Sequence[Tensor], step: Step, **options: Any) -> list[Tensor]:
    """The pooled vectors alone that `encode_crops` gives, each (V * B, D): an encoder that can leaves out what only the
    rest of the features would need."""
    less = {"pooled_only": True} if "pooled_only" in encoder.supports else {}
    batches = [_rows(encoder, views, step, less if i else less | options) for i, views in enumerate(crops)]
    return [features.pooled for features in encoder.forward_crops(batches)]


def _rows(encoder: Backbone, views: Tensor, step: Step, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Views of one size as a batch of images, and what the encoder is to be told with them."""
    count = views.shape[0] if views.ndim == 5 else 1
    if encoder.training and "drop_path" in encoder.supports and encoder.config.drop_path > 0:
        noise = step.rand(count, 2 * encoder.depth)  # (B, V, 2 * depth)
        options = options | {"drop": noise.transpose(0, 1).flatten(0, 1)}
    return views.flatten(0, 1) if views.ndim == 5 else views, options


def by_image(rows: Tensor, views: int) -> Tensor:
    """(V * B, ...) rows, view by view, as (B, V, ...)."""
    return rows.unflatten(0, (views, -1)).transpose(0, 1)


def jitter(strength: float = 1.0, p: float = 0.8) -> Jitter:
    """SimCLR's colour jitter (Chen et al., 2020, appendix A): brightness, contrast and saturation 0.8, hue 0.2, times a
    strength. BYOL, DINO and MoCo v3 have another saturation at half strength: `Jitter()`."""
    return Jitter(
        brightness=0.8 * strength, contrast=0.8 * strength, saturation=0.8 * strength, hue=0.2 * strength, p=p
    )


def crop_size(image_size: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Height and width of local views: `ratio` times the image's, to the nearest pixels."""
    return max(1, round(image_size[0] * ratio)), max(1, round(image_size[1] * ratio))


def asymmetric_views(
    names: tuple[str, str], size: tuple[int, int], scale: tuple[float, float], blur: float, **options: Any
) -> tuple[ViewSpec, ViewSpec]:
    """BYOL's two kinds of crop (Grill et al., 2020, appendix B, table 6): the first always blurred, the second seldom and
    solarized now and then; `blur` is a factor on both probabilities, `options` go to both specs."""
    same: dict[str, Any] = {"size": size, "scale": scale, "jitter": Jitter(), "grayscale": 0.2, **options}
    return ViewSpec(name=names[0], blur=blur, **same), ViewSpec(name=names[1], blur=0.1 * blur, solarize=0.2, **same)


def multi_crop(
    image_size: tuple[int, int],
    *,
    global_scale: tuple[float, float],
    local_scale: tuple[float, float],
    local_views: int,
    local_ratio: float,
    blur: tuple[float, float, float],
    noise_patch: float = 0.0,
) -> tuple[ViewSpec, ...]:
    """DINO's crops (Caron et al., 2021, appendix E): "global1" and "global2", the latter solarized now and then, and
    `local_views` small ones, "local"; `blur` holds the probabilities of the three kinds."""
    colour: dict[str, Any] = {"jitter": Jitter(), "grayscale": 0.2, "noise_patch": noise_patch}
    large: dict[str, Any] = {"size": image_size, "scale": global_scale, **colour}
    views = (
        ViewSpec(name="global1", blur=blur[0], **large),
        ViewSpec(name="global2", blur=blur[1], solarize=0.2, **large),
    )
    if not local_views:
        return views
    small: dict[str, Any] = {"size": crop_size(image_size, local_ratio), "scale": local_scale, **colour}
    return (*views, ViewSpec(name="local", count=local_views, blur=blur[2], **small))
