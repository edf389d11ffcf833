"""SimCLR (Chen, Kornblith, Norouzi & Hinton, "A Simple Framework for Contrastive Learning of Visual Representations",
ICML 2020), and decoupled contrastive learning (Yeh et al., ECCV 2022) as its loss.

Shapes: B images of this process, D encoder width, K embedding width; two views of each image.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, final

from torch import Tensor

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, FROM_0_BELOW_1, FROM_0_TO_1, NOT_NEGATIVE, POSITIVE, within
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.heads import mlp
from ssl_pretrain.parts.nt_xent import contrast
from ssl_pretrain.parts.views import by_image, encode_pooled, jitter, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod


@final
class SimCLR(WholeBatchMethod):
    """Identify each image's other view among all views of the batch (contrastive loss).

    Defaults are the paper's (section 2, appendix A and B.6): batch 4,096 on ImageNet with ResNet-50.
    """

    recipe = Recipe(
        optimizer="lars",
        lr=0.3,
        lr_batch=256,
        betas=(0.9, 0.999),
        weight_decay=1e-6,
        warmup=0.1,
        encoder={"pool": "cls"},
        small={
            "optimizer": "adamw",
            "lr": 5e-4,
            "temperature": 0.2,
            "blur": 0.0,
            "crop_scale": (0.2, 1.0),
            "hidden_dim": 512,
            "patch_size": 8,
            "steps": 200,
        },
        tiny={"hidden_dim": 64, "embedding_dim": 32},
    )
    least_batch = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """SimCLR."""

        loss: Literal["infonce", "dcl", "dclw"] = "infonce"
        """InfoNCE, or decoupled contrastive learning, plain or with weighted positives."""
        dcl_weights: Literal["gradient", "detached"] = "gradient"
        """Weights of dclw's positives: part of the gradient (as eq. 7 is written), or constants (lightly's)."""
        temperature: float = 0.1
        """Temperature of the similarities."""
        hidden_dim: int | None = None
        """Width of the projection head's hidden layer (default: by the encoder; 2,048 from ViT-B on)."""
        embedding_dim: int = 128
        """Width of the embeddings that are contrasted."""
        crop_scale: tuple[float, float] = (0.08, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        colour: float = 1.0
        """Strength of the colour jitter."""
        blur: float = 0.5
        """Probability of blur; 0 is usual for images of 32 pixels."""
        token_drop: float = 0.0
        """Share of the patches that the encoder does not see (FLIP), drawn for each view; 0 in the last 5 % of a run."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, POSITIVE, "temperature")
            within(self, AT_LEAST_1, "hidden_dim", "embedding_dim")
            within(self, NOT_NEGATIVE, "colour")
            within(self, FROM_0_TO_1, "blur")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "simclr", config.token_drop)
        self.projector = mlp((encoder.pooled_dim, self.config.hidden_dim, config.embedding_dim), last_norm="plain")

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {"hidden_dim": sizes.width(2048, encoder.dim)}

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """Two crops with strong colour (appendix A)."""
        return (
            ViewSpec(
                name="view",
                count=2,
                size=image_size,
                scale=config.crop_scale,
                jitter=jitter(config.colour),
                grayscale=0.2,
                blur=config.blur,
            ),
        )

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The encoder's vectors of both views: "pooled" (B, 2, D)."""
        (pooled,) = encode_pooled(self.encoder, [batch.views["view"]], step, self.config.token_drop)
        return {"pooled": by_image(pooled, 2)}

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The mean over both views of all images (eq. 1); `per_sample` is each image's."""
        pooled = embedded["pooled"]
        first, second = self.projector(pooled.transpose(0, 1).flatten(0, 1)).unflatten(0, (2, -1))
        each = contrast(
            first,
            second,
            self.config.temperature,
            self.config.loss,
            detach_weights=self.config.dcl_weights == "detached",
        )
        each = each.unflatten(0, (2, -1)).mean(0)
        return Losses(total=each.mean(), per_sample=each.detach())

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The loss if all similarities are equal."""
        others = 2 * batch_size - (1 if self.config.loss == "infonce" else 2)
        return {"loss": (math.log(others), "all views get the same embedding, so images cannot be distinguished")}
