"""Distillation of frozen encoders into a smaller one, without labels, after the distillation of LightlyTrain (versions 1
to 3 of its release) with options of ScaleKD (Fan et al., NeurIPS 2024), FLIP (Li et al., CVPR 2023) and, of several
teachers, RADIO (Ranzinger et al., CVPR 2024; PHI-S, 2024).

Teacher and student see the same mixed image. Three losses can be added: similarities of the image to the images in a queue,
similarities between the places of an image, and the teacher's map itself. Of several teachers each has heads, a queue and
statistics of its own; names of what belongs to the second one begin with "teacher2". Shapes: B images of this process, N of
all processes, D encoder width, T teacher width, M entries of the queue, L places of the teacher's grid.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from ssl_pretrain.frozen import NONE, Frozen, teacher_names
from ssl_pretrain.parts import masks, sizes
from ssl_pretrain.parts.align import resized
from ssl_pretrain.parts.fitted_targets import Whitener
from ssl_pretrain.parts.heads import l2_normalize
from ssl_pretrain.parts.mixup import check_pairs, mixed
from ssl_pretrain.parts.prototype_teacher import HasPrototypeHeads, divergence_of_heads, head_like
from ssl_pretrain.parts.query_projector import QueryProjector
from ssl_pretrain.parts.similarity import FilledQueue, divergences, relations
from ssl_pretrain.parts.targets import distances, final_norm, last_blocks, transformed
from ssl_pretrain.parts.views import dropped, encode, encode_pooled, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod

Grid = tuple[int, int]


@final
class Distill(WholeBatchMethod):
    """Learn what a frozen encoder (--teacher), or several of them, say of images without labels.

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
        tiny={"queue": 40, "dense_weight": 0.5, "dense_centred_weight": 0.3, "standardise_images": 32},
    )
    least_batch = 2

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Distillation from a frozen encoder."""

        more_teachers: tuple[str, ...] = ()
        """Teachers beside that of --teacher, each an export, a run, or timm: hf: torch: module:. Each has heads of its
        own."""
        teacher_weights: tuple[float, ...] = ()
        """Weight of each teacher's losses, that of --teacher first (default: all 1)."""
        standardise: Literal["auto", "none", "channels", "phi_s"] = "auto"
        """Transform of a teacher's pooled vectors and maps by statistics of the images. channels: each gets mean 0 and
        variance 1. phi_s: a rotation and one scale, so that all channels have variance 1 (PHI-S). auto: none, and phi_s
        with several teachers, so that none of them dominates."""
        standardise_images: int = 1024
        """Number of images from which --standardise takes the statistics, in the first steps. Until then the losses that
        need them are 0."""
        pooled_weight: float = 1.0
        """Weight of the pooled loss: how similar the image is to those in a queue; 0: without it."""
        relations_weight: float = 1.0
        """Weight of the relations loss: how similar the places of an image are to one another; 0: without it."""
        dense_weight: float = 0.0
        """Weight of the dense loss: the teacher's features at each place; 0: without it."""
        temperature: float = 0.07
        """Temperature of the similarities, of teacher and student."""
        pooled_loss: Literal["similarity", "cosine", "mse"] = "similarity"
        """What the pooled loss compares: similarities to the images in a queue, or the vectors themselves by 1 - cosine or
        the mean square (RADIO: cosine)."""
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
        dense_taps: tuple[float, ...] = (1.0,)
        """Shares of the depth after whose blocks the maps of student and teacher are compared in the dense loss, which is
        then the sum over them; the last one is 1 (ScaleKD: 0.75 1)."""
        dense_projector: Literal["linear", "attention"] = "linear"
        """From the student's map to the teacher's: a linear layer and resizing, or cross-attention (ScaleKD)."""
        dense_centred_weight: float = 0.0
        """Weight, within the dense loss, of the same distance after the mean over places is removed (ScaleKD's loss in
        frequency space: 0.75 for a middle stage)."""
        heads_weight: float = 0.0
        """Weight of the losses through the teacher's own prototype heads, which the student gets heads like (DINOv2's
        distillation); 0: without them. --teacher is then a run of dino, ibot or dinov2 with its checkpoints."""
        heads_temperature: float = 0.07
        """Temperature of the teacher's distributions over the prototypes; the student's is 0.1."""
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
            within(self, NOT_NEGATIVE, "teacher_size", "colour", "teacher_weights")
            within(self, NOT_NEGATIVE, "heads_weight")
            within(self, POSITIVE, "temperature", "heads_temperature")
            within(self, AT_LEAST_1, "queue", "dense_blocks", "standardise_images")
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, ABOVE_0_TO_1, "crop_scale", "dense_taps", ascending=True)
            if not self.dense_taps or self.dense_taps[-1] != 1 or len(set(self.dense_taps)) < len(self.dense_taps):
                raise UserError("--dense-taps: give different shares of the depth, the last one 1")
            if len(self.dense_taps) > 1 and self.dense_blocks > 1:
                raise UserError("--dense-taps and --dense-blocks both choose blocks of the teacher: give one of them")
            if not (self.pooled_weight or self.relations_weight or self.dense_weight or self.heads_weight):
                raise UserError(
                    "--pooled-weight, --relations-weight and --dense-weight are all 0: nothing is to be learned"
                )
            teachers = 1 + len(self.more_teachers)
            if self.teacher_weights and len(self.teacher_weights) != teachers:
                raise UserError(
                    f"--teacher-weights has {len(self.teacher_weights)} values, and there are {teachers} teachers "
                    f"(--teacher and {len(self.more_teachers)} of --more-teachers): give one for each"
                )
            if self.teacher_weights and not any(self.teacher_weights):
                raise UserError("--teacher-weights are all 0: nothing is to be learned")
            if self.token_drop and self.dense_weight and self.dense_projector == "attention":
                raise UserError(
                    "--dense-projector attention needs the student's whole map: leave out --token-drop, or take "
                    "--dense-projector linear"
                )

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "distill", config.token_drop)
        self.teachers: list[Frozen] = []

    @property
    def teacher(self) -> Frozen:
        """The first teacher, that of --teacher."""
        return self.teachers[0]

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """LightlyTrain's lengths of the queue: 16 for 50 images, 4,096 for 20,000, 8,192 above."""
        return {"queue": sizes.at_most_a_share(8192, images, 2 / 5)}

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The teachers, the first one with its heads if they are used."""
        names = teacher_names(1 + len(config.more_teachers))
        return ("teacher_heads", *names[1:]) if config.heads_weight else names

    @classmethod
    def more_teachers(cls, config: Any) -> tuple[str, ...]:
        """The teachers beside the first."""
        named: tuple[str, ...] = config.more_teachers
        return named

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the teachers, and add for each the projectors to its width, the queue and the statistics."""
        self.teachers = [networks[name] for name in self.frozen(self.config)]
        self._add_heads(self, self.teacher)  # its heads are the method's own attributes
        if len(self.teachers) > 1:
            self.further = nn.ModuleList(nn.Module() for _ in self.teachers[1:])
            for part, teacher in zip(self.further, self.teachers[1:], strict=True):
                self._add_heads(part, teacher)
        if self.config.heads_weight:
            self.encoder.require_one_width("distill --heads-weight")
            assert isinstance(self.teacher.method, HasPrototypeHeads)
            whole, patch = self.teacher.method.prototype_heads()
            self.class_head = head_like(whole, self.encoder.dim)
            if patch is not None:
                self.patch_head = head_like(patch, self.encoder.dim)

    def _add_heads(self, to: Any, teacher: Frozen) -> None:
        """Give a module what is trained or kept for one teacher."""
        config, dim = self.config, self.encoder.dim
        grid = _grid(self.encoder.image_size, self.encoder.stride)
        target_grid = _grid(_teacher_size(config, self.encoder.image_size), teacher.sight.stride)
        kind, width = _statistics(config), config.dense_blocks * teacher.dim
        if config.pooled_weight:
            to.pooled_head = _linear(self.encoder.pooled_dim, teacher.pooled_dim)
            if config.pooled_loss == "similarity":
                to.queue = FilledQueue(config.queue, teacher.pooled_dim)
        if config.relations_weight:
            if 1 in (math.prod(grid), math.prod(target_grid)):
                raise UserError(
                    f"--relations-weight {config.relations_weight:g} compares the places of an image, and the encoder has "
                    f"{grid[0]} x {grid[1]}, {teacher.spec} {target_grid[0]} x {target_grid[1]}: give --relations-weight "
                    f"0, or another --image-size"
                )
            to.relations_head = _linear(dim, teacher.dim)
        if config.dense_weight:
            _check_blocks(teacher, config.dense_blocks)
            if len(config.dense_taps) > 1:
                self.encoder.require("distill --dense-taps", "blocks")
                if "blocks" not in teacher.backbone.supports:
                    raise UserError(
                        f"--dense-taps: {teacher.spec} gives the features of its last block only; leave --dense-taps out, "
                        f"or choose a teacher that gives those of each block (a plain ViT)"
                    )
        attention = config.dense_projector == "attention"
        for name in _taps(config):
            head = QueryProjector(dim, grid, width, target_grid) if attention else _linear(dim, width)
            setattr(to, f"{name}_head", head)
        if kind is not None and config.pooled_weight:
            to.pooled_statistics = Whitener(teacher.pooled_dim, kind, config.standardise_images)
        if kind is not None:
            for name in _taps(config):
                setattr(to, f"{name}_statistics", Whitener(width, kind, config.standardise_images))

    def _branches(self) -> list[tuple[str, float, Frozen, Any]]:
        """Of each teacher: what names begin with, the weight, the network, and the module with its heads."""
        names = ["", *(f"{name}/" for name in self.frozen(self.config)[1:])]
        weights = self.config.teacher_weights or (1.0,) * len(names)
        parts = [self, *(self.further if len(names) > 1 else ())]
        return list(zip(names, weights, self.teachers, parts, strict=True))

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped, with colour; for each teacher the same pixels in its own size."""
        c = config.colour
        jitter = Jitter(brightness=0.8 * c, contrast=0.8 * c, saturation=0.4 * c, hue=0.2 * c) if c else None
        size, reads = _teacher_size(config, image_size), _reads(config)
        return (
            ViewSpec(name="image", size=image_size, scale=config.crop_scale, jitter=jitter, grayscale=0.2),
            *(
                ViewSpec(name=name, of="image", size=size, network=network, network_pixels=True, reads=reads)
                for name, network in zip(_view_names(config), cls.frozen(config), strict=True)
            ),
        )

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Of each image: for the similarities unit vectors of student and teacher, "student" and "target" (B, T), and the
        losses that treat each image by itself with what they are compared with in `loss`: "relations",
        "relations_uniform", "dense", "tap1" and so on, and "vector" (B,), "dense_mean" and "vector_mean" (B, T'),
        "dense_square" and "vector_square" (B,). As long as statistics are being learned also "pooled_features" (B, 1, T)
        and "dense_features" (B, L, T'), and for the prototype heads what `_for_heads` gives. Of further teachers the same
        with the prefix "teacher2/" and so on."""
        config = self.config
        image, seen = batch.views["image"], [batch.views[name] for name in _view_names(config)]
        if config.mixup and self.training:  # validation and its losses are of whole images
            check_pairs(step)
            share = step.shared_rand(1)
            image, seen = mixed(image, share), [mixed(each, share) for each in seen]
        options: dict[str, Any] = dropped(self.encoder, image, step, config.token_drop)
        kept, earlier = options.get("keep"), list(_taps(config).values())[:-1]
        if earlier:
            options["blocks"] = tuple(_block(share, self.encoder.depth) for share in earlier)
        maps = bool(config.relations_weight or config.dense_weight or config.heads_weight)
        own = encode(self.encoder, image, step, **options) if maps else None
        pooled = encode_pooled(self.encoder, [image], step, **options)[0] if own is None else own.pooled
        found: dict[str, Tensor] = {}
        for view, (prefix, _, teacher, heads) in zip(seen, self._branches(), strict=True):
            target = self.taught(view, maps, teacher, tuple(_block(share, teacher.backbone.depth) for share in earlier))
            each = self._pooled(heads, pooled, target.pooled) if config.pooled_weight else {}
            if own is not None:
                if config.relations_weight:
                    tokens, wanted = self._matched(heads.relations_head(own.patches), own.grid, target, kept)
                    wanted = wanted[..., -tokens.shape[-1] :]  # of the last block
                    each["relations"], each["relations_uniform"] = relations(wanted, tokens, config.temperature)
                for i, name in enumerate(_taps(config)):
                    mine, theirs = own, target
                    if i < len(earlier):
                        mine = replace(own, patches=own.blocks[i][:, -own.patches.shape[1] :])
                        normed = final_norm(teacher, target.blocks[i])
                        theirs = replace(target, patches=normed[:, -target.patches.shape[1] :])
                    each |= self._dense(heads, name, mine, theirs, kept)
                if config.heads_weight and heads is self:
                    each |= self._for_heads(own, target, kept)
            found |= {prefix + name: value for name, value in each.items()}
        return found

    def _for_heads(self, own: Features, target: Features, kept: Tensor | None) -> dict[str, Tensor]:
        """What the prototype heads get: class tokens (B, 1, D) and (B, 1, T), and patches (B, L, D) and (B, L, T). An
        encoder without a class token gives its pooled vector."""
        if target.cls is None:
            raise UserError(f"--heads-weight: {self.teacher.spec} has no class token, which its head was trained with")
        mine = own.pooled if own.cls is None else own.cls
        found = {"class_own": mine[:, None], "class_target": target.cls[:, None]}
        if hasattr(self, "patch_head"):
            patches, theirs = self._matched(own.patches, own.grid, target, kept)
            found |= {"patch_own": patches, "patch_target": theirs[..., -self.teacher.dim :]}
        return found

    def _pooled(self, heads: Any, pooled: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The unit vectors (B, T) of student and teacher, or how far the student's vector is from the teacher's, (B,), and
        the moments of the targets."""
        loss, statistics = self.config.pooled_loss, _of(heads, "pooled")
        found = {}
        if statistics is not None:
            found = {"pooled_features": target[:, None]} if statistics.learning else {}
            target = statistics(target)
        mine = heads.pooled_head(pooled)
        if loss == "similarity":
            return {**found, "student": l2_normalize(mine), "target": l2_normalize(target)}
        return {**found, "vector": distances(mine, target, loss), **_moments("vector", target.float()[:, None], loss)}

    def _dense(self, heads: Any, name: str, own: Features, target: Features, kept: Tensor | None) -> dict[str, Tensor]:
        """The distance of projected and teacher's maps of a tap, (B,), and the moments of the targets."""
        config, statistics, head = self.config, _of(heads, name), getattr(heads, f"{name}_head")
        found = {}
        if statistics is not None:
            found = {f"{name}_features": target.patches} if statistics.learning else {}
            target = replace(target, patches=statistics(target.patches))
        if isinstance(head, QueryProjector):
            mine, theirs = head(own.patches, own.grid, target.grid), target.patches
        else:
            mine, theirs = self._matched(head(own.patches), own.grid, target, kept)
        mine, theirs = mine.float(), transformed(theirs, config.dense_norm)
        each = distances(mine, theirs, config.dense_loss).mean(1)
        if config.dense_centred_weight:
            mine_centred, theirs_centred = mine - mine.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
            centred = distances(mine_centred, theirs_centred, config.dense_loss).mean(1)
            each = each + config.dense_centred_weight * centred
        return {**found, name: each, **_moments(name, theirs, config.dense_loss)}

    def _matched(self, mine: Tensor, grid: Grid, target: Features, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """The student's map resized to the teacher's grid, and the teacher's. With patches left out, the teacher's map is
        resized to the student's grid and only the places of the kept ones count."""
        if kept is None:
            return resized(mine, grid, target.grid, "bilinear"), target.patches
        return mine, masks.rows(resized(target.patches, target.grid, grid, "bilinear"), kept)

    def taught(
        self, images: Tensor, maps: bool, teacher: Frozen | None = None, blocks: tuple[int, ...] = ()
    ) -> Features:
        """A teacher's features (default: the first one's) of its views (B, C, H, W), with the outputs of `blocks`; the
        pooled ones alone where `maps` is false."""
        teacher = teacher or self.teacher
        if blocks:
            return teacher(images, blocks=blocks)
        if maps:
            return last_blocks(teacher, images, self.config.dense_blocks if self.config.dense_weight else 1)
        return teacher(images, **({"pooled_only": True} if "pooled_only" in teacher.backbone.supports else {}))

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The weighted sum of the losses. Each one's term "..._relative" is its value over that of a student that says the
        same of every image or place. Terms of further teachers begin with "teacher2_" and so on."""
        parts: list[Tensor] = []
        terms: dict[str, Tensor] = {}
        carry: dict[str, Tensor] = {}
        for prefix, weight, _, heads in self._branches():
            given = {name.removeprefix(prefix): v for name, v in embedded.items() if name.startswith(prefix)}
            found, kept = self._losses(heads, given, step)
            for name, (part, each, constant) in found.items():
                term, statistics = prefix.replace("/", "_") + name, _of(heads, name)
                mean = each.detach().mean()
                relative = mean / constant.clamp(min=1e-12)
                if statistics is not None:  # until its statistics are known there is no target
                    each, mean = each * statistics.ready, mean * statistics.ready
                    relative = torch.where(statistics.ready, relative, 1.0)
                parts.append(weight * part * each)
                terms[term], terms[f"{term}_relative"] = mean, relative
            carry |= {prefix + name: value for name, value in kept.items()}
        if "target" in carry:  # of one teacher, if of any
            carry["place"] = torch.arange(step.batch_size, device=step.device)[step.rows]
        per_sample = torch.stack(parts).sum(0)
        return Losses(total=per_sample.mean(), terms=terms, per_sample=per_sample.detach(), carry=carry)

    def _losses(
        self, heads: Any, embedded: dict[str, Tensor], step: Step
    ) -> tuple[dict[str, tuple[float, Tensor, Tensor]], dict[str, Tensor]]:
        """Of one teacher, by name of the loss: its weight, the losses (B,), and what to divide them by; and what
        `after_step` needs."""
        config = self.config
        found: dict[str, tuple[float, Tensor, Tensor]] = {}
        carry = {}
        if "student" in embedded:
            target = embedded["target"].detach()
            with torch.autocast(target.device.type, enabled=False):
                rows, known = heads.queue.with_batch(distributed.gather(target))
                theirs, mine = (x @ rows.T / config.temperature for x in (target, embedded["student"]))
                each, uniform = divergences(theirs, mine, known)
            found["pooled"] = config.pooled_weight, each, uniform.mean()
            carry["target"] = target
        if "vector" in embedded:
            constant = _constant(embedded, "vector", config.pooled_loss)
            found["pooled"] = config.pooled_weight, embedded["vector"], constant
        if "relations" in embedded:
            uniform = embedded["relations_uniform"].detach().mean()
            found["relations"] = config.relations_weight, embedded["relations"], uniform
        for name in _taps(config):
            if name in embedded:
                found[name] = config.dense_weight, embedded[name], _constant(embedded, name, config.dense_loss)
        if "class_own" in embedded:
            assert isinstance(self.teacher.method, HasPrototypeHeads)
            for name, theirs in zip(("class", "patch"), self.teacher.method.prototype_heads(), strict=True):
                if theirs is not None:
                    each, uniform = divergence_of_heads(
                        getattr(self, f"{name}_head"),
                        embedded[f"{name}_own"],
                        theirs,
                        embedded[f"{name}_target"],
                        config.heads_temperature,
                    )
                    found[name] = config.heads_weight, each, uniform
        for name in ("pooled", *_taps(config)):
            if f"{name}_features" in embedded:
                statistics = _of(heads, name)
                assert statistics is not None
                learned = statistics.carry(embedded[f"{name}_features"], step)
                carry |= {f"{name}/{key}": value for key, value in learned.items()}
        return found, carry

    def after_step(self, step: Step) -> None:
        """A teacher's vectors of the global batch take the place of the oldest in its queue; statistics are learned."""
        order = None
        for prefix, _, _, heads in self._branches():
            if prefix + "target" in step.carried:
                # In the order of the global batch, so that the queue is the same on any number of processes and
                # micro-batches.
                order = distributed.gather(step.carried["place"]).argsort() if order is None else order
                statistics = _of(heads, "pooled")
                ok = step.ok if statistics is None else step.ok & statistics.ready
                heads.queue.put_(distributed.gather(step.carried[prefix + "target"])[order], ok)
            for name in ("pooled", *_taps(self.config)):
                statistics = _of(heads, name)
                if statistics is not None:
                    own, start = copy.copy(step), f"{prefix}{name}/"
                    own.carried = {n.removeprefix(start): v for n, v in step.carried.items() if n.startswith(start)}
                    statistics.after_step(own)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """Each loss relative to that of a student that tells nothing apart."""
        config = self.config
        found = {}
        if config.pooled_weight and config.pooled_loss == "similarity":
            found["pooled_relative"] = (
                1.0,
                "every image is equally similar to all images in the queue; nothing is learned",
            )
        elif config.pooled_weight:
            found["pooled_relative"] = 1.0, "every image is predicted as the mean target; nothing is learned"
        if config.relations_weight:
            found["relations_relative"] = 1.0, "all places of an image have the same features; nothing is learned"
        for name in _taps(config):
            if not config.dense_centred_weight:
                found[f"{name}_relative"] = 1.0, "every place is predicted as the mean target; nothing is learned"
        own = {}
        if config.heads_weight:
            own["class_relative"] = 1.0, "every image is given the uniform distribution; nothing is learned"
            if hasattr(self, "patch_head"):
                own["patch_relative"] = 1.0, "every patch is given the uniform distribution; nothing is learned"
        more = {f"{name}_{term}": stated for name in self.frozen(config)[1:] for term, stated in found.items()}
        return found | own | more

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The crop, and what teacher and student see of it."""
        images = batch.views["image"]
        return {"view": images, "mixed": mixed(images, step.shared_rand(1))} if self.config.mixup else {"view": images}


def _statistics(config: Any) -> Literal["standardise", "phi_s"] | None:
    """The transform by statistics of the images, in the words of `Whitener`; None without one."""
    if config.standardise == "auto":
        return "phi_s" if config.more_teachers else None
    kinds: dict[str, Literal["standardise", "phi_s"]] = {"channels": "standardise", "phi_s": "phi_s"}
    return kinds.get(config.standardise)


def _view_names(config: Any) -> tuple[str, ...]:
    """Names of the teachers' views."""
    return teacher_names(1 + len(config.more_teachers))


def _taps(config: Any) -> dict[str, float]:
    """The maps that the dense loss compares: names, and shares of the depth. The last one is "dense"."""
    if not config.dense_weight:
        return {}
    *earlier, last = config.dense_taps
    return {**{f"tap{i}": share for i, share in enumerate(earlier, start=1)}, "dense": last}


def _block(share: float, depth: int) -> int:
    """The last of the blocks that are this share of the depth."""
    return max(0, math.ceil(share * depth - 1e-9) - 1)


def _of(heads: Any, name: str) -> Whitener | None:
    """The statistics of a teacher for the loss of that name; None without any."""
    found: Whitener | None = getattr(heads, f"{name}_statistics", None)
    return found


def _moments(name: str, targets: Tensor, loss: str) -> dict[str, Tensor]:
    """Of targets (B, L, T) their mean (B, T), of unit vectors for cosines, and their mean square (B,)."""
    vectors = F.normalize(targets, dim=-1) if loss == "cosine" else targets
    return {f"{name}_mean": vectors.mean(1), f"{name}_square": vectors.square().mean((1, 2))}


@torch.no_grad()
def _constant(embedded: dict[str, Tensor], name: str, loss: str) -> Tensor:
    """The distance () of predicting the batch's mean target everywhere, for cosines the mean unit vector, without the
    centred part."""
    mean = distributed.mean(embedded[f"{name}_mean"].mean(0))
    square = distributed.mean(embedded[f"{name}_square"].mean())
    return 1 - mean.norm() if loss == "cosine" else square - mean.square().mean()


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
    if (
        config.mixup
        or config.heads_weight
        or (config.dense_weight and (config.dense_blocks > 1 or len(config.dense_taps) > 1))
    ):
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
        raise UserError(f"--dense-blocks {count}: {teacher.spec} gives the features of its last block only; give 1")
