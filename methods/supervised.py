"""Supervised classification in the same loop: a control experiment that shows what training with labels gives.

Shapes: B images, D encoder width, K classes.
"""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import nn

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, FROM_0_TO_1, at_least, within
from ssl_pretrain.parts.views import encode_pooled
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class Supervised(Method):
    """Cross-entropy of the labels, with label smoothing; images without one (-1) do not count.

    Defaults are MAE's for training ViTs from scratch (He et al., 2022, appendix A.2), without mixup and random
    augmentation. Raises UserError if the data has no labels, or more classes than `classes`.
    """

    recipe = Recipe(
        lr=1e-4,
        lr_batch=256,
        betas=(0.9, 0.95),
        weight_decay=0.3,
        warmup=20 / 300,
        small={"lr": 1e-3, "weight_decay": 0.05, "classes": 20, "steps": 150},
        tiny={"classes": 6},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Supervised control."""

        classes: int = 1000
        """Number of outputs of the classifier; at least the number of classes of the data."""
        label_smoothing: float = 0.1
        """Share of the target that is spread over all classes."""
        crop_scale: tuple[float, float] = (0.08, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, at_least(2), "classes")
            within(self, FROM_0_TO_1, "label_smoothing")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        self.head = nn.Linear(encoder.dim, config.classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped."""
        return (ViewSpec(name="image", size=image_size, scale=config.crop_scale),)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The mean cross-entropy over the images; term "accuracy" is the share of correct predictions in percent."""
        labels = batch.labels
        if labels is None:
            raise UserError(
                "--method supervised needs labels of two classes or more, and these images have none or one class only: "
                "put them into one folder for each class"
            )
        (pooled,) = encode_pooled(self.encoder, [batch.views["image"]], step)
        logits = self.head(pooled).float()
        known = labels >= 0
        # A label beyond the classes would read past the logits' end, and a GPU would crash much later: so it gives NaN.
        inside = labels < self.config.classes
        each = F.cross_entropy(
            logits,
            torch.where(known & inside, labels, 0),
            reduction="none",
            label_smoothing=self.config.label_smoothing,
        )
        each = torch.where(inside, each * known, torch.nan)
        right = (logits.argmax(1) == labels).float().mean()
        return Losses(total=each.mean(), terms={"accuracy": 100 * right}, per_sample=each.detach())

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The loss of equal answers to every image."""
        return {"loss": (math.log(self.config.classes), "all classes have the same probability for every image")}
