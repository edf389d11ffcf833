"""Encodes several views of each image with one encoder. Shapes: V views, B images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backbones.backbone import Backbone, Features
from ..data.views import Jitter, ViewSpec
from ..pretext import Step

WHOLE_AFTER = 0.95  # share of the run after which no tokens are dropped, so that the encoder gets used to whole images


def encode(encoder: Backbone, views: Tensor, step: Step, **options: Any) -> Features:
    """Features of (V * B, ...) rows, one view after another, from views (V, B, C, H, W) or (B, C, H, W) of one size.

    Draws the noise of drop path if the encoder uses it; `options` are passed to the encoder.
    """
    images, options = _rows(encoder, views, step, options)
    return encoder(images, **options)


def encode_crops(encoder: Backbone, crops: Sequence[Tensor], step: Step, **options: Any) -> list[Features]:
    """The result of `encode` for each of `crops`; each contains views of one size. `options` apply to the first of
    them."""
    return encoder.forward_crops([_rows(encoder, views, step, {} if i else options) for i, views in enumerate(crops)])


def encode_pooled(
    encoder: Backbone, crops: Sequence[Tensor], step: Step, token_drop: float = 0.0, /, **options: Any
) -> list[Tensor]:
    """Only the pooled vectors of `encode_crops`, each (V * B, D). An encoder that supports it does not compute what
    only the other features need.

    token_drop: share of the patches of each view that a student does not see in training (FLIP; Li et al., CVPR 2023). They
    are drawn for each view by itself, from the step's noise. See `require_token_drop`.
    """
    less = {"pooled_only": True} if "pooled_only" in encoder.supports else {}
    batches = []
    for i, views in enumerate(crops):
        seen = dropped(encoder, views, step, token_drop)
        batches.append(_rows(encoder, views, step, less | seen if i else less | seen | options))
    return [features.pooled for features in encoder.forward_crops(batches)]


def dropped(encoder: Backbone, views: Tensor, step: Step, share: float) -> dict[str, Tensor]:
    """The option "keep" of a student's forward on views (V, B, C, H, W) or (B, C, H, W): random patches (V * B, K) of each,
    K = int(N * (1 - share)) of N, at least 1. Nothing in evaluation, after 95 % of the run, and for a share of 0."""
    if share == 0 or not encoder.training or step.progress > WHOLE_AFTER:
        return {}
    patches = (views.shape[-2] // encoder.stride[0]) * (views.shape[-1] // encoder.stride[1])
    noise = step.rand(views.shape[0] if views.ndim == 5 else 1, patches)  # (B, V, N)
    order = torch.argsort(noise.transpose(0, 1).flatten(0, 1), dim=1)
    return {"keep": order[:, : max(1, int(patches * (1 - share)))]}


def require_token_drop(encoder: Backbone, method: str, share: float) -> None:
    """Raise UnsupportedByBackbone where a student shall drop tokens and the encoder cannot."""
    if share > 0:
        encoder.require(f"{method} --token-drop", "keep")


def _rows(encoder: Backbone, views: Tensor, step: Step, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Views of one size as a batch of images, and the options for the encoder."""
    count = views.shape[0] if views.ndim == 5 else 1
    if encoder.training and "drop_path" in encoder.supports and encoder.config.drop_path > 0:
        noise = step.rand(count, 2 * encoder.depth)  # (B, V, 2 * depth)
        options = options | {"drop": noise.transpose(0, 1).flatten(0, 1)}
    return views.flatten(0, 1) if views.ndim == 5 else views, options


def by_image(rows: Tensor, views: int) -> Tensor:
    """(V * B, ...) rows, one view after another, as (B, V, ...)."""
    return rows.unflatten(0, (views, -1)).transpose(0, 1)


def jitter(strength: float = 1.0, p: float = 0.8) -> Jitter:
    """SimCLR's colour jitter (Chen et al., 2020, appendix A): brightness, contrast and saturation 0.8, hue 0.2,
    multiplied by a strength. BYOL, DINO and MoCo v3 have another saturation at half strength: `Jitter()`."""
    return Jitter(
        brightness=0.8 * strength, contrast=0.8 * strength, saturation=0.8 * strength, hue=0.2 * strength, p=p
    )


def crop_size(image_size: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Height and width of local views: `ratio` times the image's, rounded to whole pixels."""
    return max(1, round(image_size[0] * ratio)), max(1, round(image_size[1] * ratio))


def asymmetric_views(
    names: tuple[str, str], size: tuple[int, int], scale: tuple[float, float], blur: float, **options: Any
) -> tuple[ViewSpec, ViewSpec]:
    """BYOL's two kinds of crop (Grill et al., 2020, appendix B, table 6): the first is always blurred; the second is
    rarely blurred and sometimes solarized. `blur` is a factor on both probabilities; `options` apply to both specs."""
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
    """DINO's crops (Caron et al., 2021, appendix E): "global1" and "global2", the latter sometimes solarized, and
    `local_views` small ones, "local"; `blur` has the probabilities of the three kinds."""
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
