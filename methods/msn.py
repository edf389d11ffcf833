"""Masked Siamese Networks (Assran et al., "Masked Siamese Networks for Label-Efficient Learning", ECCV 2022).

Anchors (views with dropped patches, and small crops) are trained to match the soft assignment to prototypes that an EMA
of the network gives to the whole image. Shapes: B images of this process, A anchor views of each, D encoder width, E
embedding width, K prototypes, P patches of a view.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
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
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.ema_teacher import EncoderWithHeads, ema_copy, ema_update_
from ssl_pretrain.parts.heads import Prototypes, mlp
from ssl_pretrain.parts.masks import random_masking
from ssl_pretrain.parts.patches import without
from ssl_pretrain.parts.self_distillation import warmed_up
from ssl_pretrain.parts.sinkhorn import sinkhorn
from ssl_pretrain.parts.views import by_image, crop_size, encode_pooled, jitter
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod


@final
class MSN(WholeBatchMethod):
    """Match the soft assignments of masked anchors to the sharpened one of the target; the exported encoder is the
    target's.

    Defaults are the released ones for ViT-S/16 (section 4 and appendix). Raises UserError for options out of range and
    UnsupportedByBackbone for an encoder that cannot drop tokens, where `drop_ratio` is above 0.
    """

    recipe = Recipe(
        lr=1e-3,
        lr_batch=1024,
        betas=(0.9, 0.999),
        weight_decay=0.04,
        final_weight_decay=0.4,
        final_lr=1e-6,
        clip_grad=3.0,
        warmup=15 / 800,
        encoder={"pool": "cls"},
        small={
            "lr": 1e-3,
            "final_lr": 0.0,
            "warmup_steps": 15,
            "prototypes": 64,
            "hidden_dim": 512,
            "embedding_dim": 64,
            "local_views": 2,
            "local_scale": (0.15, 0.5),
            "local_ratio": 0.5,
            "blur": 0.0,
            "momentum": 0.9,
            "patch_size": 8,
            "steps": 150,
        },
        tiny={"hidden_dim": 64, "embedding_dim": 16, "prototypes": 24, "local_views": 2},
    )
    least_batch = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Masked Siamese networks (MSN)."""

        prototypes: int | None = None
        """Number of learnable prototypes (default: by the number of images; 1,024 for ImageNet-1k)."""
        hidden_dim: int | None = None
        """Width of the head's two hidden layers (default: by the encoder; 2,048 from ViT-S on)."""
        embedding_dim: int = 256
        """Width of the vectors that are compared with the prototypes."""
        temperature: float = 0.1
        """Temperature of the anchors' softmax."""
        sharpening: float = 0.25
        """The temperature of the target's softmax is this times the anchors' temperature."""
        sinkhorn: bool = True
        """Balance the targets over the prototypes with Sinkhorn-Knopp."""
        entropy_weight: float = 1.0
        """Weight of the entropy of the mean prediction, which is maximised (the paper's lambda)."""
        drop_ratio: float = 0.15
        """Masking ratio: share of the patches that are dropped from the large anchor view; 0: none."""
        momentum: float = 0.996
        """The target's momentum at the start; it rises to 1 linearly."""
        local_views: int = 10
        """Number of small anchor crops of each image ("focal" views)."""
        global_scale: tuple[float, float] = (0.3, 1.0)
        """Smallest and largest share of the image's area that a large crop covers."""
        local_scale: tuple[float, float] = (0.05, 0.3)
        """Smallest and largest share of the image's area that a small crop covers."""
        local_ratio: float = 96 / 224
        """Side of a small view divided by that of a large view, rounded to a size that the encoder accepts."""
        blur: float = 0.5
        """Probability of blur; 0 is usual for images of 32 pixels."""
        interpolation: Literal["bicubic", "bilinear"] = "bicubic"
        """How crops are resized."""

        def __post_init__(self) -> None:
            within(self, at_least(2), "prototypes")
            within(self, AT_LEAST_1, "hidden_dim", "embedding_dim")
            within(self, POSITIVE, "temperature", "sharpening", "local_ratio")
            within(self, NOT_NEGATIVE, "entropy_weight", "local_views")
            within(self, FROM_0_BELOW_1, "drop_ratio", "momentum")
            within(self, FROM_0_TO_1, "blur")
            within(self, ABOVE_0_TO_1, "global_scale", "local_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        if config.drop_ratio:
            encoder.require("msn", "keep")
            h, w = (size // side for size, side in zip(encoder.image_size, encoder.stride, strict=True))
            if self.kept(h * w) < 1:
                raise UserError(f"--drop-ratio {config.drop_ratio} leaves none of the {h} x {w} patches")
        hidden = self.config.hidden_dim
        self.head = mlp((encoder.pooled_dim, hidden, hidden, config.embedding_dim), activation=nn.GELU)
        self.prototypes = Prototypes(config.embedding_dim, self.config.prototypes)
        # As released: larger than those of DINO, so that AdamW changes their directions more slowly.
        bound = config.embedding_dim**-0.5
        nn.init.uniform_(self.prototypes.weight, -bound, bound)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """The target network begins as the one that is trained."""
        self.teacher = ema_copy(EncoderWithHeads({"encoder": self.encoder, "head": self.head}))

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {
            "prototypes": sizes.prototypes(1024, images, least=64),
            "hidden_dim": sizes.width(2048, encoder.dim, full=sizes.VIT_SMALL),
        }

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """The target's crop and the large anchor's, of one kind, and the small anchors' (section 4, as released)."""
        colour: dict[str, Any] = {"jitter": jitter(0.5), "grayscale": 0.2, "blur": config.blur}
        colour["interpolation"] = config.interpolation
        views = tuple(
            ViewSpec(name=name, size=image_size, scale=config.global_scale, **colour) for name in ("target", "anchor")
        )
        if not config.local_views:
            return views
        small = crop_size(image_size, config.local_ratio)
        return (
            *views,
            ViewSpec(name="local", count=config.local_views, size=small, scale=config.local_scale, **colour),
        )

    def kept(self, patches: int) -> int:
        """How many of the large anchor's patches the encoder sees: rounded down."""
        return int(patches * (1 - self.config.drop_ratio))

    def masks(self, view: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Indices of the patches of the large anchor view (B, C, H, W) that are kept (B, K) and dropped (B, N - K)."""
        (height, width), (p, q) = view.shape[-2:], self.encoder.stride
        patches = (height // p) * (width // q)
        return random_masking(step.rand(patches), self.kept(patches))

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The encoder's vectors of all anchors "anchors" (B, A, D), the large one first, and the target encoder's of the
        target view, "target" (B, D), without gradient."""
        view, options = batch.views["anchor"], {}
        if self.config.drop_ratio:
            options["keep"], _ = self.masks(view, step)
        count = self.config.local_views
        seen = encode_pooled(self.encoder, [view, batch.views["local"]] if count else [view], step, **options)
        anchors = [by_image(pooled, views) for pooled, views in zip(seen, (1, count), strict=False)]
        with torch.no_grad():
            (target,) = encode_pooled(self.teacher.backbone, [batch.views["target"]], step)
        return {"anchors": torch.cat(anchors, dim=1), "target": target}

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The cross-entropy of the anchors' assignments and the target's, minus `entropy_weight` times the entropy of
        their mean over the global batch (eq. 1). Term "unevenness" is ln K (the largest value) minus that entropy."""
        anchors = embedded["anchors"].transpose(0, 1)  # (A, B, D)
        scores = self.prototypes(self.head(anchors.flatten(0, 1))).float() / self.config.temperature
        with torch.no_grad():
            wanted = self.assign(self.prototypes(self.teacher["head"](embedded["target"])).float())
        logs = F.log_softmax(scores, dim=-1).unflatten(0, anchors.shape[:2])  # (A, B, K)
        each = -(wanted * logs).sum(-1).mean(0)  # (B,)
        mean = distributed.mean(logs.exp().mean((0, 1)))  # (K,)
        unevenness = math.log(len(mean)) + (mean * mean.clamp_min(1e-30).log()).sum()
        entropy = torch.special.entr(wanted).sum(-1).mean()
        return Losses(
            total=each.mean() + self.config.entropy_weight * unevenness,
            terms={
                "cross_entropy": each.mean().detach(),
                "unevenness": unevenness.detach(),
                "target_entropy": entropy,
            },
            per_sample=each.detach() + self.config.entropy_weight * unevenness.detach(),
        )

    def assign(self, similarities: Tensor) -> Tensor:
        """The target's distributions (B, K) from its similarities to the prototypes: sharpened (section 3, "target
        predictions"), and balanced by Sinkhorn-Knopp if `sinkhorn`."""
        logs = F.log_softmax(similarities / (self.config.temperature * self.config.sharpening), dim=-1)
        return sinkhorn(logs, 1.0) if self.config.sinkhorn else logs.exp()

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """The target network follows the trained one."""
        trained = EncoderWithHeads({"encoder": self.encoder, "head": self.head})
        ema_update_(self.teacher, trained, warmed_up(self.config.momentum, 1.0, 1.0, step.progress), step.ok)

    def exported(self) -> Backbone:
        """The target's encoder."""
        return self.teacher.backbone

    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The large anchor view, and what the encoder sees of it, (n, C, H, W); nothing if no patch is dropped."""
        if not self.config.drop_ratio:
            return {}
        view = batch.views["anchor"]
        kept, dropped = self.masks(view, step)
        hidden = torch.zeros(len(view), kept.shape[1] + dropped.shape[1], dtype=torch.bool, device=view.device)
        return {"anchor": view, "masked": without(view, hidden.scatter(1, dropped, True), self.encoder.stride)}

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """Uniform assignments, and one prototype for all."""
        uniform = math.log(self.config.prototypes)
        return {
            "cross_entropy": (uniform, "anchors and targets give every image the uniform distribution"),
            "unevenness": (uniform, "all images are assigned to one prototype"),
            "target_entropy": (uniform, "the targets are uniform over the prototypes"),
        }
