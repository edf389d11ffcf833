"""iBOT (Zhou et al., "iBOT: Image BERT Pre-Training with Online Tokenizer", ICLR 2022).

DINO on class tokens, and the same for patches: where the student sees a mask token, it predicts the teacher's soft
assignment of that patch, which the teacher sees.

Shapes: B images of this process, V views of each (two of them global), N patches of a global view, at most M of them
masked, D encoder width, K prototypes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.flags import (
    ABOVE_0_TO_1,
    AT_LEAST_1,
    BETWEEN_0_AND_1,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    NOT_NEGATIVE,
    POSITIVE,
    at_least,
    within,
)
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.block_masks import ATTEMPTS, block_masks, completed, listed
from ssl_pretrain.parts.ema_teacher import EncoderWithHeads, cosine_momentum, ema_copy, ema_update_
from ssl_pretrain.parts.heads import PrototypeHead
from ssl_pretrain.parts.masks import rows
from ssl_pretrain.parts.patches import without
from ssl_pretrain.parts.self_distillation import (
    class_token,
    cross_entropy_of_pairs,
    cross_entropy_of_patches,
    to_float32,
    update_centering_,
    warmed_up,
)
from ssl_pretrain.parts.views import by_image, encode, encode_crops, multi_crop
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class IBOT(Method):
    """Self-distillation of class tokens and masked patches with one head; the exported encoder is the teacher's.

    Defaults are the paper's for ViT-S/16 (section 4.1 and appendix), and the released command's where they differ.
    Raises UserError for options out of range and for encoders that cannot replace patches or have no class token.
    """

    class_centre: Tensor
    patch_centre: Tensor

    recipe = Recipe(
        lr=5e-4,
        lr_batch=256,
        betas=(0.9, 0.999),
        weight_decay=0.04,
        final_weight_decay=0.4,
        final_lr=1e-6,
        clip_grad=3.0,
        clip_each=True,
        warmup=0.0125,
        encoder={"drop_path": 0.1, "pool": "cls"},
        small={
            "lr": 2e-3,
            "warmup_steps": 15,
            "drop_path": 0.0,
            "prototypes": 128,
            "hidden_dim": 512,
            "local_views": 2,
            "blur": 0.0,
            "momentum": 0.9,
            "patch_size": 8,
            "steps": 120,
        },
        tiny={"hidden_dim": 64, "bottleneck_dim": 16, "prototypes": 48, "local_views": 2},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """iBOT."""

        prototypes: int | None = None
        """Number of prototypes (outputs of the head that class tokens and patches share) (default: by the number of
        images; 8,192 for ImageNet-1k)."""
        hidden_dim: int | None = None
        """Width of the head's two hidden layers (default: by the encoder; 2,048 from ViT-S on)."""
        bottleneck_dim: int = 256
        """Width of the vectors that are compared with the prototypes."""
        momentum: float = 0.996
        """Teacher's momentum at the start; it rises to 1 along half a cosine."""
        student_temperature: float = 0.1
        """Temperature of the student's softmax."""
        teacher_temperature: float = 0.07
        """Temperature of the teacher's softmax of class tokens at the end of its warm-up."""
        teacher_patch_temperature: float = 0.07
        """Temperature of the teacher's softmax of patches at the end of its warm-up."""
        teacher_temperature_start: float = 0.04
        """Both teacher temperatures at the start."""
        teacher_temperature_warmup: float = 0.0375
        """Share of the run in which the teacher's temperatures rise from start to end (30 of 800 epochs)."""
        centre_momentum: float = 0.9
        """Momentum of the moving averages of the teacher's outputs (centering)."""
        norm_last_layer: bool = True
        """Prototypes of length 1; without it each has a learned length, 1 at the start (the release for ViT-S)."""
        freeze_prototypes: float = 0.00125
        """Share of the run, from its start, in which the prototypes are frozen (1 of 800 epochs)."""
        class_weight: float = 1.0
        """Weight of the class tokens' loss (the paper's lambda 1)."""
        patch_weight: float = 1.0
        """Weight of the masked patches' loss (the paper's lambda 2)."""
        masking: Literal["block", "random"] = "block"
        """Masks of rectangular blocks, or of random patches."""
        mask_probability: float = 0.5
        """Probability that a global view is masked."""
        mask_ratio: tuple[float, float] = (0.1, 0.5)
        """Smallest and largest masking ratio of a masked view."""
        local_views: int = 10
        """Number of small crops of each image."""
        global_scale: tuple[float, float] = (0.25, 1.0)
        """Smallest and largest share of the image's area that a global crop covers."""
        local_scale: tuple[float, float] = (0.05, 0.25)
        """Smallest and largest share of the image's area that a local crop covers."""
        local_ratio: float = 96 / 224
        """Side of a local view divided by that of a global view, rounded to a size that the encoder accepts."""
        blur: float = 1.0
        """Factor on the blur probabilities (1, 0.1 and 0.5 for the two global and the local views); 0 is usual for
        images of 32 pixels."""

        def __post_init__(self) -> None:
            within(self, at_least(2), "prototypes")
            within(self, AT_LEAST_1, "hidden_dim", "bottleneck_dim")
            within(self, FROM_0_BELOW_1, "momentum")
            within(self, POSITIVE, "student_temperature", "teacher_temperature", "teacher_patch_temperature")
            within(self, POSITIVE, "teacher_temperature_start", "local_ratio")
            within(self, FROM_0_TO_1, "teacher_temperature_warmup", "centre_momentum", "freeze_prototypes")
            within(self, NOT_NEGATIVE, "class_weight", "patch_weight", "local_views", "blur")
            within(self, ABOVE_0_TO_1, "mask_probability")
            within(self, BETWEEN_0_AND_1, "mask_ratio", ascending=True)
            within(self, ABOVE_0_TO_1, "global_scale", "local_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("ibot", "replace")
        encoder.require_one_width("ibot")
        self.head = PrototypeHead(
            encoder.dim,
            self.config.hidden_dim,
            config.bottleneck_dim,
            self.config.prototypes,
            gain=not config.norm_last_layer,
        )
        self.mask_token = nn.Parameter(torch.zeros(encoder.token_dim))
        self.register_buffer("class_centre", torch.zeros(self.config.prototypes))
        self.register_buffer("patch_centre", torch.zeros(self.config.prototypes))

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """The teacher begins as the student."""
        self.teacher = ema_copy(EncoderWithHeads({"encoder": self.encoder, "head": self.head}))

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {
            "prototypes": sizes.prototypes(8192, images, least=128),
            "hidden_dim": sizes.width(2048, encoder.dim, full=sizes.VIT_SMALL),
        }

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """DINO's: two global crops, one always blurred and the other sometimes solarized, and local ones."""
        return multi_crop(
            image_size,
            global_scale=config.global_scale,
            local_scale=config.local_scale,
            local_views=config.local_views,
            local_ratio=config.local_ratio,
            blur=(1.0 * config.blur, 0.1 * config.blur, 0.5 * config.blur),
        )

    def forward(self, batch: Batch, step: Step) -> Losses:
        """Terms "class", the cross-entropy over the pairs of a teacher's view and another view of the student, and
        "patch", that of masked patches with the teacher's same view, over all global views (eq. 2 and 3)."""
        views = torch.stack([batch.views["global1"], batch.views["global2"]])
        b, frozen = len(batch.index), step.progress < self.config.freeze_prototypes
        with torch.no_grad():
            seen = encode(self.teacher.backbone, views, step)
            whole = to_float32(self.teacher["head"](class_token(seen, "ibot")))
            parts = to_float32(self.teacher["head"](seen.patches))  # (2B, N, K)
        masks = self.masks(seen.grid, step).transpose(0, 1).flatten(0, 1)  # (2B, N), views in sequence
        index, counted = listed(masks, math.ceil(masks.shape[1] * self.config.mask_ratio[1]))

        crops = [views, batch.views["local"]] if self.config.local_views else [views]
        student = encode_crops(self.encoder, crops, step, replace=(masks, self.mask_token))
        vectors = [class_token(features, "ibot") for features in student]
        each, entropy = cross_entropy_of_pairs(
            self.head(torch.cat(vectors), frozen).unflatten(0, (-1, b)),
            torch.softmax((whole - self.class_centre) / self.temperature("class", step), dim=-1).unflatten(0, (2, b)),
            self.config.student_temperature,
        )
        masked = cross_entropy_of_patches(
            self.head(rows(student[0].patches, index), frozen),
            torch.softmax((rows(parts, index) - self.patch_centre) / self.temperature("patch", step), dim=-1),
            counted,
            self.config.student_temperature,
        )
        patch = by_image(masked, 2).mean(1)
        per_sample = self.config.class_weight * each + self.config.patch_weight * patch
        return Losses(
            total=per_sample.mean(),
            terms={"class": each.mean().detach(), "patch": patch.mean().detach(), "teacher_entropy": entropy},
            per_sample=per_sample.detach(),
            carry={"class": whole.mean(0, keepdim=True), "patch": parts.mean((0, 1)).unsqueeze(0)},
        )

    def masks(self, grid: tuple[int, int], step: Step) -> Tensor:
        """Masks of both global views: bool (B, 2, N), True for a masked patch. A view is masked with some probability;
        its masking ratio is drawn uniformly (section 3.2)."""
        n = grid[0] * grid[1]
        low, high = self.config.mask_ratio
        with step.on_host() as host:
            chance, share = host.rand(2, 2).flatten(0, 1).unbind(1)  # (2B,) each
            wanted = torch.where(chance < self.config.mask_probability, n * (low + (high - low) * share), 0.0)
            if self.config.masking == "random":
                noise = host.rand(2, n).flatten(0, 1)
                masks = completed(torch.zeros_like(noise, dtype=torch.bool), wanted.floor(), noise)
            else:
                noise = host.rand(2, ATTEMPTS, 4).flatten(0, 1)
                masks = block_masks(noise, grid, wanted, smallest=max(1, (min(grid) // 3) ** 2))
        return masks.unflatten(0, (-1, 2)).to(step.device, non_blocking=True)

    def temperature(self, tokens: Literal["class", "patch"], step: Step) -> float:
        """The teacher's temperature in this step."""
        config = self.config
        end = config.teacher_temperature if tokens == "class" else config.teacher_patch_temperature
        return warmed_up(config.teacher_temperature_start, end, config.teacher_temperature_warmup, step.progress)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """The teacher follows the student, each centre the teacher's outputs, that of patches all patches'."""
        student = EncoderWithHeads({"encoder": self.encoder, "head": self.head})
        ema_update_(self.teacher, student, cosine_momentum(self.config.momentum, step.progress), step.ok)
        for name, centre in (("class", self.class_centre), ("patch", self.patch_centre)):
            mean = distributed.mean(step.carried[name].mean(0))
            update_centering_(centre, mean, self.config.centre_momentum, step.ok)

    def prototype_heads(self) -> tuple[PrototypeHead, PrototypeHead | None]:
        """The head that class tokens and patches share."""
        return self.head, self.head

    def exported(self) -> Backbone:
        """The teacher's encoder."""
        return self.teacher.backbone

    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The first global view, and what the student sees of it (masked patches grey)."""
        view = batch.views["global1"]
        h, w = self.encoder.stride
        grid = (view.shape[2] // h, view.shape[3] // w)
        return {"view": view, "masked": without(view, self.masks(grid, step)[:, 0], (h, w))}

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """Uniform outputs, and outputs that are always the same prototype."""
        uniform = math.log(self.config.prototypes)
        return {
            "class": (uniform, "student and teacher give every image the uniform distribution"),
            "teacher_entropy": (0.0, "the teacher assigns every image to the same prototype with certainty"),
        }
