"""Supervised classification in the same loop: a control experiment that shows what training with labels gives. With `mim` a
decoder also predicts a tokenizer's ids of masked patches ("Improve Supervised Representation Learning with Masked Image
Modeling", 2023).

Shapes: B images, N patches, M of them masked, D encoder width, K classes or codes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import Reads, ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, FROM_0_TO_1, NOT_NEGATIVE, at_least, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import masked_autoencoder
from ssl_pretrain.parts.id_prediction import compared
from ssl_pretrain.parts.masked_autoencoder import decoded
from ssl_pretrain.parts.masks import random_masking
from ssl_pretrain.parts.views import encode, encode_pooled
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class Supervised(Method):
    """Cross-entropy of the labels, with label smoothing; images without one (-1) do not count. With `mim`, plus the
    cross-entropy of ids of masked patches, of all images.

    Defaults are MAE's for training ViTs from scratch (He et al., 2022, appendix A.2), without mixup and random
    augmentation. Raises UserError if the data has no labels, or more classes than `classes`, and UnsupportedByBackbone
    with `mim` for an encoder that cannot drop tokens.
    """

    grid: tuple[int, int]
    decoder_embed: nn.Linear
    mask_token: nn.Parameter
    decoder_blocks: nn.ModuleList
    decoder_norm: nn.LayerNorm
    decoder_pred: nn.Linear
    decoder_pos_embed: Tensor
    tokenizer: Frozen

    recipe = Recipe(
        lr=1e-4,
        lr_batch=256,
        betas=(0.9, 0.95),
        weight_decay=0.3,
        warmup=20 / 300,
        small={"lr": 1e-3, "weight_decay": 0.05, "classes": 20, "steps": 150},
        tiny={"classes": 6, "mim_depth": 1},
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
        mim: bool = False
        """Also predict the ids that --tokenizer gives masked patches, from the others."""
        mim_weight: float = 1.0
        """With --mim: weight of that loss; the labels' has 1."""
        mim_ratio: tuple[float, float] = (0.5, 1.0)
        """With --mim: smallest and largest masking ratio; one is drawn for each step."""
        mim_depth: int = 2
        """With --mim: number of blocks of the decoder, which is not exported."""

        def __post_init__(self) -> None:
            within(self, at_least(2), "classes")
            within(self, FROM_0_TO_1, "label_smoothing")
            within(self, ABOVE_0_TO_1, "crop_scale", "mim_ratio", ascending=True)
            within(self, NOT_NEGATIVE, "mim_weight")
            within(self, AT_LEAST_1, "mim_depth")

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        self.head = nn.Linear(encoder.pooled_dim, config.classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if config.mim:
            encoder.require("supervised --mim", "keep")

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The tokenizer, with `mim`."""
        return ("tokenizer",) if config.mim else ()

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the tokenizer, and add the decoder for its codes."""
        if not self.config.mim:
            return
        self.tokenizer = networks["tokenizer"]
        assert self.tokenizer.quantizer is not None
        sizes = masked_autoencoder.decoder_sizes(None, self.encoder)
        masked_autoencoder.add_decoder(
            self,
            width=sizes["decoder_dim"],
            depth=self.config.mim_depth,
            heads=sizes["decoder_heads"],
            mask_ratio=0.0,
            values=self.tokenizer.quantizer.size,
        )
        masked_autoencoder.initialise_decoder(self)
        if self.grid == (1, 1):
            raise UserError("--mim masks some patches of an image, and the encoder has one: use larger --image-size")

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped; with `mim` the same pixels for the tokenizer, with as many patches."""
        image = ViewSpec(name="image", size=image_size, scale=config.crop_scale)
        if not config.mim:
            return (image,)
        reads = Reads(outputs=("ids",))
        return image, ViewSpec(name="tokens", of="image", size=image_size, network="tokenizer", reads=reads)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The mean cross-entropy over the images; term "accuracy" is the share of correct predictions in percent.

        With `mim` also "classification", the labels' loss alone, "tokens", the ids', and "token_accuracy",
        "token_majority" and "token_gain" of `parts.id_prediction`.
        """
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
        losses = Losses(total=each.mean(), terms={"accuracy": 100 * right}, per_sample=each.detach())
        if self.config.mim:
            self._add_tokens(losses, batch, step)
        return losses

    def _add_tokens(self, losses: Losses, batch: Batch, step: Step) -> None:
        """Add the loss of the ids of masked patches, from a second pass of the encoder over the others."""
        assert losses.per_sample is not None
        images, weight = batch.views["image"], self.config.mim_weight
        low, high = self.config.mim_ratio
        with step.on_host() as host:
            ratio = low + (high - low) * float(host.shared_rand(1))  # the same for the whole batch: one shape
        grid = (images.shape[-2] // self.encoder.stride[0], images.shape[-1] // self.encoder.stride[1])
        patches = grid[0] * grid[1]
        kept = min(patches - 1, max(1, int(patches * (1 - ratio))))
        keep, masked = random_masking(step.rand(patches), kept)
        seen = encode(self.encoder, images, step, keep=keep)
        ids = self.tokenizer.ids(batch.views["tokens"]).flatten(1).gather(1, masked)
        logits = decoded(self, seen, keep, masked, grid).float()
        each = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        losses.terms |= {"classification": losses.total.detach(), "tokens": each.detach().mean()}
        terms = compared(logits.detach(), ids, each.detach())
        losses.terms |= {f"token_{name}": value for name, value in terms.items()}
        losses.total = losses.total + weight * each.mean()
        losses.per_sample = losses.per_sample + weight * each.detach().mean(1)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The loss of equal answers to every image; with `mim` also the codes' frequencies, predicted of every patch."""
        equal = (math.log(self.config.classes), "all classes have the same probability for every image")
        if not self.config.mim:
            return {"loss": equal}
        ids = (0.0, "ids are predicted no better than by their frequencies; the decoder learns nothing of the images")
        return {"classification": equal, "token_gain": ids}
