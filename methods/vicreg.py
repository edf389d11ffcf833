"""VICReg (Bardes, Ponce & LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning",
ICLR 2022).

The loss makes two views' embeddings agree, keeps the variance of each channel over the batch, and decorrelates the
channels. Shapes: B images of this process, N of all processes, D encoder width, K embedding width; two views of each
image.
"""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.flags import ABOVE_0_TO_1, FROM_0_BELOW_1, NOT_NEGATIVE, at_least, within
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.heads import mlp
from ssl_pretrain.parts.views import asymmetric_views, encode_pooled, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod

EPSILON = 1e-4  # under the root of the standard deviation (section 4.1, eq. 2)


@final
class VICReg(WholeBatchMethod):
    """Invariance, variance and covariance, weighted (section 4.1, eq. 6).

    Defaults are the paper's (section 4.2) and its release's: batch 2,048 on ImageNet with ResNet-50. Raises UserError for
    options out of range.
    """

    recipe = Recipe(
        optimizer="lars",
        lr=0.2,
        lr_batch=256,
        betas=(0.9, 0.999),
        weight_decay=1e-6,
        final_lr=2e-3,
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
        # The paper's weights over 25: the tolerances of gradients are absolute.
        tiny={"projector_dim": 32, "invariance_weight": 1.0, "variance_weight": 1.0, "covariance_weight": 0.04},
    )
    least_batch = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """VICReg."""

        projector_dim: int | None = None
        """Width of the projector's three layers, and so of the embeddings (default: by the encoder; 8,192 from ViT-B
        on)."""
        invariance_weight: float = 25.0
        """Weight of the mean squared distance between the two views."""
        variance_weight: float = 25.0
        """Weight of the hinge loss that keeps each channel's standard deviation at 1 or above."""
        covariance_weight: float = 1.0
        """Weight of the squared covariances of different channels."""
        crop_scale: tuple[float, float] = (0.08, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        blur: float = 1.0
        """Factor on the blur probabilities (1 and 0.1 for the two views); 0 is usual for images of 32 pixels."""
        token_drop: float = 0.0
        """Share of the patches that the encoder does not see (FLIP), drawn for each view; 0 in the last 5 % of a run."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, at_least(2), "projector_dim")
            within(self, NOT_NEGATIVE, "invariance_weight", "variance_weight", "covariance_weight", "blur")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "vicreg", config.token_drop)
        width = self.config.projector_dim
        self.projector = mlp((encoder.pooled_dim, width, width, width), last_bias=False)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {"projector_dim": sizes.width(8192, encoder.dim)}

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """BYOL's two kinds of view, as released: one is always blurred, the other is sometimes solarized."""
        return asymmetric_views(("first", "second"), image_size, config.crop_scale, config.blur)

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The encoder's vectors of the two views: "first" and "second", each (B, D)."""
        names = ("first", "second")
        seen = encode_pooled(self.encoder, [batch.views[name] for name in names], step, self.config.token_drop)
        return dict(zip(names, seen, strict=True))

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The weighted sum of "invariance", "variance" (the mean of both views') and "covariance" (the sum of both)."""
        first, second = (self.projector(embedded[name]).float() for name in ("first", "second"))
        invariance = distributed.mean((first - second).square().mean())
        spread = [_variance_and_covariance(view) for view in (first, second)]
        variance = (spread[0][0] + spread[1][0]) / 2
        covariance = spread[0][1] + spread[1][1]
        config = self.config
        return Losses(
            total=config.invariance_weight * invariance
            + config.variance_weight * variance
            + config.covariance_weight * covariance,
            terms={
                "invariance": invariance.detach(),
                "variance": variance.detach(),
                "covariance": covariance.detach(),
            },
        )

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The hinge of channels that do not vary at all."""
        return {"variance": (1 - math.sqrt(EPSILON), "all images get the same embedding")}


def _variance_and_covariance(view: Tensor) -> tuple[Tensor, Tensor]:
    """The variance hinge (eq. 1) and the covariance term (eq. 4) of one view's embeddings (B, K), float32, over the
    global batch; both () with gradients through the other processes' rows."""
    total = len(view) * distributed.size()
    with torch.autocast(view.device.type, enabled=False):
        centred = view - distributed.mean(view.mean(0))
        # One collective gives both: the variances are the diagonal.
        matrix = distributed.mean(centred.T @ centred / len(view)) * (total / (total - 1))  # (K, K)
    variances = matrix.diagonal()
    hinge = torch.relu(1 - (variances + EPSILON).sqrt()).mean()
    return hinge, (matrix.square().sum() - variances.square().sum()) / len(matrix)
