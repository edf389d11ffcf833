"""NNCLR (Dwibedi et al., "With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual
Representations", ICCV 2021), and decoupled contrastive learning (Yeh et al., ECCV 2022) as its loss.

The positive of an image is the nearest neighbour of its other view in a queue of recent embeddings of other images.
Shapes: B images of this process, N of all processes, two views of each, M entries of the queue, D encoder width, K
embedding width.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, FROM_0_BELOW_1, NOT_NEGATIVE, POSITIVE, within
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.feature_queue import Queue
from ssl_pretrain.parts.heads import l2_normalize, mlp
from ssl_pretrain.parts.views import asymmetric_views, encode_pooled, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod


@final
class NNCLR(WholeBatchMethod):
    """Contrast the nearest neighbour of one view's projection with the predictions of the other view.

    Defaults are the paper's (sections 3.2 and 4.1): batch 4,096, 1,000 epochs of ImageNet with ResNet-50. Raises
    UserError for options out of range.
    """

    recipe = Recipe(
        optimizer="lars",
        lr=0.3,
        lr_batch=256,
        betas=(0.9, 0.999),
        weight_decay=1e-6,
        warmup=10 / 1000,
        encoder={"pool": "cls"},
        small={
            "optimizer": "adamw",
            "lr": 1e-3,
            "warmup_steps": 15,
            "queue": 2048,
            "hidden_dim": 512,
            "predictor_dim": 512,
            "embedding_dim": 128,
            "blur": 0.0,
            "crop_scale": (0.2, 1.0),
            "patch_size": 8,
            "steps": 200,
        },
        tiny={"queue": 40, "hidden_dim": 64, "predictor_dim": 64, "embedding_dim": 16, "temperature": 0.5},
    )
    least_batch = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """NNCLR."""

        loss: Literal["infonce", "dcl"] = "infonce"
        """InfoNCE, or decoupled: without the positive in the denominator."""
        temperature: float = 0.1
        """Temperature of the similarities."""
        queue: int | None = None
        """Length of the queue of embeddings in which neighbours are searched (default: by the number of images; 98,304
        for ImageNet-1k)."""
        hidden_dim: int | None = None
        """Width of the projector's two hidden layers (default: by the encoder; 2,048 from ViT-B on)."""
        predictor_dim: int | None = None
        """Width of the predictor's hidden layer (default: by the encoder; 4,096 from ViT-B on)."""
        embedding_dim: int = 256
        """Width of the embeddings."""
        crop_scale: tuple[float, float] = (0.08, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        blur: float = 1.0
        """Factor on the blur probabilities (1 and 0.1 for the two views); 0 is usual for images of 32 pixels."""
        token_drop: float = 0.0
        """Share of the patches that the encoder does not see (FLIP), drawn for each view; 0 in the last 5 % of a run."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, POSITIVE, "temperature")
            within(self, AT_LEAST_1, "queue", "hidden_dim", "predictor_dim", "embedding_dim")
            within(self, NOT_NEGATIVE, "blur")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "nnclr", config.token_drop)
        hidden, width = self.config.hidden_dim, config.embedding_dim
        self.projector = mlp((encoder.pooled_dim, hidden, hidden, width), last_norm="affine")
        self.predictor = mlp((width, self.config.predictor_dim, width))
        self.queue = Queue(self.config.queue, width)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {
            "queue": sizes.at_most_a_share(98304, images, 1 / 2),
            "hidden_dim": sizes.width(2048, encoder.dim),
            "predictor_dim": sizes.width(4096, encoder.dim),
        }

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """BYOL's two crops: one is always blurred, the other is sometimes solarized."""
        return asymmetric_views(("view1", "view2"), image_size, config.crop_scale, config.blur)

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The encoder's vectors of both views: "pooled" (B, 2, D)."""
        # Two batches: if the encoder has batch norm, its statistics are those of one view, as in the paper.
        views = [batch.views["view1"], batch.views["view2"]]
        return {"pooled": torch.stack(encode_pooled(self.encoder, views, step, self.config.token_drop), dim=1)}

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """InfoNCE of each view's neighbours with the other's predictions, the mean of both directions (eq. 3)."""
        projected = [self.projector(view) for view in embedded["pooled"].unbind(1)]
        predicted = [l2_normalize(self.predictor(z)) for z in projected]
        vectors = [l2_normalize(z.detach()) for z in projected]
        neighbours = [self.queue.nearest(z) for z in vectors]
        each = (self._contrast(neighbours[0], predicted[1]) + self._contrast(neighbours[1], predicted[0])) / 2
        places = torch.arange(step.batch_size, device=step.device)[step.rows]
        carry = {"projected": vectors[0], "place": places}
        return Losses(total=each.mean(), per_sample=each.detach(), carry=carry)

    def _contrast(self, neighbours: Tensor, predicted: Tensor) -> Tensor:
        """(B,) losses of finding each neighbour's (B, K) own prediction among those (B, K) of all processes; unit rows."""
        with torch.autocast(predicted.device.type, enabled=False):
            scores = neighbours @ distributed.gather(predicted).T / self.config.temperature  # (B, N)
        own = torch.arange(len(scores), device=scores.device)[:, None] + distributed.rank() * len(scores)
        positive = scores.gather(1, own).squeeze(1)
        if self.config.loss == "dcl":
            scores = scores.scatter(1, own, -torch.inf)
        return scores.logsumexp(1) - positive

    def after_step(self, step: Step) -> None:
        """The first views' projections of the global batch take the place of the oldest in the queue (algorithm 1)."""
        # In the order of the global batch, so that the queue is the same on any number of processes and micro-batches.
        order = distributed.gather(step.carried["place"]).argsort()
        self.queue.put_(distributed.gather(step.carried["projected"])[order], step.ok)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The loss if all similarities are equal."""
        told_from = batch_size if self.config.loss == "infonce" else batch_size - 1
        return {"loss": (math.log(told_from), "all views get the same embedding, so images cannot be distinguished")}
