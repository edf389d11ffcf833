"""MV-MR (Kinakh, Drozdova & Voloshynovskiy, "MV-MR: Multi-Views and Multi-Representations for Self-Supervised Learning and
Knowledge Distillation", Entropy 2024).

An augmented view and the plain image get embeddings that agree, that vary over the batch, and that depend, by distance
correlation, on each other and on fixed representations of the plain image. Shapes: B images of this process, N of all
processes, D encoder width, K embedding width, F floats of a representation.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import Reads, ViewSpec
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, FROM_0_BELOW_1, FROM_0_TO_1, NOT_NEGATIVE, at_least, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import distance_correlation, sizes
from ssl_pretrain.parts.heads import mlp
from ssl_pretrain.parts.hog import hog
from ssl_pretrain.parts.scattering import scattering
from ssl_pretrain.parts.views import encode_pooled, jitter, require_token_drop
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod

EPSILON = 1e-4  # under the root of the standard deviation, as of VICReg


@final
class MVMR(WholeBatchMethod):
    """The squared distance of the two embeddings, the hinge of their standard deviations, and 1 - distance correlation of
    them with each other and with each fixed representation.

    Defaults are the paper's and its release's for ResNet-50, except for the sign of the representations' terms (released
    as + distance correlation). Raises UserError for options out of range.
    """

    recipe = Recipe(
        lr=1e-4,
        lr_batch=256,
        lr_scaling="none",
        betas=(0.9, 0.999),
        weight_decay=1e-6,
        final_lr=1e-6,
        warmup=10 / 1000,
        encoder={"pool": "cls"},
        small={
            "lr": 1e-3,
            "projector_dim": 256,
            "batch_size": 128,
            "scattering_weight": 0.0,
            "std_weight": 0.0,
            "augmented_weight": 0.0,
            "blur": 0.0,
            "crop_scale": (0.2, 1.0),
            "patch_size": 8,
            "warmup_steps": 15,
            "steps": 200,
        },
        tiny={"projector_dim": 32},
    )
    least_batch = distance_correlation.LEAST

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Multi-views and multi-representations (MV-MR)."""

        projector_dim: int | None = None
        """Width of the projector's three layers, and so of the embeddings (default: by the encoder; 8,192 from ViT-B
        on)."""
        invariance_weight: float = 1.0
        """Weight of the mean squared distance between the two embeddings."""
        variance_weight: float = 1.0
        """Weight of the hinge loss that keeps each channel's standard deviation at 1 or above."""
        views_weight: float = 1.0
        """Weight of 1 - distance correlation of the two embeddings."""
        pixels_weight: float = 1.0
        """Weight of 1 - distance correlation with the plain image's pixels; 0: not computed, as for those below."""
        hog_weight: float = 1.0
        """The same with histograms of oriented gradients."""
        std_weight: float = 1.0
        """The same with the standard deviation of 3 x 3 pixels around each pixel."""
        scattering_weight: float = 1.0
        """The same with a scattering transform of two layers (2 scales, 8 angles)."""
        augmented_weight: float = 1.0
        """The same with the pixels of the augmented view."""
        teacher_weight: float = 0.0
        """The same with the pooled features of --teacher; 0: no teacher."""
        representation_size: int = 64
        """Longer side in pixels to which images are reduced for pixels, HOG, deviations and scattering."""
        hog_cell: int = 8
        """Side of a HOG cell in pixels."""
        crop_scale: tuple[float, float] = (0.08, 1.0)
        """Smallest and largest share of the image's area that the augmented view covers."""
        colour: float = 1.0
        """Strength of the augmented view's colour jitter."""
        blur: float = 0.5
        """Probability of blur in the augmented view; 0 is usual for images of 32 pixels."""
        token_drop: float = 0.0
        """Share of the patches that the encoder does not see (FLIP), drawn for each view; 0 in the last 5 % of a run."""

        def __post_init__(self) -> None:
            within(self, FROM_0_BELOW_1, "token_drop")
            within(self, at_least(2), "projector_dim")
            within(self, NOT_NEGATIVE, "invariance_weight", "variance_weight", "views_weight", "colour")
            within(self, NOT_NEGATIVE, "pixels_weight", "hog_weight", "std_weight", "scattering_weight")
            within(self, NOT_NEGATIVE, "augmented_weight", "teacher_weight")
            within(self, at_least(8), "representation_size")
            within(self, AT_LEAST_1, "hog_cell")
            within(self, FROM_0_TO_1, "blur")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        require_token_drop(encoder, "mvmr", config.token_drop)
        width = self.config.projector_dim
        self.projector = mlp((encoder.pooled_dim, width, width, width), last_bias=False)
        self.teacher: Frozen | None = None
        weights = {
            "pixels": config.pixels_weight,
            "hog": config.hog_weight,
            "std": config.std_weight,
            "scattering": config.scattering_weight,
            "augmented": config.augmented_weight,
            "teacher": config.teacher_weight,
        }
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {"projector_dim": sizes.width(8192, encoder.dim)}

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The teacher, if its features are one of the representations."""
        return ("teacher",) if config.teacher_weight > 0 else ()

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the teacher."""
        self.teacher = networks.get("teacher")

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """A crop with SimCLR's colours, and the plain image: its largest square, without flips and colours."""
        augmented = ViewSpec(
            name="augmented",
            size=image_size,
            scale=config.crop_scale,
            jitter=jitter(config.colour),
            grayscale=0.2,
            blur=config.blur,
        )
        shape = image_size[1] / image_size[0]
        plain = ViewSpec(name="plain", size=image_size, scale=(1.0, 1.0), ratio=(shape, shape), hflip=0.0)
        if config.teacher_weight == 0:
            return augmented, plain
        reads = Reads(outputs=("pooled",))
        return augmented, plain, ViewSpec(name="teacher", of="plain", size=image_size, network="teacher", reads=reads)

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The encoder's vectors of the two views, "augmented" and "plain" (B, D), and each representation, "of_NAME" (B,
        F), without gradients."""
        names = ("augmented", "plain")
        seen = encode_pooled(self.encoder, [batch.views[name] for name in names], step, self.config.token_drop)
        fixed = {f"of_{name}": self.representation(name, batch) for name in self.weights}
        return dict(zip(names, seen, strict=True)) | fixed

    @torch.no_grad()
    def representation(self, name: str, batch: Batch) -> Tensor:
        """A fixed representation of each image: float32 (B, F)."""
        if name == "teacher":
            assert self.teacher is not None
            return self.teacher(batch.views["teacher"]).pooled.float()
        if name == "augmented":
            return self.reduced(batch.views["augmented"]).flatten(1)
        images = self.reduced(batch.views["plain"])
        if name == "hog":
            cell = min(self.config.hog_cell, *images.shape[-2:])
            return hog(images, (cell, cell), cell).flatten(1)
        if name == "std":
            return local_deviation(images).flatten(1)
        return (scattering(images) if name == "scattering" else images).flatten(1)

    def reduced(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) with a longer side of at most `representation_size`: float32, means of areas."""
        share = self.config.representation_size / max(images.shape[-2:])
        if share >= 1:
            return images.float()
        size = [max(1, round(side * share)) for side in images.shape[-2:]]
        return F.interpolate(images.float(), size=size, mode="area")

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The weighted sum of "invariance", "variance" (the mean of both views') and 1 - each distance correlation.

        Terms: "correlation_views" and "correlation_NAME" of each representation (the mean of both embeddings' with it), in
        [0, 1]; and "unbiased_...", the bias-corrected squares of them, which are about 0 for independent vectors.
        """
        config = self.config
        views = [self.projector(embedded[name]).float() for name in ("augmented", "plain")]
        invariance = distributed.mean((views[0] - views[1]).square().mean())
        variance = (_hinge(views[0]) + _hinge(views[1])) / 2
        apart = [distance_correlation.distances(distributed.gather(view)) for view in views]
        pairs = {"views": [(apart[0], apart[1])]}
        for name in self.weights:
            with torch.no_grad():
                fixed = distance_correlation.distances(distributed.gather(embedded[f"of_{name}"]))
            pairs[name] = [(own, fixed) for own in apart]
        total = config.invariance_weight * invariance + config.variance_weight * variance
        terms = {"invariance": invariance.detach(), "variance": variance.detach()}
        for name, weight in {"views": config.views_weight, **self.weights}.items():
            found = torch.stack([distance_correlation.biased(a, b) for a, b in pairs[name]]).mean()
            total = total + weight * (1 - found)
            terms[f"correlation_{name}"] = found.detach()
            with torch.no_grad():
                corrected = [distance_correlation.unbiased(a, b) for a, b in pairs[name]]
                terms[f"unbiased_{name}"] = torch.stack(corrected).mean()
        return Losses(total=total, terms=terms)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The hinge of channels that do not vary at all."""
        return {"variance": (1 - math.sqrt(EPSILON), "all images get the same embedding")}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The two views, the local deviations, and the mean over the first layer of the scattering transform."""
        plain = batch.views["plain"]
        small = self.reduced(plain)
        first = scattering(small).unflatten(1, (plain.shape[1], -1))[:, :, 1:17].mean(2)
        maps = {"deviation": local_deviation(small), "scattering": first}
        shown = {name: F.interpolate(each, size=plain.shape[-2:], mode="nearest") for name, each in maps.items()}
        return {"augmented": batch.views["augmented"], "plain": plain, **shown}


def local_deviation(images: Tensor) -> Tensor:
    """The standard deviation of the 3 x 3 pixels around each pixel, of images mirrored at the border: (B, C, H, W)."""
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    mean = F.avg_pool2d(padded, 3, stride=1)
    return (F.avg_pool2d(padded.square(), 3, stride=1) - mean.square()).clamp_min(0).sqrt()


def _hinge(view: Tensor) -> Tensor:
    """The mean over channels of how much the standard deviation over the global batch of (B, K) is below 1: ()."""
    total = len(view) * distributed.size()
    centred = view - distributed.mean(view.mean(0))
    variances = distributed.mean(centred.square().mean(0)) * (total / (total - 1))
    return torch.relu(1 - (variances + EPSILON).sqrt()).mean()
