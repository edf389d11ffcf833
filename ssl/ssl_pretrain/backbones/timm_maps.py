"""The pyramid of maps of a model of timm: the outputs of its stages (`forward_intermediates`).

Shapes: B images, C channels, H x W pixels, D_i channels of the map i on a grid of (h_i, w_i).
"""

import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

MOST = 4  # maps: of strides 4 to 32 in nearly all models


@dataclass(frozen=True)
class Levels:
    """Which outputs of a model's stages are its maps, the finest first, and their strides and channels."""

    indices: tuple[int, ...]
    strides: tuple[tuple[int, int], ...]
    channels: tuple[int, ...]


def levels(model: Any, images: Tensor) -> Levels | None:
    """The last four stages of different strides, found with a few images (B, C, H, W); None for a model whose stages do
    not get coarser, such as a ViT, and for one that cannot be asked for them in the pass that gives its features."""
    stated = getattr(model, "feature_info", None)
    if not hasattr(model, "forward_intermediates") or (isinstance(stated, list) and not _gets_coarser(stated)):
        return None
    try:
        x, maps = model.forward_intermediates(images)
    except Exception:  # whatever a model raises that has the function and cannot be asked for all stages
        return None
    if x.shape != model.forward_features(images).shape or any(each.ndim != 4 for each in maps):
        return None
    sides = [(images.shape[2] // each.shape[2], images.shape[3] // each.shape[3]) for each in maps]
    # Of several outputs of one stride the last one. Strides that do not rise are no pyramid.
    last = [i for i, stride in enumerate(sides) if stride not in sides[i + 1 :]][-MOST:]
    rising = all(sides[i][0] < sides[j][0] and sides[i][1] < sides[j][1] for i, j in itertools.pairwise(last))
    if len(last) < 2 or not rising:
        return None
    return Levels(tuple(last), tuple(sides[i] for i in last), tuple(maps[i].shape[1] for i in last))


def with_stages(model: Any, images: Tensor, wanted: Levels) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What `forward_features` gives of images (B, C, H, W), bit for bit, and the maps (B, D_i, h_i, w_i), of one pass."""
    x, maps = model.forward_intermediates(images, indices=list(wanted.indices))
    return x, tuple(maps)


def _gets_coarser(stated: list[Any]) -> bool:
    """Whether timm states more than one stride of a model's stages, or none."""
    strides = {each.get("reduction") for each in stated}
    return len(strides) != 1 or strides == {None}
