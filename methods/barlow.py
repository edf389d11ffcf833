"""Barlow Twins (Zbontar, Jing, Misra, LeCun & Deny, "Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
ICML 2021).

The loss drives the cross-correlation of two views' embeddings, computed over the batch, to the identity. Shapes: B
images of this process, D encoder width, K embedding width; two views of each image.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.distributed.batch_norm import BatchNorm1d
from ssl_pretrain.flags import ABOVE_0_TO_1, FROM_0_BELOW_1, NOT_NEGATIVE, POSITIVE, at_least, within
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.heads import mlp
from ssl_pretrain.parts.views import asymmetric_views, encode_pooled, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod


@final
class BarlowTwins(WholeBatchMethod):
    """Each channel of one view's embedding agrees with the same channel of the other view's, and with no other (eq. 1).

    Defaults are the paper's (sections 2.2 and 5.1) and its release's: batch 2,048 on ImageNet with ResNet-50. Raises
    UserError for options out of range.
    """

    recipe = Recipe(
        optimizer="lars",
        lr=0.2,
        lr_batch=256,
        betas=(0.9, 0.999),
        weight_decay=1e-6,
        final_lr=1.6e-3,
        warmup=10 / 1000,
        encoder={"pool": "cls"},
        small={
            "optimizer": "adamw",
            "lr": 1e-3,
            "final_lr": 0.0,
            "warmup_steps": 15,
            "blur": 0.0,
            "crop_scale": (0.2, 1.0),
            "projector_dim": 512,
            "patch_size": 8,
            "steps": 200,
        },
        tiny={"projector_dim": 32},
    )
    least_batch = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Barlow Twins."""

        projector_dim: int | None = None
        """Width of the projector's three layers, and so of the embeddings (default: by the encoder; 8,192 from ViT-B
        on)."""
        redundancy_weight: float = 0.0051
        """Weight of the correlations between different channels (the paper's lambda)."""
        loss_scale: float = 0.024
        """Factor on the loss. The length of LARS' steps does not depend on it, except for biases and norms: there it
        replaces their own learning rate (0.0048 in the paper, with 0.2 for the weights)."""
        crop_scale: tuple[float, float] = (0.08, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        blur: float = 1.0
        """Factor on the blur probabilities (1 and 0.1 for the two views); 0 is usual for images of 32 pixels."""
        token_drop: float = 0.0
        """Share of the patches that the encoder does not see (FLIP), drawn for each view; 0 in the last 5 % of a run."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, at_least(2), "projector_dim")
            within(self, POSITIVE, "loss_scale")
            within(self, NOT_NEGATIVE, "redundancy_weight", "blur")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "barlow", config.token_drop)
        width = self.config.projector_dim
        self.projector = mlp((encoder.pooled_dim, width, width, width), last_bias=False)
        self.norm = BatchNorm1d(width, affine=False)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {"projector_dim": sizes.width(8192, encoder.dim)}

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """BYOL's two kinds of view: one is always blurred, the other is sometimes solarized (section 2.2)."""
        return asymmetric_views(("first", "second"), image_size, config.crop_scale, config.blur)

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The encoder's vectors of the two views: "first" and "second", each (B, D)."""
        names = ("first", "second")
        seen = encode_pooled(self.encoder, [batch.views[name] for name in names], step, self.config.token_drop)
        return dict(zip(names, seen, strict=True))

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """`loss_scale` * ("invariance" + `redundancy_weight` * "redundancy"): the sums of squares on and off the
        diagonal of (correlation - identity). Each view is normalised by its own statistics over the global batch."""
        first, second = (self.norm(self.projector(embedded[name]).float()) for name in ("first", "second"))
        with torch.autocast(first.device.type, enabled=False):
            correlation = distributed.mean(first.T @ second / len(first))  # (K, K)
        diagonal = correlation.diagonal()
        invariance = (diagonal - 1).square().sum()
        redundancy = correlation.square().sum() - diagonal.square().sum()
        return Losses(
            total=self.config.loss_scale * (invariance + self.config.redundancy_weight * redundancy),
            terms={"invariance": invariance.detach(), "redundancy": redundancy.detach()},
        )

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """Views that have nothing in common, and channels that are all the same."""
        k = self.config.projector_dim
        return {
            "invariance": (float(k), "the two views' embeddings are uncorrelated, or equal for all images"),
            "redundancy": (float(k * (k - 1)), "all channels of the embedding are equal, in both views"),
        }
