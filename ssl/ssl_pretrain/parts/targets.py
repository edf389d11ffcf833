"""What a student predicts of a frozen network: where the network is tapped, how targets are transformed, and the losses.

Shapes: B images, L tokens, D channels of the target.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.backbone import Features
from ..backbones.wrapping import INNER
from ..errors import UserError
from ..frozen import Frozen

Transform = Literal["none", "layer_norm", "l2"]
Loss = Literal["cosine", "smooth_l1", "mse"]


def tap(network: Frozen, images: Tensor, block: int, normed: bool) -> Features:
    """The features of views (B, C, H, W), with `patches` and `cls` of a block (-1: the last), after the final norm
    or, if not `normed`, before it. Without gradients. Raises UserError for a block that the network does not have."""
    depth = network.backbone.depth
    if block in (-1, depth - 1) and normed:
        return network(images)
    check_block(network, block)
    seen = network(images, blocks=(block,))
    tokens = seen.blocks[0]
    if normed:
        tokens = final_norm(network, tokens)
    prefix = tokens.shape[1] - seen.patches.shape[1]
    return Features(
        cls=None if seen.cls is None else tokens[:, 0], patches=tokens[:, prefix:], grid=seen.grid, pooled=seen.pooled
    )


def last_blocks(network: Frozen, images: Tensor, count: int) -> Features:
    """The features of views (B, C, H, W), with the `patches` of the last `count` blocks after the final norm side by side:
    (B, N, count * D). Without gradients."""
    if count == 1:
        return network(images)
    seen = network(images, blocks=tuple(range(-count, -1)))
    prefix = seen.blocks[0].shape[1] - seen.patches.shape[1]
    earlier = [final_norm(network, tokens)[:, prefix:] for tokens in seen.blocks]
    return replace(seen, patches=torch.cat([*earlier, seen.patches], dim=-1), blocks=())


@torch.no_grad()
def final_norm(network: Frozen, tokens: Tensor) -> Tensor:
    """Tokens (B, L, D) of a block after the network's final norm."""
    inner: Any = getattr(network.backbone, INNER, network.backbone)  # a model of timm is inside
    after_pooling = getattr(inner, "fc_norm", None)  # the final norm of timm's models that pool before it
    return inner.norm(tokens) if after_pooling is None else after_pooling(inner.norm(tokens))


def check_block(network: Frozen, block: int) -> None:
    """Raise UserError where the network has no such block, or cannot give its output."""
    depth = network.backbone.depth
    if not -depth <= block < depth:
        raise UserError(f"--target-block {block}: {network.spec} has {depth} blocks, {-depth} to {depth - 1}")
    if "blocks" not in network.backbone.supports:
        raise UserError(f"--target-block {block}: {network.spec} gives the features of its last block only")


def transformed(targets: Tensor, how: Transform) -> Tensor:
    """Targets (..., D) in float32: unchanged, with mean 0 and variance 1 over D (a layer norm without affine, eps 1e-6), or
    of length 1."""
    targets = targets.float()
    if how == "layer_norm":
        return F.layer_norm(targets, targets.shape[-1:], eps=1e-6)
    return F.normalize(targets, dim=-1) if how == "l2" else targets


def distances(predicted: Tensor, targets: Tensor, loss: Loss, beta: float = 1.0) -> Tensor:
    """The loss of each vector: predictions and targets (..., D) give float32 (...).

    "cosine": 1 - cosine. "smooth_l1": the mean over D of 0.5 d^2 / beta below beta, else d - beta / 2. "mse": the mean
    square over D.
    """
    predicted, targets = predicted.float(), targets.float()
    if loss == "cosine":
        return 1 - F.cosine_similarity(predicted, targets, dim=-1)
    if loss == "smooth_l1":
        return F.smooth_l1_loss(predicted, targets, reduction="none", beta=beta).mean(-1)
    return (predicted - targets).square().mean(-1)
