"""SwAV (Caron, Misra, Mairal, Goyal, Bojanowski & Joulin, "Unsupervised Learning of Visual Features by Contrasting
Cluster Assignments", NeurIPS 2020).

Views are assigned to prototypes by Sinkhorn-Knopp, balanced over the batch, and each view predicts the assignment of
the other views. Shapes: B images of this process, N of all processes, V views of each image, the first 2 of them
global, D encoder width, E embedding width, K prototypes, Q entries of the queue.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.flags import (
    ABOVE_0_TO_1,
    AT_LEAST_1,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    NOT_NEGATIVE,
    POSITIVE,
    at_least,
    within,
)
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.heads import Prototypes, l2_normalize, mlp
from ssl_pretrain.parts.self_distillation import cross_entropy_of_pairs
from ssl_pretrain.parts.sinkhorn import sinkhorn
from ssl_pretrain.parts.views import by_image, crop_size, encode_pooled, jitter, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod


@final
class SwAV(WholeBatchMethod):
    """Swapped prediction of Sinkhorn assignments (section 3.1) with multi-crop (section 3.2).

    Defaults are the paper's (appendix A) and its release's: 800 epochs of ImageNet at batch 4,096 with ResNet-50. Raises
    UserError for options out of range.
    """

    queue: Tensor

    recipe = Recipe(
        optimizer="lars",
        lr=4.8,
        lr_batch=4096,
        betas=(0.9, 0.999),
        weight_decay=1e-6,
        decay="all",
        final_lr=4.8e-3,
        warmup=10 / 800,
        encoder={"pool": "cls"},
        small={
            "optimizer": "adamw",
            "lr": 2e-3,
            "final_lr": 0.0,
            "warmup_steps": 15,
            "prototypes": 64,
            "hidden_dim": 512,
            "embedding_dim": 32,
            "epsilon": 0.02,
            "freeze_prototypes": 0.2,
            "local_views": 2,
            "global_scale": (0.3, 1.0),
            "local_scale": (0.15, 0.5),
            "local_ratio": 0.5,
            "colour": 0.5,
            "blur": 0.0,
            "patch_size": 8,
            "steps": 150,
        },
        tiny={"hidden_dim": 64, "embedding_dim": 16, "prototypes": 24, "local_views": 2, "queue": 24},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """SwAV."""

        prototypes: int | None = None
        """Number of prototypes (default: by the number of images; 3,000 for ImageNet-1k)."""
        hidden_dim: int | None = None
        """Width of the projection head's hidden layer (default: by the encoder; 2,048 from ViT-B on)."""
        embedding_dim: int = 128
        """Width of the embeddings that are compared with the prototypes."""
        temperature: float = 0.1
        """Temperature of the predictions."""
        epsilon: float = 0.05
        """Temperature of the assignments (Sinkhorn-Knopp); smaller values give harder assignments."""
        sinkhorn_iterations: int = 3
        """Number of Sinkhorn-Knopp iterations."""
        freeze_prototypes: float = 1 / 800
        """Share of the run, from its start, in which the prototypes are frozen (313 steps, one of 800 epochs)."""
        queue: int = 0
        """Length of each global view's queue, over all processes: embeddings of earlier images that are assigned
        together with the batch. 3840 for batches that are small compared with the prototypes; 0: no queue."""
        queue_start: float = 15 / 200
        """Share of the run after which the queue starts to fill; it is used once it is full."""
        local_views: int = 6
        """Number of small crops of each image."""
        global_scale: tuple[float, float] = (0.14, 1.0)
        """Smallest and largest share of the image's area that a global crop covers."""
        local_scale: tuple[float, float] = (0.05, 0.14)
        """Smallest and largest share of the image's area that a local crop covers."""
        local_ratio: float = 96 / 224
        """Side of a local view divided by that of a global view, rounded to a size that the encoder accepts."""
        colour: float = 1.0
        """Strength of the colour jitter."""
        blur: float = 0.5
        """Probability of blur; 0 is usual for images of 32 pixels."""
        interpolation: Literal["bicubic", "bilinear"] = "bicubic"
        """How crops are resized."""
        token_drop: float = 0.0
        """Share of the patches that the encoder does not see (FLIP), drawn for each view; 0 in the last 5 % of a run."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, at_least(2), "prototypes")
            within(self, AT_LEAST_1, "hidden_dim", "embedding_dim", "sinkhorn_iterations")
            within(self, POSITIVE, "temperature", "epsilon", "local_ratio")
            within(self, FROM_0_TO_1, "freeze_prototypes", "queue_start", "blur")
            within(self, NOT_NEGATIVE, "queue", "local_views", "colour")
            within(self, ABOVE_0_TO_1, "global_scale", "local_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "swav", config.token_drop)
        self.projector = mlp((encoder.pooled_dim, self.config.hidden_dim, config.embedding_dim))
        self.prototypes = Prototypes(config.embedding_dim, self.config.prototypes)
        with torch.no_grad():  # unit length, so that AdamW does not turn them faster than the projector's rows
            self.prototypes.weight.copy_(l2_normalize(self.prototypes.weight))
        # The newest come first; entries that are not filled yet are zero.
        self.register_buffer("queue", torch.zeros(2, config.queue, config.embedding_dim))

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {
            "prototypes": sizes.prototypes(3000, images, least=64),
            "hidden_dim": sizes.width(2048, encoder.dim),
        }

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """Two global crops and small ones, coloured alike (section 3.2 and appendix A)."""
        colour: dict[str, Any] = {"jitter": jitter(config.colour), "grayscale": 0.2, "blur": config.blur}
        colour["interpolation"] = config.interpolation
        large = ViewSpec(name="global", count=2, size=image_size, scale=config.global_scale, **colour)
        if not config.local_views:
            return (large,)
        small = crop_size(image_size, config.local_ratio)
        return (large, ViewSpec(name="local", count=config.local_views, size=small, scale=config.local_scale, **colour))

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The encoder's vectors of all views: "pooled" (B, V, D), global ones first."""
        count = self.config.local_views
        crops = [batch.views[name] for name in (("global", "local") if count else ("global",))]
        seen = encode_pooled(self.encoder, crops, step, self.config.token_drop)
        each = [by_image(pooled, views) for pooled, views in zip(seen, (2, count), strict=False)]
        return {"pooled": torch.cat(each, dim=1)}

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The mean cross-entropy over the pairs of a global view's assignment and another view's prediction
        (sections 3.1 and 3.2)."""
        pooled = embedded["pooled"].transpose(0, 1)  # (V, B, D)
        z = l2_normalize(self.projector(pooled.flatten(0, 1)))
        frozen = step.progress < self.config.freeze_prototypes
        scores = self.prototypes(z, frozen).unflatten(0, pooled.shape[:2]).float()  # (V, B, K)
        codes = self.assign(scores[:2].detach())
        each, entropy = cross_entropy_of_pairs(scores, codes, self.config.temperature)
        carry = {}
        if self.config.queue:
            places = torch.arange(step.batch_size, device=step.device)[step.rows]
            carry = {"z": by_image(z.detach(), len(pooled))[:, :2], "place": places}
        return Losses(total=each.mean(), terms={"code_entropy": entropy}, per_sample=each.detach(), carry=carry)

    @torch.no_grad()
    def assign(self, scores: Tensor) -> Tensor:
        """Assignments (2, B, K) of the global views, from similarities (2, B, K). Each is balanced over its global
        batch and, if the queue is full, its queue."""
        mine = self.queue[:, distributed.rank() :: distributed.size()]  # each process does a part
        full = self.queue[:, -1:].any()
        codes = []
        for own, earlier in zip(scores, mine, strict=True):
            both = torch.cat([own, self.prototypes(earlier).float()])
            counted = torch.cat([torch.ones(len(own), dtype=torch.bool, device=own.device), full.expand(len(earlier))])
            even = sinkhorn(both, self.config.epsilon, self.config.sinkhorn_iterations, counted)
            codes.append(even[: len(own)])
        return torch.stack(codes)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Put the batch's global views into the queue and remove the oldest entries (appendix A, "small batches")."""
        if not self.config.queue or step.progress < self.config.queue_start:
            return
        # In the order of the global batch, so that the queue is the same on any number of processes.
        order = distributed.gather(step.carried["place"]).argsort()
        seen = distributed.gather(step.carried["z"])[order].transpose(0, 1)  # (2, N, E)
        moved = torch.cat([seen.to(self.queue.dtype), self.queue], dim=1)[:, : self.config.queue]
        self.queue.copy_(torch.where(step.ok, moved, self.queue))

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """Predictions that prefer no prototype, and assignments that do not."""
        uniform = math.log(self.config.prototypes)
        return {
            "loss": (uniform, "the predictions are uniform over the prototypes"),
            "code_entropy": (uniform, "all images get the same embedding, so their assignments are uniform"),
        }
