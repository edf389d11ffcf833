"""DINOv2 (Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024).

DINO on class tokens, iBOT on masked patches, and a regulariser that spreads the class tokens of a batch.

Shapes: B images of this process, V views of each (two of them global), N patches of a global view, at most M of them
masked, D encoder width, K prototypes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from ssl_pretrain.parts import anchor, sizes
from ssl_pretrain.parts.block_masks import ATTEMPTS, block_masks, completed, listed, stratified_ratios
from ssl_pretrain.parts.ema_teacher import EncoderWithHeads, cosine_momentum, ema_copy, ema_update_
from ssl_pretrain.parts.heads import PrototypeHead
from ssl_pretrain.parts.koleo import DUPLICATES, kde, koleo
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
from ssl_pretrain.parts.sinkhorn import sinkhorn
from ssl_pretrain.parts.views import by_image, encode, encode_crops, multi_crop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod

BLUR = {"paper": (1.0, 0.1, 0.5), "released": (0.0, 0.9, 0.5), "none": (0.0, 0.0, 0.0)}


@final
class DINOv2(WholeBatchMethod):
    """DINO, iBOT and a spreading regulariser; the exported encoder is the teacher's.

    Defaults are the paper's (section 4 and appendix B) in the size of its released ImageNet-1k recipe. Raises UserError
    for options out of range and for encoders that cannot replace patches or have no class token.
    """

    class_centre: Tensor
    patch_centre: Tensor

    recipe = Recipe(
        lr=4e-3,
        lr_batch=1024,
        lr_scaling="sqrt",
        betas=(0.9, 0.999),
        weight_decay=0.04,
        final_weight_decay=0.2,
        final_lr=1e-6,
        clip_grad=3.0,
        warmup=0.1,
        encoder={"drop_path": 0.3, "drop_path_uniform": True, "layer_scale": 1e-5, "pool": "cls"},
        small={
            "lr": 1e-3,
            "drop_path": 0.0,
            "layer_scale": 1.0,
            "prototypes": 512,
            "hidden_dim": 256,
            "local_views": 2,
            "blur": "none",
            "momentum": 0.9,
            "patch_size": 8,
            "steps": 100,
        },
        # KoLeo of class tokens that LayerScale keeps nearly equal magnifies rounding errors: it has its own test of two
        # processes.
        tiny={"hidden_dim": 64, "bottleneck_dim": 16, "prototypes": 48, "local_views": 2, "regulariser": "kde"},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """DINOv2."""

        prototypes: int | None = None
        """Number of prototypes (outputs of each head) (default: by the number of images; 65,536 for ImageNet-1k)."""
        hidden_dim: int | None = None
        """Width of the heads' two hidden layers (default: by the encoder; 2,048 from ViT-S on)."""
        bottleneck_dim: int = 256
        """Width of the vectors that are compared with the prototypes."""
        shared_head: bool = False
        """Use one head for class tokens and patches, as in iBOT, instead of one head for each."""
        centering: Literal["sinkhorn", "centre"] = field(default="sinkhorn", metadata={"stored_as": "centring"})
        """How collapse to one prototype is prevented: Sinkhorn-Knopp over the batch, or DINO's centering."""
        centre_momentum: float = 0.9
        """Momentum of the moving averages of the teacher's outputs (only with --centering centre)."""
        sinkhorn_iterations: int = 3
        """Iterations of Sinkhorn-Knopp."""
        momentum: float = 0.992
        """Teacher's momentum at the start; it goes to the final one along half a cosine."""
        final_momentum: float = 1.0
        """Teacher's momentum at the end. A constant momentum (the same number twice) suits short continued runs."""
        student_temperature: float = 0.1
        """Temperature of the student's softmax."""
        teacher_temperature: float = 0.07
        """Temperature of the teacher's softmax at the end of its warm-up."""
        teacher_temperature_start: float = 0.04
        """Temperature of the teacher's softmax at the start."""
        teacher_temperature_warmup: float = 0.3
        """Share of the run in which the teacher's temperature goes from start to end (30 of 100 epochs)."""
        freeze_prototypes: float = 0.01
        """Share of the run, from its start, in which the prototypes are frozen (1 of 100 epochs)."""
        class_weight: float = 1.0
        """Weight of the class tokens' loss (DINO)."""
        patch_weight: float = 1.0
        """Weight of the masked patches' loss (iBOT)."""
        regulariser: Literal["koleo", "kde"] = "koleo"
        """Regulariser that spreads the class tokens of global views: KoLeo, or Virchow 2's kernel density estimate."""
        regulariser_weight: float = 0.1
        """Weight of the regulariser, on the sum over both global views; 0: no regulariser."""
        concentration: float = 5.0
        """Concentration of the kernel of --regulariser kde."""
        mask_probability: float = 0.5
        """Share of the batch's global views that are masked."""
        mask_ratio: tuple[float, float] = (0.1, 0.5)
        """Smallest and largest masking ratio of a masked view; the ratios are spread evenly over the batch."""
        complete_masks: bool = False
        """Add random patches to a mask until it has exactly the requested number (DINOv3); else some have fewer."""
        local_views: int = 8
        """Number of small crops of each image."""
        global_scale: tuple[float, float] = (0.32, 1.0)
        """Smallest and largest share of the image's area that a global crop covers."""
        local_scale: tuple[float, float] = (0.05, 0.32)
        """Smallest and largest share of the image's area that a local crop covers."""
        local_ratio: float = 96 / 224
        """Side of a local view divided by that of a global view, rounded to a size that the encoder accepts."""
        noise_patch: float = 0.0
        """Probability of Gaussian noise on a random square of a view (the last stage of FastDINOv2)."""
        blur: Literal["paper", "released", "none"] = "paper"
        """Blur probabilities of the two global and the local views: 1, 0.1, 0.5; as in the released code, 0, 0.9, 0.5;
        or never, which is usual for images of 32 pixels."""
        anchor: Literal["none", "gram", "features", "weights"] = "none"
        """Loss that keeps the encoder near the start weights of --init-from (or near --teacher): the similarities between
        patches (Gram matrices), the features, the weights, or none."""
        anchor_weight: float = 1.0
        """Weight of the anchor's loss."""
        anchor_zoom: float = 1.0
        """Side of the images that the anchor's frozen network sees, over that of the crops (DINOv3's Gram teacher: 2)."""

        def __post_init__(self) -> None:
            within(self, at_least(2), "prototypes")
            within(self, AT_LEAST_1, "hidden_dim", "bottleneck_dim", "sinkhorn_iterations")
            within(self, FROM_0_BELOW_1, "momentum")
            within(self, FROM_0_TO_1, "final_momentum")
            within(self, POSITIVE, "student_temperature", "teacher_temperature", "teacher_temperature_start")
            within(self, POSITIVE, "concentration", "local_ratio")
            within(
                self, FROM_0_TO_1, "teacher_temperature_warmup", "centre_momentum", "freeze_prototypes", "noise_patch"
            )
            within(self, NOT_NEGATIVE, "class_weight", "patch_weight", "regulariser_weight", "local_views")
            within(self, ABOVE_0_TO_1, "mask_probability")
            within(self, BETWEEN_0_AND_1, "mask_ratio", ascending=True)
            within(self, ABOVE_0_TO_1, "global_scale", "local_scale", ascending=True)
            within(self, NOT_NEGATIVE, "anchor_weight")
            within(self, POSITIVE, "anchor_zoom")

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("dinov2", "replace")
        encoder.require_one_width("dinov2")
        head = (encoder.dim, self.config.hidden_dim, config.bottleneck_dim, self.config.prototypes)
        self.heads = nn.ModuleDict({"class": PrototypeHead(*head)})
        if not config.shared_head:
            self.heads["patch"] = PrototypeHead(*head)
        self.mask_token = nn.Parameter(torch.zeros(encoder.token_dim))
        if config.centering == "centre":
            self.register_buffer("class_centre", torch.zeros(self.config.prototypes))
            self.register_buffer("patch_centre", torch.zeros(self.config.prototypes))

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """The teacher begins as the student."""
        self.teacher = ema_copy(EncoderWithHeads({"encoder": self.encoder, "heads": self.heads}))
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
        """DINO's: two global crops, the second sometimes solarized, and local ones."""
        crops = multi_crop(
            image_size,
            global_scale=config.global_scale,
            local_scale=config.local_scale,
            local_views=config.local_views,
            local_ratio=config.local_ratio,
            noise_patch=config.noise_patch,
            blur=BLUR[config.blur],
        )
        return (*crops, *anchor.twins(config.anchor, crops[:2], config.anchor_zoom))

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Outputs of the encoders. "student" (B, V, D): class tokens of the masked global views and of the local views.
        "teacher" (B, 2, D): class tokens of the global views, unmasked. "student_patches" and "teacher_patches"
        (B, 2, M, D): the masked patches. "counted" bool (B, 2, M): False at places beyond the masked patches. "anchor"
        (B,): the loss of an anchor that needs features."""
        views = torch.stack([batch.views["global1"], batch.views["global2"]])
        with torch.no_grad():
            seen = encode(self.teacher.backbone, views, step)
            whole = class_token(seen, "dinov2")
        masks = self.masks(seen.grid, step).transpose(0, 1).flatten(0, 1)  # (2B, N), views in sequence
        index, counted = listed(masks, math.ceil(masks.shape[1] * self.config.mask_ratio[1]))
        crops = [views, batch.views["local"]] if self.config.local_views else [views]
        student = encode_crops(self.encoder, crops, step, replace=(masks, self.mask_token))
        counts = (2, self.config.local_views)
        each = [by_image(class_token(f, "dinov2"), count) for f, count in zip(student, counts, strict=False)]
        embedded = {
            "student": torch.cat(each, dim=1),
            "teacher": by_image(whole, 2),
            "student_patches": by_image(rows(student[0].patches, index), 2),
            "teacher_patches": by_image(rows(seen.patches, index), 2),
            "counted": by_image(counted, 2),
        }
        if self.anchor is not None and self.anchor.sees:
            twins = torch.stack([batch.views["global1_anchor"], batch.views["global2_anchor"]])
            embedded["anchor"] = by_image(self.anchor(student[0], twins), 2).mean(1)
        return embedded

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """Terms "class", DINO's cross-entropy over the pairs of a teacher's view and another view of the student;
        "patch", iBOT's of masked patches with the teacher's same view; and "koleo" or "kde", the sum over both global
        views of the regulariser of the student's class tokens."""
        config, frozen = self.config, step.progress < self.config.freeze_prototypes
        tokens, counted = embedded["student"].transpose(0, 1), embedded["counted"].flatten(0, 1)
        with torch.no_grad():
            whole = to_float32(
                self._head(self.teacher["heads"], "class")(embedded["teacher"].transpose(0, 1))
            )  # (2, B, K)
            parts = to_float32(self._head(self.teacher["heads"], "patch")(embedded["teacher_patches"].flatten(0, 1)))
        each, entropy = cross_entropy_of_pairs(
            self._head(self.heads, "class")(tokens, frozen),
            self._assigned(whole, "class", step),
            config.student_temperature,
        )
        crops = cross_entropy_of_patches(
            self._head(self.heads, "patch")(embedded["student_patches"].flatten(0, 1), frozen),
            self._assigned(parts, "patch", step, counted),
            counted,
            config.student_temperature,
        )
        patch = crops.unflatten(0, (-1, 2)).mean(1)
        per_sample = config.class_weight * each + config.patch_weight * patch
        losses = Losses(
            total=per_sample.mean(),
            terms={"class": each.mean().detach(), "patch": patch.mean().detach(), "teacher_entropy": entropy},
            per_sample=per_sample.detach(),
        )
        if config.regulariser_weight:
            views = [koleo(v) if config.regulariser == "koleo" else kde(v, config.concentration) for v in tokens[:2]]
            spread = torch.stack(views).sum()
            losses.total = losses.total + config.regulariser_weight * spread
            losses.terms[config.regulariser] = spread.detach()
            # A spread that is not finite does not say which image is the reason. The cross-entropies do.
            shared = torch.nan_to_num(config.regulariser_weight * spread.detach(), 0.0, 0.0, 0.0)
            losses.per_sample = per_sample.detach() + shared
        if self.anchor is not None:
            self.anchor.add(losses, config.anchor_weight, embedded.get("anchor"))
        if config.centering == "centre":
            losses.carry = {
                "class": whole.mean((0, 1)).unsqueeze(0),
                "patch": (parts * counted[..., None]).sum((0, 1)).unsqueeze(0),
                "patches": counted.sum().to(parts.dtype).unsqueeze(0),
            }
        return losses

    def masks(self, grid: tuple[int, int], step: Step) -> Tensor:
        """Masks of both global views: bool (B, 2, N), True for a masked patch. Half of the global batch's views (by
        default) are masked, each with another masking ratio (as released)."""
        n, crops = grid[0] * grid[1], 2 * step.batch_size
        with step.on_host() as host:
            orders, places = host.shared_rand(crops), host.shared_rand(crops)
            ratios = stratified_ratios(orders, places, self.config.mask_probability, self.config.mask_ratio)
            wanted = (n * ratios).floor().unflatten(0, (-1, 2))[host.rows].flatten()
            noise = host.rand(2, ATTEMPTS, 4).flatten(0, 1)
            masks = block_masks(noise, grid, wanted, smallest=4, largest=n / 2)
            if self.config.complete_masks:
                masks = completed(masks, wanted, host.rand(2, n).flatten(0, 1))
        return masks.unflatten(0, (-1, 2)).to(step.device, non_blocking=True)

    def temperature(self, step: Step) -> float:
        """The teacher's temperature in this step."""
        start, end = self.config.teacher_temperature_start, self.config.teacher_temperature
        return warmed_up(start, end, self.config.teacher_temperature_warmup, step.progress)

    def _head(self, heads: Any, tokens: Literal["class", "patch"]) -> PrototypeHead:
        return heads["class" if self.config.shared_head else tokens]

    @torch.no_grad()
    def _assigned(
        self, logits: Tensor, tokens: Literal["class", "patch"], step: Step, counted: Tensor | None = None
    ) -> Tensor:
        """The teacher's distributions over the prototypes, from logits (..., K), of the same shape and dtype. Values
        where `counted` (...) is False have no meaning."""
        if self.config.centering == "centre":
            centre = self.class_centre if tokens == "class" else self.patch_centre
            return torch.softmax((logits - centre) / self.temperature(step), dim=-1)
        flat = None if counted is None else counted.flatten()
        assigned = sinkhorn(logits.flatten(0, 1), self.temperature(step), self.config.sinkhorn_iterations, flat)
        return assigned.unflatten(0, logits.shape[:2]).to(logits.dtype)

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """The teacher follows the student, each centre the teacher's outputs, that of patches the masked ones'."""
        student = EncoderWithHeads({"encoder": self.encoder, "heads": self.heads})
        momentum = cosine_momentum(self.config.momentum, step.progress, self.config.final_momentum)
        ema_update_(self.teacher, student, momentum, step.ok)
        if self.config.centering == "sinkhorn":
            return
        count = distributed.mean(step.carried["patches"].sum())
        seen = distributed.mean(step.carried["patch"].sum(0)) / count.clamp_min(1e-6)
        pairs = (
            (self.class_centre, distributed.mean(step.carried["class"].mean(0)), step.ok),
            (self.patch_centre, seen, step.ok & (count > 0)),
        )
        for centre, mean, ok in pairs:
            update_centering_(centre, mean, self.config.centre_momentum, ok)

    def prototype_heads(self) -> tuple[PrototypeHead, PrototypeHead | None]:
        """The heads of class tokens and of patches."""
        return self._head(self.heads, "class"), self._head(self.heads, "patch")

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
        """Uniform outputs, outputs that are always the same prototype, and class tokens that are all alike."""
        uniform = math.log(self.config.prototypes)
        masked = int(2 * batch_size * self.config.mask_probability) / (2 * batch_size)
        stated = {
            "class": (uniform, "student and teacher give every image the uniform distribution"),
            "patch": (masked * uniform, "student and teacher give every masked patch the uniform distribution"),
        }
        if self.config.centering == "centre":  # Sinkhorn-Knopp lets no prototype have all images
            stated["teacher_entropy"] = (0.0, "the teacher assigns every image to the same prototype with certainty")
        if self.config.regulariser_weight:
            alike = -2 * math.log(DUPLICATES) if self.config.regulariser == "koleo" else 2 * self.config.concentration
            stated[self.config.regulariser] = (alike, "all images get the same class token")
        return stated
