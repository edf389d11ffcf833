"""data2vec 2.0 (Baevski et al., "Efficient Self-supervised Learning with Contextualized Target Representations for Vision,
Speech and Language", ICML 2023).

An EMA teacher sees the whole image once. The encoder sees several differently masked copies of it, and a small
convolutional decoder regresses the teacher's contextualised features of the masked patches. Shapes: B images, V masks
of each, N patches on an (h, w) grid, K of them kept, M = N - K masked, D width of encoder and decoder.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import (
    ABOVE_0_TO_1,
    AT_LEAST_1,
    BETWEEN_0_AND_1,
    FROM_0_BELOW_1,
    FROM_0_TO_1,
    NOT_NEGATIVE,
    within,
)
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.ema_teacher import ema_copy, ema_update_
from ssl_pretrain.parts.inverse_block_masks import centres, inverse_block_masking
from ssl_pretrain.parts.masks import put, rows
from ssl_pretrain.parts.patches import without
from ssl_pretrain.parts.self_distillation import warmed_up
from ssl_pretrain.parts.views import by_image, encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step

NOISE = 0.01  # standard deviation of the noise that the decoder gets at masked patches
PICTURED = 4  # masks of an image that pictures show


class ConvBlock(nn.Module):
    """x + GELU(LayerNorm(conv(x))), the norm over channels and without gain or shift (section 3.2)."""

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, h, w) to the same shape."""
        y = self.conv(x).movedim(1, -1)
        y = F.gelu(F.layer_norm(y, y.shape[-1:]))
        return x + y.movedim(-1, 1)


@final
class Data2Vec2(Method):
    """Regress the teacher's features of masked patches, and their mean from the class token.

    Defaults are the paper's for ViT-B on images (section 4 and appendix A). Raises UserError for options out of range,
    UnsupportedByBackbone for an encoder that cannot drop tokens or give the outputs of its blocks.
    """

    recipe = Recipe(
        lr=1e-3,
        lr_batch=256,
        lr_scaling="none",
        betas=(0.9, 0.95),
        weight_decay=0.05,
        clip_grad=4.0,
        warmup=50 / 375,
        encoder={"positions": "sincos"},
        small={"lr": 1e-3, "masks": 4, "decoder_depth": 2, "momentum": 0.98, "momentum_end": 0.998, "steps": 100},
        tiny={"masks": 2, "decoder_depth": 2},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """data2vec 2.0."""

        masks: int = 16
        """Number of masked copies of an image for one pass of the teacher."""
        mask_ratio: float = 0.8
        """Masking ratio: share of the patches that are removed before the encoder."""
        mask_block: int = 3
        """Side, in patches, of the blocks that are kept."""
        top_blocks: int = 10
        """Number of last teacher blocks whose outputs are averaged; all blocks if the encoder has fewer."""
        decoder_depth: int | None = None
        """Number of convolutions of the decoder (default: by the encoder; 6 from ViT-B on)."""
        decoder_kernel: int = 3
        """Kernel size of the decoder's convolutions; odd."""
        decoder_groups: int = 16
        """Channel groups of the decoder's convolutions; must divide the encoder's width."""
        cls_loss: float = 0.01
        """Weight of the class token's loss."""
        momentum: float = 0.9998
        """Teacher's momentum at the start."""
        momentum_end: float = 0.99999
        """Teacher's momentum after its linear rise."""
        momentum_warmup: float = 100 / 375
        """Share of the run in which the momentum rises."""
        crop_scale: tuple[float, float] = (0.2, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, AT_LEAST_1, "masks", "mask_block", "top_blocks")
            within(self, AT_LEAST_1, "decoder_depth", "decoder_kernel", "decoder_groups")
            within(self, BETWEEN_0_AND_1, "mask_ratio")
            within(self, FROM_0_BELOW_1, "momentum", "momentum_end")
            within(self, FROM_0_TO_1, "momentum_warmup")
            within(self, NOT_NEGATIVE, "cls_loss")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("data2vec2", "keep", "blocks")
        height, width = (size // side for size, side in zip(encoder.image_size, encoder.stride, strict=True))
        if self.kept(height * width) < 1:
            raise UserError(
                f"--mask-ratio {config.mask_ratio} leaves none of the {height} x {width} patches: lower it, or raise "
                f"--image-size"
            )
        if config.decoder_kernel % 2 == 0:
            raise UserError(f"--decoder-kernel {config.decoder_kernel} must be odd, so that every patch has a centre")
        if encoder.dim % config.decoder_groups:
            near = math.gcd(encoder.dim, config.decoder_groups)
            raise UserError(
                f"--decoder-groups {config.decoder_groups} must divide the encoder's width {encoder.dim}; {near} does"
            )
        if config.cls_loss and not getattr(encoder.config, "cls", False):
            raise UserError("--cls-loss needs an encoder with a class token: add --cls, or take --cls-loss 0")
        self.decoder = nn.Sequential(
            *(
                ConvBlock(encoder.dim, config.decoder_kernel, config.decoder_groups)
                for _ in range(self.config.decoder_depth)
            )
        )
        self.decoder_proj = nn.Linear(encoder.dim, encoder.dim)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """The teacher begins as the encoder."""
        self.teacher = ema_copy(self.encoder)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {"decoder_depth": sizes.depth(6, encoder.depth)}

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped; no colour (as MAE's)."""
        return (ViewSpec(name="image", size=image_size, scale=config.crop_scale),)

    def kept(self, patches: int) -> int:
        """How many of `patches` patches the encoder sees."""
        return int(patches * (1 - self.config.mask_ratio))

    def forward(self, batch: Batch, step: Step) -> Losses:
        """Loss over batch.views["image"] (B, C, H, W): squared distances / sqrt(D), the mean over masked patches and
        masks, plus `cls_loss` times that of the class tokens. `per_sample` (B,) is the loss of each image."""
        images = batch.views["image"]
        wanted = self.targets(images, step)
        predicted, masked, cls = self.predict(images, step)
        target = rows(wanted, by_image(masked, self.config.masks).flatten(1))  # (B, V * M, D)
        found = by_image(predicted, self.config.masks).flatten(1, 2).float()
        scale = math.sqrt(wanted.shape[-1])
        per_sample = (found - target).square().sum(-1).mean(1) / scale
        terms = {"patches": per_sample.detach().mean()}
        if self.config.cls_loss:
            assert cls is not None
            mean = wanted.mean(1, keepdim=True)  # (B, 1, D)
            whole = (by_image(cls, self.config.masks).float() - mean).square().sum(-1).mean(1) / scale
            per_sample = per_sample + self.config.cls_loss * whole
            terms["class"] = whole.detach().mean()
        return Losses(total=per_sample.mean(), terms=terms, per_sample=per_sample.detach())

    def predict(self, images: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor | None]:
        """Predictions (V * B, M, D) for the masked patches, mask by mask, their indices (V * B, M), and the class tokens
        (V * B, D)."""
        count = self.config.masks
        grid = self._grid(images)
        n = grid[0] * grid[1]
        keep, masked = self.masks(grid, step)
        seen = encode(self.encoder, images.expand(count, *images.shape), step, keep=keep)
        # The copies of an image share the noise. One draw for each copy of the global batch would need too much memory.
        filling = NOISE * step.randn(n, self.encoder.dim).to(seen.patches.dtype)
        x = put(filling.repeat(count, 1, 1), keep, seen.patches)
        x = self.decoder(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return self.decoder_proj(rows(x, masked)), masked, seen.cls

    def masks(self, grid: tuple[int, int], step: Step) -> tuple[Tensor, Tensor]:
        """Indices of the kept (V * B, K) and of the masked patches (V * B, M), mask by mask."""
        count, block, n = self.config.masks, self.config.mask_block, grid[0] * grid[1]
        places = centres(n, 1 - self.config.mask_ratio, block)
        centre_noise = step.rand(count, places).transpose(0, 1).flatten(0, 1)
        noise = step.rand(count, n).transpose(0, 1).flatten(0, 1)
        return inverse_block_masking(centre_noise, noise, grid, self.kept(n), block)

    @torch.no_grad()
    def targets(self, images: Tensor, step: Step) -> Tensor:
        """The teacher's features (B, N, D) of the whole image, float32: the outputs of its last blocks, each normalised
        over the patches in every channel, averaged, and normalised over the channels (section 3.1)."""
        last = tuple(range(-min(self.config.top_blocks, self.encoder.depth), 0))
        features = encode(self.teacher, images, step, blocks=last)
        total = torch.zeros_like(features.patches, dtype=torch.float32)
        for output in features.blocks:
            tokens = output[:, -total.shape[1] :].float()
            total += F.instance_norm(tokens.transpose(1, 2)).transpose(1, 2)
        return F.layer_norm(total / len(last), total.shape[-1:])

    def after_step(self, step: Step) -> None:
        """The teacher follows the encoder."""
        start, end = self.config.momentum, self.config.momentum_end
        ema_update_(
            self.teacher, self.encoder, warmed_up(start, end, self.config.momentum_warmup, step.progress), step.ok
        )

    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The input, and what the encoder sees of it with each of the first masks, (n, C, H, W)."""
        images = batch.views["image"]
        _, masked = self.masks(self._grid(images), step)
        shown = {"input": images}
        for i, index in enumerate(masked.unflatten(0, (self.config.masks, -1))[:PICTURED]):
            hidden = torch.zeros(len(index), self._grid(images)[0] * self._grid(images)[1], dtype=torch.bool)
            hidden = hidden.to(index.device).scatter(1, index, True)
            shown[f"mask {i + 1}"] = without(images, hidden, self.encoder.stride)
        return shown

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """The grid (h, w) of images (B, C, H, W)."""
        return images.shape[-2] // self.encoder.stride[0], images.shape[-1] // self.encoder.stride[1]

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The loss of predicting zero, the mean of a normalised target."""
        return {"patches": (math.sqrt(self.encoder.dim), "the decoder predicts the mean of all patches for each")}
