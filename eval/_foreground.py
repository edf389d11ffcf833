"""Finds the object in an image without labels and scores it against its mask: a score for each patch from frozen
features or attention, and a threshold.

Shapes: B images, (h, w) grid of patches, N = h * w, D channels, d channels of one attention head.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Features
from ssl_pretrain.backbones.positions import Offsets, rope_angles, rotate
from ssl_pretrain.backbones.vit import ViT
from ssl_pretrain.encoder import Encoder
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Bad

from . import _overlap
from ._dense import Reader, batches, enlarged, forward, masked, none_read
from ._task import UNKNOWN, Task

Map = Literal["pca", "attention"]


def principal(patches: Tensor) -> Tensor:
    """Scores (B, h, w) float32 from features (B, h, w, D): the first principal component of each image's patches (as in
    DINOv2, section 7.6). The sign is chosen so that the border of the image, where objects are rarer, has low
    scores."""
    grid = patches.shape[1:3]
    rows = patches.flatten(1, 2).float()
    left, values, _ = torch.linalg.svd(rows - rows.mean(1, keepdim=True), full_matrices=False)
    scores = (left[:, :, 0] * values[:, :1]).unflatten(1, grid)
    border = torch.ones(grid, dtype=torch.bool, device=patches.device)
    border[1:-1, 1:-1] = False
    sign = torch.where(scores[:, border].mean(1) > 0, -1.0, 1.0)
    return scores * sign[:, None, None]


def has_attention(encoder: Encoder) -> bool:
    """Whether `attention` works with this encoder: a ViT of this package with a CLS token, whose last block has one
    attention and, with relative positions, its own table."""
    if not isinstance(encoder.backbone, ViT):
        return False
    config = encoder.backbone.config
    return config.cls and config.parallel_branches == 1 and not config.shared_relative


def attention(encoder: Encoder, run: Callable[[], Any]) -> Tensor:
    """Scores (B, h, w) float32: the attention of the CLS token to each patch in the last block, averaged over the heads
    (DINO: Caron et al., ICCV 2021, figure 1). run: one forward pass of images through the encoder, which returns their
    Features."""
    backbone = encoder.backbone
    assert isinstance(backbone, ViT)
    last: nn.Module = backbone.blocks[-1].attn  # type: ignore[assignment]
    seen: dict[str, Tensor] = {}
    hooks = [
        getattr(last, f"{name}_norm").register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output.float()})
        )
        for name in ("q", "k")
    ]
    try:
        features = run()
    finally:
        for hook in hooks:
            hook.remove()
    q, k = seen["q"], seen["k"]  # (B, heads, L, d), before rotary positions
    prefix = backbone.prefix_tokens
    if backbone.config.positions == "rope":  # prefix tokens, including CLS, are not rotated
        angles = rope_angles(features.grid, k.shape[3], k.device)
        k = torch.cat([k[:, :, :prefix], rotate(k[:, :, prefix:], angles.cos(), angles.sin())], dim=2)
    scores = q[:, :, :1] @ k.mT / k.shape[3] ** 0.5
    if backbone.config.positions == "relative":
        offsets = Offsets.of(backbone.grid, features.grid, prefix, device=k.device)
        scores = scores + offsets.scores(cast(Tensor, last.relative_position_bias_table))[:, :, :1]
    weights = scores.softmax(3)
    return weights[:, :, 0, prefix:].mean(1).unflatten(1, features.grid)


def otsu(scores: np.ndarray) -> float:
    """The threshold that splits values (any shape) into two groups with the largest variance between them (Otsu, 1979).

    It is computed from all values, not from a histogram, and lies halfway between two neighbouring values. If all
    values are equal, it is that value."""
    ordered = np.sort(scores, axis=None).astype(np.float64)
    low = np.arange(1, len(ordered))  # how many values are below each split
    if not len(low) or ordered[0] == ordered[-1]:
        return float(ordered[0])
    sums = ordered.cumsum()
    below, above = sums[:-1] / low, (sums[-1] - sums[:-1]) / (len(ordered) - low)
    between = low * (len(ordered) - low) * (above - below) ** 2
    at = int(between.argmax())
    return float((ordered[at] + ordered[at + 1]) / 2)


# ---- Scored against masks.


def objects(
    task: Task, requested: Sequence[Map] | None, ignore_label: Sequence[int], *, size: tuple[int, int], bad: list[Bad]
) -> tuple[_overlap.Scores, dict[str, Any]]:
    """J between the region above the threshold and the non-zero part of the mask, for each map; and the settings for
    the protocol.

    requested: the maps, None for all that the encoder has; size: of the images; bad: unreadable images are added to it.
    Raises UserError for a map that the encoder does not have."""
    readable = has_attention(task.encoder)
    maps: list[Map] = list(dict.fromkeys(requested or (("pca", "attention") if readable else ("pca",))))
    if "attention" in maps and not readable:
        raise UserError("--maps attention needs a ViT of this package with a CLS token; --maps pca takes any encoder")
    test, reader = task.data.test, Reader.of_objects(masked(task.data.test), ignore_label)
    source = masked(test)
    shares: dict[str, dict[int, float]] = {name: {} for name in maps}
    for index, pixels in batches(task, test, range(len(source)), size, bad, "objects"):
        scored = _maps(task, pixels, maps)
        for place, i in enumerate(index):
            mask = reader.read(source, i)
            known = mask != UNKNOWN
            for name in maps:
                values = scored[name][place].cpu()
                found = enlarged(values[:, :, None], mask.shape)[0] > otsu(values.numpy())
                shares[name][i] = _overlap.region_similarity(found & known, (mask > 0) & known)
    if not shares[maps[0]]:
        raise none_read(test, bad)
    folders = [rows for rows in source.folders().values() if set(rows) & shares[maps[0]].keys()]
    groups = folders if len(folders) > 1 else [[i] for i in shares[maps[0]]]
    facts = {
        "threshold": "Otsu's, of the patches' scores",
        "sign of pca": "the border of the image scores low",
        "mean of": f"{len(groups)} folders' means" if len(folders) > 1 else f"{len(groups)} images",
    }
    results: _overlap.Scores = []
    for name in maps:
        means = np.array([np.mean([shares[name][i] for i in rows if i in shares[name]]) for rows in groups])
        j, interval = _overlap.mean(means, np.ones(len(means)), task.seed)
        results.append((name, {"j": j, "j_interval": interval, "n": len(shares[name])}))
    return results, facts


@torch.no_grad()
def _maps(task: Task, images: Tensor, maps: Sequence[Map]) -> dict[str, Tensor]:
    """Scores (B, h, w) by map, from one forward pass."""
    features: list[Features] = []

    def run() -> Features:
        features.append(forward(task, images))
        return features[0]

    scores = {"attention": attention(task.encoder, run)} if "attention" in maps else {}
    given = features[0] if features else run()
    if "pca" in maps:
        scores["pca"] = principal(given.patches.float().unflatten(1, given.grid))
    return scores
