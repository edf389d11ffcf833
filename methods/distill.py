"""Distillation of a frozen encoder into a smaller one, without labels, after the distillation of LightlyTrain (versions 1
to 3 of its release) with options of ScaleKD (Fan et al., NeurIPS 2024) and FLIP (Li et al., CVPR 2023).

Teacher and student see the same mixed image. Three losses can be added: similarities of the image to the images in a queue,
similarities between the places of an image, and the teacher's map itself. Shapes: B images of this process, N of all
processes, D encoder width, T teacher width, M entries of the queue, L places of the teacher's grid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone, Features
from ssl_pretrain.data.views import Jitter, Reads, ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import (
    ABOVE_0_TO_1,
    AT_LEAST_1,
    FROM_0_BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    within,
)
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import masks, sizes
from ssl_pretrain.parts.align import resized
from ssl_pretrain.parts.heads import l2_normalize
from ssl_pretrain.parts.mixup import check_pairs, mixed
from ssl_pretrain.parts.query_projector import QueryProjector
from ssl_pretrain.parts.similarity import FilledQueue, divergences, relations
from ssl_pretrain.parts.targets import distances, last_blocks, transformed
from ssl_pretrain.parts.views import dropped, encode, encode_pooled, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod

Grid = tuple[int, int]


@final
class Distill(WholeBatchMethod):
    """Learn what a frozen encoder (--teacher) says of images without labels.

    Defaults are those of LightlyTrain's third version: the pooled and the relations loss, mixup, one linear layer for each
    loss. Raises UserError for options out of range, a teacher that does not fit and batches that cannot be paired for
    mixup, and UnsupportedByBackbone for --token-drop with an encoder that cannot leave out patches.
    """

    recipe = Recipe(
        lr=5e-4,
        lr_batch=1536,
        lr_scaling="sqrt",
        betas=(0.9, 0.999),
        weight_decay=0.04,
        clip_grad=1.0,
        encoder={"pool": "cls"},
        small={"lr": 1e-3, "steps": 250, "queue": 256},
        tiny={"queue": 40, "dense_weight": 0.5, "dense_centred_weight": 0.3},
    )
    least_batch = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Distillation from a frozen encoder."""

        pooled_weight: float = 1.0
        """Weight of the pooled loss: how similar the image is to those in a queue; 0: without it."""
        relations_weight: float = 1.0
        """Weight of the relations loss: how similar the places of an image are to one another; 0: without it."""
        dense_weight: float = 0.0
        """Weight of the dense loss: the teacher's features at each place; 0: without it."""
        temperature: float = 0.07
        """Temperature of the similarities, of teacher and student."""
        queue: int | None = None
        """Length of the queue of teacher features (default: by the number of images; 8,192 from about 20,000 on)."""
        mixup: bool = True
        """Mix pairs of images, with one random share for the step; teacher and student see the same mixed image."""
        dense_loss: Literal["mse", "cosine"] = "mse"
        """Distance of the dense loss (ScaleKD: cosine)."""
        dense_norm: Literal["none", "layer_norm", "l2"] = "none"
        """Transform of each target vector of the dense loss: none, layer norm without affine, or length 1."""
        dense_blocks: int = 1
        """Number of the teacher's last blocks whose features are the dense target, side by side (LightlyTrain's second
        version: 2)."""
        dense_projector: Literal["linear", "attention"] = "linear"
        """From the student's map to the teacher's: a linear layer and resizing, or cross-attention (ScaleKD)."""
        dense_centred_weight: float = 0.0
        """Weight, within the dense loss, of the same distance after the mean over places is removed (ScaleKD's loss in
        frequency space: 0.75 for a middle stage)."""
        teacher_size: int = 0
        """Pixels of the shorter side of the teacher's images, rounded to its patches; 0: the student's image size."""
        token_drop: float = 0.0
        """Share of the patches that the student leaves out, until 95 % of the run (FLIP: 0.5; needs a ViT)."""
        crop_scale: tuple[float, float] = (0.14, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        colour: float = 0.5
        """Strength of the colour jitter."""

        def __post_init__(self) -> None:
            within(self, NOT_NEGATIVE, "pooled_weight", "relations_weight", "dense_weight", "dense_centred_weight")
            within(self, NOT_NEGATIVE, "teacher_size", "colour")
            within(self, POSITIVE, "temperature")
            within(self, AT_LEAST_1, "queue", "dense_blocks")
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)
            if not (self.pooled_weight or self.relations_weight or self.dense_weight):
                raise UserError(
                    "--pooled-weight, --relations-weight and --dense-weight are all 0: nothing is to be learned"
                )
            if self.token_drop and self.dense_weight and self.dense_projector == "attention":
                raise UserError(
                    "--dense-projector attention needs the student's whole map: leave out --token-drop, or take "
                    "--dense-projector linear"
                )

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "distill", config.token_drop)
        self.teacher: Frozen | None = None

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """LightlyTrain's lengths of the queue: 16 for 50 images, 4,096 for 20,000, 8,192 above."""
        return {"queue": sizes.at_most_a_share(8192, images, 2 / 5)}

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The teacher."""
        return ("teacher",)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the teacher, and add the projectors to its width and the queue."""
        config, dim = self.config, self.encoder.dim
        self.teacher = teacher = networks["teacher"]
        grid = _grid(self.encoder.image_size, self.encoder.stride)
        target_grid = _grid(_teacher_size(config, self.encoder.image_size), teacher.sight.stride)
        if config.pooled_weight:
            self.pooled_head = _linear(self.encoder.pooled_dim, teacher.pooled_dim)
            self.queue = FilledQueue(self.config.queue, teacher.pooled_dim)
        if config.relations_weight:
            if 1 in (math.prod(grid), math.prod(target_grid)):
                raise UserError(
                    f"--relations-weight {config.relations_weight:g} compares the places of an image, and the encoder has "
                    f"{grid[0]} x {grid[1]}, {teacher.spec} {target_grid[0]} x {target_grid[1]}: give --relations-weight "
                    f"0, or another --image-size"
                )
            self.relations_head = _linear(dim, teacher.dim)
        if config.dense_weight:
            _check_blocks(teacher, config.dense_blocks)
            width = config.dense_blocks * teacher.dim
            attention = config.dense_projector == "attention"
            self.dense_head = QueryProjector(dim, grid, width, target_grid) if attention else _linear(dim, width)

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped, with colour; for the teacher the same pixels in its own size."""
        c = config.colour
        jitter = Jitter(brightness=0.8 * c, contrast=0.8 * c, saturation=0.4 * c, hue=0.2 * c) if c else None
        size = _teacher_size(config, image_size)
        return (
            ViewSpec(name="image", size=image_size, scale=config.crop_scale, jitter=jitter, grayscale=0.2),
            ViewSpec(
                name="teacher", of="image", size=size, network="teacher", network_pixels=True, reads=_reads(config)
            ),
        )

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Of each image: unit vectors of student and teacher, "student" and "target" (B, T), and the losses that treat each
        image by itself with what they are compared with in `loss`: "relations", "relations_uniform", "dense" (B,),
        "target_mean" (B, T') and "target_square" (B,)."""
        config = self.config
        image, seen = batch.views["image"], batch.views["teacher"]
        if config.mixup and self.training:  # validation and its losses are of whole images
            check_pairs(step)
            share = step.shared_rand(1)
            image, seen = mixed(image, share), mixed(seen, share)
        options = dropped(self.encoder, image, step, config.token_drop)
        kept = options.get("keep")
        maps = bool(config.relations_weight or config.dense_weight)
        if not maps:
            (pooled,) = encode_pooled(self.encoder, [image], step, **options)
            return self._pooled(pooled, self.taught(seen, maps=False).pooled)
        own, target = encode(self.encoder, image, step, **options), self.taught(seen, maps=True)
        found = self._pooled(own.pooled, target.pooled) if config.pooled_weight else {}
        if config.relations_weight:
            mine, theirs = self._matched(self.relations_head(own.patches), own.grid, target, kept)
            theirs = theirs[..., -mine.shape[-1] :]  # of the last block
            found["relations"], found["relations_uniform"] = relations(theirs, mine, config.temperature)
        if config.dense_weight:
            found |= self._dense(own, target, kept)
        return found

    def _pooled(self, pooled: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The unit vectors (B, T) of student and teacher."""
        return {"student": l2_normalize(self.pooled_head(pooled)), "target": l2_normalize(target)}

    def _dense(self, own: Features, target: Features, kept: Tensor | None) -> dict[str, Tensor]:
        """The distance of projected and teacher's maps, (B,), and the moments of the targets."""
        config = self.config
        if isinstance(self.dense_head, QueryProjector):
            mine, theirs = self.dense_head(own.patches, own.grid, target.grid), target.patches
        else:
            mine, theirs = self._matched(self.dense_head(own.patches), own.grid, target, kept)
        mine, theirs = mine.float(), transformed(theirs, config.dense_norm)
        each = distances(mine, theirs, config.dense_loss).mean(1)
        if config.dense_centred_weight:
            mine_centred, theirs_centred = mine - mine.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
            centred = distances(mine_centred, theirs_centred, config.dense_loss).mean(1)
            each = each + config.dense_centred_weight * centred
        vectors = F.normalize(theirs, dim=-1) if config.dense_loss == "cosine" else theirs
        return {"dense": each, "target_mean": vectors.mean(1), "target_square": vectors.square().mean((1, 2))}

    def _matched(self, mine: Tensor, grid: Grid, target: Features, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """The student's map resized to the teacher's grid, and the teacher's. With patches left out, the teacher's map is
        resized to the student's grid and only the places of the kept ones count."""
        if kept is None:
            return resized(mine, grid, target.grid, "bilinear"), target.patches
        return mine, masks.rows(resized(target.patches, target.grid, grid, "bilinear"), kept)

    def taught(self, images: Tensor, maps: bool) -> Features:
        """The teacher's features of its views (B, C, H, W); the pooled ones alone where `maps` is false."""
        assert self.teacher is not None
        if maps:
            return last_blocks(self.teacher, images, self.config.dense_blocks if self.config.dense_weight else 1)
        return self.teacher(
            images, **({"pooled_only": True} if "pooled_only" in self.teacher.backbone.supports else {})
        )

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The weighted sum of the losses. Each one's term "..._relative" is its value over that of a student that says the
        same of every image or place."""
        config = self.config
        parts: dict[str, tuple[float, Tensor, Tensor]] = {}  # weight, loss of each image, what to divide it by
        carry = {}
        if "student" in embedded:
            target = embedded["target"].detach()
            with torch.autocast(target.device.type, enabled=False):
                rows, known = self.queue.with_batch(distributed.gather(target))
                theirs, mine = (x @ rows.T / config.temperature for x in (target, embedded["student"]))
                each, uniform = divergences(theirs, mine, known)
            parts["pooled"] = config.pooled_weight, each, uniform.mean()
            carry = {"target": target, "place": torch.arange(step.batch_size, device=step.device)[step.rows]}
        if "relations" in embedded:
            uniform = embedded["relations_uniform"].detach().mean()
            parts["relations"] = config.relations_weight, embedded["relations"], uniform
        if "dense" in embedded:
            parts["dense"] = config.dense_weight, embedded["dense"], self._constant(embedded)
        per_sample = torch.stack([weight * each for weight, each, _ in parts.values()]).sum(0)
        terms = {}
        for name, (_, each, constant) in parts.items():
            terms[name] = each.detach().mean()
            terms[f"{name}_relative"] = terms[name] / constant.clamp(min=1e-12)
        return Losses(total=per_sample.mean(), terms=terms, per_sample=per_sample.detach(), carry=carry)

    @torch.no_grad()
    def _constant(self, embedded: dict[str, Tensor]) -> Tensor:
        """The dense loss () of predicting the batch's mean target at every place, for cosines the mean unit vector, without
        the centred part."""
        mean = distributed.mean(embedded["target_mean"].mean(0))
        square = distributed.mean(embedded["target_square"].mean())
        return 1 - mean.norm() if self.config.dense_loss == "cosine" else square - mean.square().mean()

    def after_step(self, step: Step) -> None:
        """The teacher's vectors of the global batch take the place of the oldest in the queue."""
        if self.config.pooled_weight:
            # In the order of the global batch, so that the queue is the same on any number of processes and micro-batches.
            order = distributed.gather(step.carried["place"]).argsort()
            self.queue.put_(distributed.gather(step.carried["target"])[order], step.ok)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """Each loss relative to that of a student that tells nothing apart."""
        config = self.config
        found = {}
        if config.pooled_weight:
            found["pooled_relative"] = (
                1.0,
                "every image is equally similar to all images in the queue; nothing is learned",
            )
        if config.relations_weight:
            found["relations_relative"] = 1.0, "all places of an image have the same features; nothing is learned"
        if config.dense_weight and not config.dense_centred_weight:
            found["dense_relative"] = 1.0, "every place is predicted as the mean target; nothing is learned"
        return found

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The crop, and what teacher and student see of it."""
        images = batch.views["image"]
        return {"view": images, "mixed": mixed(images, step.shared_rand(1))} if self.config.mixup else {"view": images}


def _linear(dim: int, width: int) -> nn.Linear:
    """A projector, initialised as in LightlyTrain."""
    layer = nn.Linear(dim, width)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _grid(size: tuple[int, int], stride: tuple[int, int]) -> Grid:
    """Patches of an image, at least one along each side."""
    return max(1, size[0] // stride[0]), max(1, size[1] // stride[1])


def _teacher_size(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Pixels of the teacher's view, of the student's proportions. The engine rounds it to the teacher's patches."""
    if not config.teacher_size:
        return size
    zoom = config.teacher_size / min(size)
    return round(size[0] * zoom), round(size[1] * zoom)


def _reads(config: Any) -> Reads | None:
    """What is read of the teacher's last block; None where its outputs cannot be stored (mixed pixels, more blocks)."""
    if config.mixup or (config.dense_weight and config.dense_blocks > 1):
        return None
    if not (config.relations_weight or config.dense_weight):
        return Reads(outputs=("pooled",))
    return Reads(outputs=("pooled", "patches") if config.pooled_weight else ("patches",))


def _check_blocks(teacher: Frozen, count: int) -> None:
    """Raise UserError where the teacher has fewer blocks, or gives only its last one."""
    depth = teacher.backbone.depth
    if count > depth:
        raise UserError(f"--dense-blocks {count}: {teacher.spec} has {depth} blocks")
    if count > 1 and "blocks" not in teacher.backbone.supports:
        raise UserError(f"--dense-blocks {count}: {teacher.spec} gives the features of its last block only")
