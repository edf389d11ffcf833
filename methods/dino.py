"""DINO (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021).

A student sees all crops of an image; its EMA teacher sees only the large ones. The student predicts the teacher's soft
assignment to K prototypes from every other crop. Shapes: B images of this process, V views of each, G of them global, D
encoder width, K prototypes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

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
from ssl_pretrain.parts import anchor, sizes
from ssl_pretrain.parts.ema_teacher import EncoderWithHeads, cosine_momentum, ema_copy, ema_update_
from ssl_pretrain.parts.heads import PrototypeHead
from ssl_pretrain.parts.self_distillation import cross_entropy_of_pairs, update_centering_, warmed_up
from ssl_pretrain.parts.views import encode_crops, encode_pooled, multi_crop, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class DINO(Method):
    """Self-distillation with no labels; the exported encoder is the teacher's.

    Defaults are the paper's for ViT-S/16 (section 3 and appendix), and the released code's where the two differ. Raises
    UserError for options out of range.
    """

    centre: Tensor

    recipe = Recipe(
        lr=5e-4,
        lr_batch=256,
        betas=(0.9, 0.999),
        weight_decay=0.04,
        final_weight_decay=0.4,
        final_lr=1e-6,
        clip_grad=3.0,
        clip_each=True,
        warmup=0.1,
        encoder={"drop_path": 0.1, "pool": "cls"},
        small={
            "lr": 5e-4,
            "batch_size": 32,
            "drop_path": 0.0,
            "prototypes": 128,
            "hidden_dim": 512,
            "local_views": 2,
            "blur": 0.0,
            "momentum": 0.97,
            "patch_size": 8,
            "steps": 600,
        },
        tiny={"hidden_dim": 64, "bottleneck_dim": 16, "prototypes": 48, "local_views": 2},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """DINO."""

        prototypes: int | None = None
        """Number of prototypes (outputs of the head) (default: by the number of images; 65,536 for ImageNet-1k)."""
        hidden_dim: int | None = None
        """Width of the head's two hidden layers (default: by the encoder; 2,048 from ViT-S on)."""
        bottleneck_dim: int = 256
        """Width of the bottleneck vectors that are compared with the prototypes."""
        momentum: float = 0.996
        """Teacher's momentum at the start; it goes to the final one along half a cosine."""
        final_momentum: float = 1.0
        """Teacher's momentum at the end. A constant momentum (the same number twice) suits short continued runs."""
        student_temperature: float = 0.1
        """Temperature of the student's softmax."""
        teacher_temperature: float = 0.04
        """Temperature of the teacher's softmax at the end of its warm-up."""
        teacher_temperature_start: float = 0.04
        """Temperature of the teacher's softmax at the start; long runs of the paper warm up from 0.04 to 0.07."""
        teacher_temperature_warmup: float = 0.1
        """Share of the run in which the teacher's temperature goes from start to end."""
        centre_momentum: float = 0.9
        """Momentum of the moving average of the teacher's outputs (centering)."""
        freeze_prototypes: float = 0.01
        """Share of the run, from its start, in which the prototypes are frozen (1 of 100 epochs)."""
        local_views: int = 8
        """Number of small crops of each image."""
        global_scale: tuple[float, float] = (0.4, 1.0)
        """Smallest and largest share of the image's area that a global crop covers."""
        local_scale: tuple[float, float] = (0.05, 0.4)
        """Smallest and largest share of the image's area that a local crop covers."""
        local_ratio: float = 96 / 224
        """Side of a local view divided by that of a global view, rounded to a size that the encoder accepts."""
        blur: float = 1.0
        """Factor on the blur probabilities (1, 0.1 and 0.5 for the two global and the local views); 0 is usual for
        images of 32 pixels."""
        anchor: Literal["none", "gram", "features", "weights"] = "none"
        """Loss that keeps the encoder near the start weights of --init-from (or near --teacher): the similarities between
        patches (Gram matrices), the features, the weights, or none."""
        anchor_weight: float = 1.0
        """Weight of the anchor's loss."""
        anchor_zoom: float = 1.0
        """Side of the images that the anchor's frozen network sees, over that of the crops (DINOv3's Gram teacher: 2)."""
        token_drop: float = 0.0
        """Share of the patches that the student does not see (FLIP), drawn for each view; 0 in the last 5 % of a run."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, at_least(2), "prototypes")
            within(self, AT_LEAST_1, "hidden_dim", "bottleneck_dim")
            within(self, FROM_0_BELOW_1, "momentum")
            within(self, FROM_0_TO_1, "final_momentum")
            within(self, POSITIVE, "student_temperature", "teacher_temperature", "teacher_temperature_start")
            within(self, POSITIVE, "local_ratio")
            within(self, FROM_0_TO_1, "teacher_temperature_warmup", "centre_momentum", "freeze_prototypes")
            within(self, NOT_NEGATIVE, "local_views", "blur")
            within(self, ABOVE_0_TO_1, "global_scale", "local_scale", ascending=True)
            within(self, NOT_NEGATIVE, "anchor_weight")
            within(self, POSITIVE, "anchor_zoom")

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        if config.token_drop > 0 and config.anchor in ("gram", "features"):
            raise UserError(
                f"--anchor {config.anchor} compares all patches of the student, and --token-drop hides some: leave one out"
            )
        require_token_drop(encoder, "dino", config.token_drop)
        self.head = PrototypeHead(
            encoder.pooled_dim, self.config.hidden_dim, config.bottleneck_dim, self.config.prototypes
        )
        self.register_buffer("centre", torch.zeros(self.config.prototypes))

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """The teacher begins as the student."""
        self.teacher = ema_copy(EncoderWithHeads({"encoder": self.encoder, "head": self.head}))
        self.anchor = anchor.make(self.config.anchor, self.encoder, networks)

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The start weights, for an anchor."""
        return anchor.networks(config.anchor)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {
            "prototypes": sizes.prototypes(65536, images, least=128),
            "hidden_dim": sizes.width(2048, encoder.dim, full=sizes.VIT_SMALL),
        }

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """Two global crops, one always blurred and the other sometimes solarized, and local ones (appendix E)."""
        crops = multi_crop(
            image_size,
            global_scale=config.global_scale,
            local_scale=config.local_scale,
            local_views=config.local_views,
            local_ratio=config.local_ratio,
            blur=(1.0 * config.blur, 0.1 * config.blur, 0.5 * config.blur),
        )
        return (*crops, *anchor.twins(config.anchor, crops[:2], config.anchor_zoom))

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The mean cross-entropy over the pairs of a teacher's view and another view of the student (eq. 3)."""
        views = torch.stack([batch.views["global1"], batch.views["global2"]])
        crops = [views, batch.views["local"]] if self.config.local_views else [views]
        anchored = None
        if self.anchor is not None and self.anchor.sees:
            seen = encode_crops(self.encoder, crops, step)
            vectors = torch.cat([each.pooled for each in seen])
            twins = torch.stack([batch.views["global1_anchor"], batch.views["global2_anchor"]])
            anchored = self.anchor(seen[0], twins).unflatten(0, (2, -1)).mean(0)
        else:
            vectors = torch.cat(encode_pooled(self.encoder, crops, step, self.config.token_drop))
        student = self.head(vectors, frozen=step.progress < self.config.freeze_prototypes)
        with torch.no_grad():
            (vectors,) = encode_pooled(self.teacher.backbone, [views], step)
            teacher = self.teacher["head"](vectors).to(self.centre.dtype)
        b = len(batch.index)
        each, entropy = cross_entropy_of_pairs(
            student.unflatten(0, (-1, b)),
            torch.softmax((teacher - self.centre) / self.temperature(step), dim=-1).unflatten(0, (2, b)),
            self.config.student_temperature,
        )
        losses = Losses(
            total=each.mean(),
            terms={"teacher_entropy": entropy},
            per_sample=each.detach(),
            carry={"teacher": teacher.mean(0, keepdim=True)},
        )
        if self.anchor is not None:
            losses.terms["pairs"] = losses.total.detach()
            self.anchor.add(losses, self.config.anchor_weight, anchored)
        return losses

    def temperature(self, step: Step) -> float:
        """The teacher's temperature in this step."""
        start, end = self.config.teacher_temperature_start, self.config.teacher_temperature
        return warmed_up(start, end, self.config.teacher_temperature_warmup, step.progress)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Update the teacher from the student, and the centre from the teacher's outputs (eq. 4)."""
        student = EncoderWithHeads({"encoder": self.encoder, "head": self.head})
        momentum = cosine_momentum(self.config.momentum, step.progress, self.config.final_momentum)
        ema_update_(self.teacher, student, momentum, step.ok)
        seen = distributed.mean(step.carried["teacher"].mean(0))
        update_centering_(self.centre, seen, self.config.centre_momentum, step.ok)

    def prototype_heads(self) -> tuple[PrototypeHead, PrototypeHead | None]:
        """The head of class tokens; there is none of patches."""
        return self.head, None

    def exported(self) -> Backbone:
        """The teacher's encoder."""
        return self.teacher.backbone

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """Uniform outputs, and outputs that are always the same prototype."""
        uniform = math.log(self.config.prototypes)
        name = "loss" if self.config.anchor == "none" else "pairs"
        return {
            name: (uniform, "student and teacher give every image the uniform distribution"),
            "teacher_entropy": (0.0, "the teacher assigns every image to the same prototype with certainty"),
        }
