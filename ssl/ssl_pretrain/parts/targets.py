"""What a student predicts of each patch: a frozen teacher's features or HOG, how they are transformed, and the losses.

Shapes: B images, N patches of the student, L tokens, D channels of the target.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..backbones.backbone import Backbone, Features
from ..backbones.wrapping import INNER
from ..data.views import Reads, ViewSpec
from ..errors import UserError
from ..frozen import Frozen
from ..pretext import Batch, Step
from .align import resized
from .fitted_targets import Clusters, Fitted, Whitener
from .hog import hog, values

Kind = Literal["teacher", "hog"]
Transform = Literal["none", "layer_norm", "l2", "standardise", "phi_s", "kmeans"]
Loss = Literal["cosine", "smooth_l1", "mse", "kl", "cross_entropy"]


def networks(kind: Kind) -> tuple[str, ...]:
    """What `Method.frozen` gives for a target of this kind: the teacher, unless it is HOG."""
    return () if kind == "hog" else ("teacher",)


def with_teacher(kind: Kind, image: ViewSpec, reads: Reads | None = None) -> tuple[ViewSpec, ...]:
    """The student's view, and for a teacher the same pixels with as many patches. reads: what is read of the teacher, if
    that can be stored."""
    if kind == "hog":
        return (image,)
    return image, ViewSpec(name="teacher", of=image.name, size=image.size, network="teacher", reads=reads)


@final
class PatchTarget(nn.Module):
    """The target of every patch of the view "image": features of a frozen teacher that sees the same pixels, or HOG.

    A method calls `features`, then `transformed`. For the transforms of `parts.fitted_targets` it also puts what `carry`
    gives into `Losses.carry`, calls `after_step`, and passes its loss through `gated`.

    Attributes: `teacher`, None for HOG and before `prepare`; `width`, how many values a student predicts of a patch, D or
    the number of codes, after `prepare`; `cell`, pixels of a side of a HOG cell. Raises UserError for HOG cells that do not
    divide the patch.
    """

    def __init__(
        self,
        kind: Kind,
        encoder: Backbone,
        *,
        norm: Transform,
        block: int = -1,
        final_norm: bool = True,
        hog_cell: int = 8,
        images: int = 1024,
        codes: int = 512,
    ) -> None:
        """images: from which "standardise", "phi_s" and "kmeans" are learned. codes: number of clusters."""
        super().__init__()
        self.kind, self.norm, self.block, self.final_norm = kind, norm, block, final_norm
        self.images, self.codes = images, codes
        self.fitted: Fitted | None = None
        self.patch = encoder.stride
        self.teacher: Frozen | None = None
        self.width = 0
        self.cell = min(hog_cell, *(max(1, side // 2) for side in encoder.stride))
        if kind == "hog":
            if any(side % self.cell for side in encoder.stride):
                raise UserError(
                    f"--hog-cell {self.cell} does not divide the patch of {encoder.stride[0]} x {encoder.stride[1]}"
                )
            self._set_width(values(encoder.in_chans, encoder.stride, self.cell))

    def _set_width(self, features: int) -> None:
        """Make the transform of features of that many channels."""
        self.width = features
        if self.norm == "kmeans":
            self.width = self.codes
            self.fitted = Clusters(features, self.codes, self.images)
        elif self.norm in ("standardise", "phi_s"):
            self.fitted = Whitener(features, self.norm, self.images)

    def prepare(self, networks: Mapping[str, Frozen]) -> None:
        """Keep the teacher. Raises UserError for a block that it does not have."""
        if self.kind == "hog":
            return
        self.teacher = networks["teacher"]
        if self.block != -1 or not self.final_norm:
            check_block(self.teacher, self.block)
        self._set_width(self.teacher.dim)

    def forward(self, batch: Batch, grid: tuple[int, int]) -> Tensor:
        """The targets of a batch, whose student's images have this grid of patches."""
        return self.transformed(self.features(batch, grid))

    @torch.no_grad()
    def features(self, batch: Batch, grid: tuple[int, int]) -> Tensor:
        """The features of every patch before their transform: float32 (B, N, D)."""
        if self.teacher is None:
            return hog(batch.views["image"], self.patch, self.cell)
        seen = tap(self.teacher, batch.views["teacher"], self.block, self.final_norm)
        return resized(seen.patches.float(), seen.grid, grid)

    @torch.no_grad()
    def transformed(self, features: Tensor) -> Tensor:
        """Targets of features (B, N, D): float32 (B, N, D), or ids int64 (B, N) for "kmeans"."""
        return transformed(features, self.norm) if self.fitted is None else self.fitted(features)

    def carry(self, features: Tensor, step: Step) -> dict[str, Tensor]:
        """For `Losses.carry`: what `after_step` needs of the batch's features (B, N, D)."""
        return {} if self.fitted is None else self.fitted.carry(features, step)

    def after_step(self, step: Step) -> None:
        """Learn the transform, in the first steps."""
        if self.fitted is not None:
            self.fitted.after_step(step)

    def gated(self, loss: Tensor) -> Tensor:
        """A loss, times 0 as long as the transform is being learned."""
        return loss if self.fitted is None else loss * self.fitted.ready

    def relative(self, loss: Tensor, constant: Tensor) -> Tensor:
        """A loss () over that of a constant prediction (`spread`); 1 as long as the transform is being learned."""
        found = loss / constant
        return found if self.fitted is None else torch.where(self.fitted.ready, found, 1.0)


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
        raise UserError(
            f"--target-block {block}: {network.spec} gives the features of its last block only; leave --target-block out"
        )


def attention_maps(
    network: Frozen, images: Tensor, blocks: tuple[int, ...], *, keep: Tensor | None = None, logits: bool = False
) -> tuple[Tensor, ...]:
    """The attention (B, heads, L, L) float32 of blocks (-1: the last) for views (B, C, H, W), of the patches `keep` (B, K)
    alone if they are given: weights, or the logits before the softmax. Without gradients. See `check_attention`."""
    options = {} if keep is None else {"keep": keep}
    return network(images, attention_of=blocks, attention_logits=logits, **options).attention


def check_attention(flag: str, network: Frozen, *blocks: int) -> None:
    """Raise UserError where the network cannot give its attention, or has not these blocks. flag: of the command, that
    chose the blocks."""
    backbone, depth = network.backbone, network.backbone.depth
    if "attention_maps" not in backbone.supports:
        raise UserError(
            f"{flag}: {network.spec} gives no attention maps ({type(backbone).__name__}): use the export of a ViT"
        )
    for block in blocks:
        if not -depth <= block < depth:
            raise UserError(f"{flag} {block}: {network.spec} has {depth} blocks, {-depth} to {depth - 1}")


def transformed(targets: Tensor, how: Transform) -> Tensor:
    """Targets (..., D) in float32: unchanged, with mean 0 and variance 1 over D (a layer norm without affine, eps 1e-6), or
    of length 1. The other transforms need statistics: `parts.fitted_targets`."""
    targets = targets.float()
    if how == "layer_norm":
        return F.layer_norm(targets, targets.shape[-1:], eps=1e-6)
    return F.normalize(targets, dim=-1) if how == "l2" else targets


def distances(
    predicted: Tensor,
    targets: Tensor,
    loss: Loss,
    beta: float = 1.0,
    temperature: float = 1.0,
    smoothing: float = 0.0,
) -> Tensor:
    """The loss of each vector: predictions and targets (..., D) give float32 (...). For "cross_entropy" targets are ids
    (...) int64.

    "cosine": 1 - cosine. "smooth_l1": the mean over D of 0.5 d^2 / beta below beta, else d - beta / 2. "mse": the mean
    square over D. "kl": the divergence of the softmax over D of predictions / temperature from that of the targets, times
    the squared temperature, so that gradients keep their size (Hinton et al., 2015, section 2). "cross_entropy": with
    `smoothing` of the target spread over all D ids.
    """
    predicted = predicted.float()
    if loss == "cross_entropy":
        logits, ids = predicted.flatten(0, -2), targets.flatten()
        return F.cross_entropy(logits, ids, reduction="none", label_smoothing=smoothing).view(targets.shape)
    targets = targets.float()
    if loss == "cosine":
        return 1 - F.cosine_similarity(predicted, targets, dim=-1)
    if loss == "smooth_l1":
        return F.smooth_l1_loss(predicted, targets, reduction="none", beta=beta).mean(-1)
    if loss == "kl":
        own, other = (torch.log_softmax(each / temperature, dim=-1) for each in (predicted, targets))
        return (other.exp() * (other - own)).sum(-1) * temperature**2
    return (predicted - targets).square().mean(-1)


@torch.no_grad()
def spread(
    targets: Tensor,
    loss: Loss,
    beta: float = 1.0,
    temperature: float = 1.0,
    smoothing: float = 0.0,
    codes: int = 0,
) -> Tensor:
    """The loss () of predicting the same for all targets of all processes, (B, N, D) or ids (B, N) of `codes`: their mean,
    of unit vectors for "cosine", of distributions for "kl" and "cross_entropy"."""
    own = targets
    if loss == "cross_entropy":
        shares = distributed.mean(F.one_hot(targets, codes).float().mean((0, 1)))
        smoothed = (1 - smoothing) * shares + smoothing / codes
        return -torch.special.xlogy(smoothed, smoothed).sum()
    if loss == "kl":
        constant = distributed.mean(torch.softmax(own / temperature, dim=-1).mean((0, 1))).log() * temperature
    else:
        own = F.normalize(targets, dim=-1) if loss == "cosine" else targets
        constant = distributed.mean(own.mean((0, 1)))
    return distributed.mean(distances(constant.expand_as(own), own, loss, beta, temperature).mean())
