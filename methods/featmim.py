"""Masked feature prediction: EVA (Fang et al., CVPR 2023), MaskFeat (Wei et al., CVPR 2022) and DTM (Kim et al., 2024).

Blocks of an image are masked. The encoder sees the whole grid, with a mask token in the masked places, and one linear layer
predicts features of the masked patches: those of a frozen teacher that sees the whole image, or histograms of oriented
gradients (HOG). Shapes: B images, N patches on an (h, w) grid, D encoder width, T values of a target.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import Reads, ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import (
    ABOVE_0_TO_1,
    AT_LEAST_1,
    BETWEEN_0_AND_1,
    FROM_0_BELOW_1,
    NOT_NEGATIVE,
    POSITIVE,
    at_least,
    within,
)
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import targets
from ssl_pretrain.parts.block_masks import ATTEMPTS, block_masks, completed
from ssl_pretrain.parts.morphing import groups
from ssl_pretrain.parts.targets import PatchTarget, distances, spread
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class FeatMIM(Method):
    """Predict a frozen network's features, or HOG, of masked patches.

    Defaults are EVA's (section 2.1 and the released code) with the teacher of --teacher. Raises UserError for options out
    of range or a teacher that does not fit, and UnsupportedByBackbone for an encoder that cannot put a token in place of
    patches.
    """

    recipe = Recipe(
        lr=1e-3,
        lr_batch=4096,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        clip_grad=3.0,
        warmup=2 / 150,
        encoder={"drop_path": 0.1},
        small={"lr": 2e-3, "steps": 250, "drop_path": 0.0, "target": "hog", "loss": "mse", "batch_size": 64},
        tiny={"target_norm": "layer_norm", "target_images": 32, "target_codes": 8},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Masked feature prediction (EVA, MaskFeat, DTM)."""

        target: Literal["teacher", "hog"] = "teacher"
        """What is predicted: patch features of --teacher, or histograms of oriented gradients (MaskFeat; no teacher)."""
        target_block: int = -1
        """Block of the teacher whose patch features are the target; negative numbers count from the end."""
        target_final_norm: bool = True
        """Take the teacher's features after its final norm."""
        target_norm: Literal["none", "layer_norm", "l2", "standardise", "phi_s", "kmeans"] = "none"
        """Transform of each target vector: none, layer norm without affine, or length 1; with statistics of the data:
        channels of mean 0 and variance 1, the same by a rotation and one scale (PHI-S), or the id of the nearest of
        --target-codes k-means centres."""
        target_images: int = 1024
        """Images at the start of the run from which standardise, phi_s and kmeans are learned. The loss is 0 until then."""
        target_codes: int = 512
        """With kmeans: number of centres."""
        loss: Literal["cosine", "smooth_l1", "mse", "kl", "cross_entropy"] = "cosine"
        """Distance between prediction and target (EVA: cosine; DTM: smooth_l1; MaskFeat: mse); the divergence of their
        softmaxes (kl); or the cross-entropy of ids (with kmeans)."""
        beta: float = 2.0
        """With smooth_l1: where the loss goes from a square to a line."""
        temperature: float = 1.0
        """With kl: temperature of both softmaxes."""
        label_smoothing: float = 0.0
        """With cross_entropy: share of the target that is spread over all ids."""
        hog_cell: int = 8
        """With HOG: side of a cell in pixels. At most half a patch is used, and it must divide the patch."""
        mask_ratio: float = 0.4
        """Masking ratio: share of the patches that are masked, in blocks."""
        visible_weight: float = 0.0
        """Weight of the same loss on the visible patches (DTM: 1)."""
        morphings: int = 0
        """Number of random token morphings of a step (DTM: 2); 0: each token is its own target."""
        morphing_rounds: int = 14
        """Largest number of rounds in which a morphing merges tokens."""
        crop_scale: tuple[float, float] = (0.2, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, AT_LEAST_1, "hog_cell", "morphing_rounds", "target_images")
            within(self, at_least(2), "target_codes")
            within(self, BETWEEN_0_AND_1, "mask_ratio")
            within(self, FROM_0_BELOW_1, "label_smoothing")
            within(self, NOT_NEGATIVE, "visible_weight", "morphings")
            within(self, POSITIVE, "beta", "temperature")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)
            if (self.target_norm == "kmeans") != (self.loss == "cross_entropy"):
                raise UserError(
                    "--target-norm kmeans gives ids, and --loss cross_entropy needs them: give both or none"
                )
            if self.target_norm == "kmeans" and self.morphings:
                raise UserError(
                    "--morphings averages targets, and --target-norm kmeans gives ids: leave one of them out"
                )

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("featmim", "replace")
        self.mask_token = nn.Parameter(torch.empty(encoder.token_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.target = PatchTarget(
            config.target,
            encoder,
            norm=config.target_norm,
            block=config.target_block,
            final_norm=config.target_final_norm,
            hog_cell=config.hog_cell,
            images=config.target_images,
            codes=config.target_codes,
        )
        if config.target == "hog":
            self._add_head(self.target.width)

    def _add_head(self, width: int) -> None:
        """The linear layer that predicts a target of `width` values."""
        self.head = nn.Linear(self.encoder.dim, width)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The teacher, unless the target is HOG."""
        return targets.networks(config.target)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the teacher, and add the head for its width."""
        self.target.prepare(networks)
        if self.config.target == "teacher":
            self._add_head(self.target.width)

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped, without colour; for a teacher also the same pixels with as many patches."""
        image = ViewSpec(name="image", size=image_size, scale=config.crop_scale)
        return targets.with_teacher(config.target, image, Reads(config.target_block, config.target_final_norm))

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The mean loss over the masked patches, plus `visible_weight` times that over the visible ones.

        Every image has the same number of masked patches. The term "relative" is the loss of the masked patches over that
        of predicting the batch's mean target for every patch.
        """
        images = batch.views["image"]
        grid = self.grid(images)
        features = self.target.features(batch, grid)
        wanted = self.target.transformed(features)
        masked = self.masks(grid, step).to(images.device, non_blocking=True)
        predicted = self.head(encode(self.encoder, images, step, replace=(masked, self.mask_token)).patches).float()
        each = torch.zeros(masked.shape, device=images.device)
        for weights in self.morphed(wanted, step):
            mine, theirs = (predicted, wanted) if weights is None else (weights @ predicted, weights @ wanted)
            each = each + self.distances(mine, theirs) / max(1, self.config.morphings)
        weight = masked / masked.sum(1, keepdim=True)
        if self.config.visible_weight:
            weight = weight + self.config.visible_weight * ~masked / (~masked).sum(1, keepdim=True)
        per_sample = self.target.gated((each * weight).sum(1))
        config = self.config
        mean = spread(wanted, config.loss, config.beta, config.temperature, config.label_smoothing, config.target_codes)
        return Losses(
            total=per_sample.mean(),
            terms={"relative": self.target.relative((each.detach() * masked).sum() / masked.sum(), mean)},
            per_sample=per_sample.detach(),
            carry=self.target.carry(features, step),
        )

    def distances(self, predicted: Tensor, wanted: Tensor) -> Tensor:
        """The loss of each patch (B, N)."""
        config = self.config
        return distances(predicted, wanted, config.loss, config.beta, config.temperature, config.label_smoothing)

    def after_step(self, step: Step) -> None:
        """Learn the transform of the targets, where it needs statistics."""
        self.target.after_step(step)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """The grid of patches of the student's images."""
        return images.shape[-2] // self.encoder.stride[0], images.shape[-1] // self.encoder.stride[1]

    def masks(self, grid: tuple[int, int], step: Step) -> Tensor:
        """Blocks of patches, the same number in every image: bool (B, N), True for a masked patch."""
        n = grid[0] * grid[1]
        count = min(n - 1, max(1, int(n * self.config.mask_ratio)))
        with step.on_host() as host:
            noise, rest = host.rand(ATTEMPTS, 4), host.rand(n)
            wanted = torch.full((len(noise),), float(count))
            return completed(
                block_masks(noise, grid, wanted, smallest=min(16, max(2, n // 12)), largest=count), wanted, rest
            )

    def morphed(self, targets: Tensor, step: Step) -> list[Tensor | None]:
        """The averages of each morphing, (B, N, N); or one None if there are none. The numbers of merged tokens and of
        rounds are random, and the same for the whole batch."""
        if not self.config.morphings:
            return [None]
        n = targets.shape[1]
        with step.on_host() as host:
            draws = host.shared_rand(self.config.morphings, 2).tolist()
        return [groups(targets, int(a * n), 1 + int(b * self.config.morphing_rounds)) for a, b in draws]

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """Without morphing, the loss relative to that of the mean target."""
        if self.config.morphings:
            return {}
        return {"relative": (1.0, "every masked patch is predicted as the mean target; nothing is learned")}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The crop, and what the student sees of it (masked patches grey)."""
        images = batch.views["image"]
        h, w = self.encoder.stride
        grid = self.grid(images)
        masked = self.masks(grid, step).to(images.device).unflatten(1, grid)
        hidden = masked.repeat_interleave(h, 1).repeat_interleave(w, 2)
        return {"view": images, "masked": images.masked_fill(hidden[:, None], 0.0)}
