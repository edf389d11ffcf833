"""LeJEPA (Balestriero & LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", 2025).

All views of an image predict the mean embedding of its global views. SIGReg drives the distribution of the embeddings
to an isotropic normal distribution. There is no teacher, no stop-gradient and no predictor. Shapes: B images of this
process, V views of each, D encoder width, K embedding width.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import Jitter, ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import (
    ABOVE_0_TO_1,
    AT_LEAST_1,
    BETWEEN_0_AND_1,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    NOT_NEGATIVE,
    POSITIVE,
    within,
)
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.heads import mlp
from ssl_pretrain.parts.sigreg import sigreg, sigreg_of_a_point
from ssl_pretrain.parts.views import by_image, crop_size, encode_pooled, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod


@final
class LeJEPA(WholeBatchMethod):
    """(1 - lambda) * prediction + lambda * SIGReg (section 5, algorithm 2).

    Defaults are the released ImageNet setting: 2 global and 6 local views, lambda 0.05, 1,024 directions.
    """

    recipe = Recipe(
        lr=5e-4,
        lr_scaling="none",
        betas=(0.9, 0.999),
        weight_decay=5e-2,
        final_lr=5e-7,
        warmup=0.01,
        encoder={"pool": "cls"},
        small={
            "lr": 2e-3,
            "warmup_steps": 20,
            "global_scale": (0.2, 1.0),
            "local_views": 0,
            "hidden_dim": 512,
            "blur": 0.0,
            "patch_size": 8,
            "steps": 200,
        },
        tiny={"hidden_dim": 64, "embedding_dim": 16, "slices": 32, "local_views": 2},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """LeJEPA."""

        sigreg_weight: float = 0.05
        """Weight of SIGReg (the paper's lambda); the prediction term has the weight 1 - lambda."""
        slices: int = 1024
        """Number of random directions of SIGReg; they are drawn again in every step."""
        global_views: int = 2
        """Number of large crops of each image; all views predict the mean of their embeddings."""
        local_views: int = 6
        """Number of small crops of each image."""
        global_scale: tuple[float, float] = (0.3, 1.0)
        """Smallest and largest share of the image's area that a global crop covers."""
        local_scale: tuple[float, float] = (0.05, 0.3)
        """Smallest and largest share of the image's area that a local crop covers."""
        local_ratio: float = 98 / 224
        """Side of a local view divided by that of a global view, rounded to a size that the encoder accepts."""
        hidden_dim: int | None = None
        """Width of the projector's two hidden layers (default: by the encoder; 2,048 from ViT-S on)."""
        embedding_dim: int = 64
        """Width of the embeddings."""
        blur: float = 0.5
        """Probability of blur; 0 is usual for images of 32 pixels."""
        token_drop: float = 0.0
        """Share of the patches that the encoder does not see (FLIP), drawn for each view; 0 in the last 5 % of a run."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, BETWEEN_0_AND_1, "sigreg_weight")
            within(self, AT_LEAST_1, "slices", "global_views", "hidden_dim", "embedding_dim")
            within(self, NOT_NEGATIVE, "local_views")
            within(self, POSITIVE, "local_ratio")
            within(self, FROM_0_TO_1, "blur")
            within(self, ABOVE_0_TO_1, "global_scale", "local_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "lejepa", config.token_drop)
        if config.global_views < 1 or config.global_views + config.local_views < 2:
            raise UserError("--global-views must be at least 1, and --global-views plus --local-views at least 2")
        hidden = self.config.hidden_dim
        self.projector = mlp((encoder.pooled_dim, hidden, hidden, config.embedding_dim))

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {"hidden_dim": sizes.width(2048, encoder.dim, full=sizes.VIT_SMALL)}

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """Global and local crops, coloured alike (section 6, as released)."""
        colour = {"jitter": Jitter(), "grayscale": 0.2, "blur": config.blur, "solarize": 0.2}
        large = ViewSpec(name="global", count=config.global_views, size=image_size, scale=config.global_scale, **colour)
        if not config.local_views:
            return (large,)
        small = crop_size(image_size, config.local_ratio)
        return (large, ViewSpec(name="local", count=config.local_views, size=small, scale=config.local_scale, **colour))

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The encoder's vectors of all views: "pooled" (B, V, D), global ones first."""
        counts = {"global": self.config.global_views, "local": self.config.local_views}
        seen = encode_pooled(
            self.encoder, [batch.views[name] for name, count in counts.items() if count], step, self.config.token_drop
        )
        each = [by_image(pooled, count) for pooled, count in zip(seen, filter(None, counts.values()), strict=True)]
        return {"pooled": torch.cat(each, dim=1)}

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """Terms "prediction", the mean squared distance to the centre of the global views, and "sigreg", the mean over
        views of SIGReg of the embeddings of that view."""
        pooled = embedded["pooled"].transpose(0, 1)  # (V, B, D)
        z = self.projector(pooled.flatten(0, 1)).unflatten(0, pooled.shape[:2]).float()
        centre = z[: self.config.global_views].mean(0)
        prediction = (z - centre).square().mean(dim=(0, 2))  # (B,)
        directions = step.shared_randn(z.shape[-1], self.config.slices)
        normality = sigreg(z, directions)
        weight = self.config.sigreg_weight
        return Losses(
            total=(1 - weight) * prediction.mean() + weight * normality,
            terms={"prediction": prediction.mean().detach(), "sigreg": normality.detach()},
            per_sample=(1 - weight) * prediction.detach() + weight * normality.detach(),
        )

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """SIGReg of one point, which is least for zero, so that embeddings that are all the same go there."""
        return {"sigreg": (sigreg_of_a_point(batch_size), "all images get the same embedding, which is zero")}
