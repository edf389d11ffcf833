"""SimSiam (Chen & He, "Exploring Simple Siamese Representation Learning", CVPR 2021).

Each view of an image predicts the other's projection, to which a stop-gradient is applied; no teacher, no negatives.
Shapes: B images of this process, two views of each, D encoder width, K embedding width.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, FROM_0_BELOW_1, FROM_0_TO_1, within
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.heads import l2_normalize, mlp
from ssl_pretrain.parts.views import encode_pooled, jitter, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod


@final
class SimSiam(WholeBatchMethod):
    """Predict the other view's projection with a stop-gradient; the negative cosine similarity is the loss.

    Defaults are the paper's (section 3, "baseline settings", and appendix A): batch 512, 100 epochs of ImageNet with
    ResNet-50.
    """

    recipe = Recipe(
        optimizer="sgd",
        lr=0.05,
        lr_batch=256,
        betas=(0.9, 0.999),
        weight_decay=1e-4,
        decay="all",
        warmup=0.0,
        encoder={"pool": "cls"},
        small={
            "optimizer": "adamw",
            "lr": 1e-3,
            "warmup_steps": 15,
            "hidden_dim": 512,
            "embedding_dim": 512,
            "bottleneck_dim": 128,
            "blur": 0.0,
            "patch_size": 8,
            "steps": 200,
        },
        tiny={"hidden_dim": 64, "embedding_dim": 32, "bottleneck_dim": 16},
    )
    least_batch = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """SimSiam."""

        hidden_dim: int | None = None
        """Width of the projector's two hidden layers (default: by the encoder; 2,048 from ViT-B on)."""
        embedding_dim: int | None = None
        """Width of the projections that are predicted (default: by the encoder; 2,048 from ViT-B on)."""
        bottleneck_dim: int | None = None
        """Width of the predictor's hidden layer (default: by the encoder; 512 from ViT-B on)."""
        crop_scale: tuple[float, float] = (0.2, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        blur: float = 0.5
        """Probability of blur; 0 is usual for images of 32 pixels."""
        token_drop: float = 0.0
        """Share of the patches that the encoder does not see (FLIP), drawn for each view; 0 in the last 5 % of a run."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, AT_LEAST_1, "hidden_dim", "embedding_dim", "bottleneck_dim")
            within(self, FROM_0_TO_1, "blur")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "simsiam", config.token_drop)
        hidden, width = self.config.hidden_dim, self.config.embedding_dim
        # The last norm is without gain and shift, as released; the predictor's output has no norm (section 4.4).
        self.projector = mlp((encoder.pooled_dim, hidden, hidden, width), last_norm="plain")
        self.predictor = mlp((width, self.config.bottleneck_dim, width))

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {
            "hidden_dim": sizes.width(2048, encoder.dim),
            "embedding_dim": sizes.width(2048, encoder.dim),
            "bottleneck_dim": sizes.width(512, encoder.dim),
        }

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """Two crops with colour augmentation (appendix A, "data augmentation")."""
        return (
            ViewSpec(
                name="view",
                count=2,
                size=image_size,
                scale=config.crop_scale,
                interpolation="bilinear",
                jitter=jitter(0.5),
                grayscale=0.2,
                blur=config.blur,
            ),
        )

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The encoder's vectors of both views: "pooled" (B, 2, D)."""
        # Two batches: if the encoder has batch norm, its statistics are those of one view, as in the paper.
        return {
            "pooled": torch.stack(
                encode_pooled(self.encoder, batch.views["view"].unbind(0), step, self.config.token_drop), dim=1
            )
        }

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The negative cosine similarity of prediction and stopped projection, the mean of both directions (eq. 4)."""
        first, second = (self.projector(view) for view in embedded["pooled"].unbind(1))
        each = (self._distance(first, second) + self._distance(second, first)) / 2
        return Losses(total=each.mean(), per_sample=each.detach())

    def _distance(self, source: Tensor, target: Tensor) -> Tensor:
        """(B,) negative cosine similarities of what `source` (B, K) predicts and `target` (B, K), held constant."""
        return -(l2_normalize(self.predictor(source)) * l2_normalize(target.detach())).sum(-1)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The smallest possible value: no real pair of views is predicted so well. It needs two vectors, one and its
        opposite: with a single vector the projector's last batch norm would give zero."""
        words = "every view predicts the other perfectly, all images get the same embedding or its opposite"
        return {"loss": (-1.0, words)}
