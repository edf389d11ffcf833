"""SimMIM (Xie et al., "SimMIM: a Simple Framework for Masked Image Modeling", CVPR 2022).

Large squares of an image are masked. The encoder sees the whole grid, with a mask token in the masked places, and one
linear layer reconstructs their pixels. Shapes: B images, N of the global batch, P patches on an (h, w) grid, p patch
side, D encoder width, F = p * p * C values a patch, U mask units of the encoder (on a ViT a unit is a patch).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, NOT_NEGATIVE, within
from ssl_pretrain.parts.patches import local_moments, patchify, unpatchify
from ssl_pretrain.parts.units import mask_of_patches, patches_a_unit, unit_grid
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step

UNITS = 6  # smallest number of mask units along the image's shorter side: the paper's 192 pixels hold six of 32


@final
class SimMIM(Method):
    """Reconstruct the pixels of masked squares; the mean absolute error over masked pixels is the loss (section 3.4).

    Defaults are the paper's (sections 3.2 and 4.1). Raises UserError for options out of range and UnsupportedByBackbone
    for an encoder that cannot put a token in place of patches.
    """

    recipe = Recipe(
        lr=1e-4,
        lr_batch=512,
        betas=(0.9, 0.999),
        weight_decay=0.05,
        clip_grad=5.0,
        warmup=10 / 100,
        small={"lr": 2e-3, "steps": 150},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """SimMIM."""

        mask_unit: int = 32
        """Side in pixels of the squares that are masked as a whole. At most a sixth of the image's shorter side is
        used, rounded to the nearest multiple of the patch (of the encoder's mask unit, where that is larger)."""
        mask_ratio: float = 0.6
        """Masking ratio: share of the squares that are masked; their number is rounded up."""
        crop_scale: tuple[float, float] = (0.67, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        interpolation: Literal["bicubic", "bilinear"] = "bicubic"
        """How crops are resized."""

        norm_target: int = 0
        """Side in pixels of the square around each pixel whose mean and deviation normalise that pixel of the target
        (Swin V2: 47; odd); 0: the target is not normalised."""

        def __post_init__(self) -> None:
            within(self, NOT_NEGATIVE, "norm_target")
            if self.norm_target and (self.norm_target % 2 == 0 or self.norm_target < 3):
                raise UserError(
                    f"--norm-target is {self.norm_target}; it must be 0, or an odd number from 3 on: Swin V2 has 47"
                )
            within(self, AT_LEAST_1, "mask_unit")
            within(self, ABOVE_0_TO_1, "mask_ratio")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("simmim", "replace", units=True)
        self.mask_token = nn.Parameter(torch.empty(encoder.token_dim))
        self.head = nn.Linear(encoder.dim, encoder.stride[0] * encoder.stride[1] * encoder.in_chans)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped; no colour (section 4.1)."""
        return (ViewSpec(name="image", size=image_size, scale=config.crop_scale, interpolation=config.interpolation),)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """Loss over batch.views["image"] (B, C, H, W): the mean over all masked pixels of the global batch. The mean of
        `per_sample` (B,) is the loss."""
        images = batch.views["image"]
        units, counted = self.mask(images, step)
        masked = self.masked_patches(images, units)
        painted = self.paint(images, units, step)
        target = images.float()
        if self.config.norm_target:
            mean, deviation = local_moments(images, self.config.norm_target)
            target = (target - mean) / deviation
        errors = (painted.float() - patchify(target, self.encoder.stride)).abs().mean(-1)  # (B, P)
        per_sample = (errors * masked).sum(1) / counted
        return Losses(total=per_sample.mean(), per_sample=per_sample.detach())

    def mask(self, images: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The mask of the encoder's units, bool (B, U), True where masked; and the mean number of masked patches of an
        image over the global batch, ().

        If the squares do not divide the grid, those at the right and the bottom are cut off by its edge. Then images
        differ in their number of masked patches.
        """
        height, width = images.shape[-2:]
        grid = unit_grid(self.encoder, (height, width))
        pixels = min(self.config.mask_unit, min(height, width) / UNITS)
        unit = [max(1, math.floor(pixels / side + 0.5)) for side in self.encoder.unit]  # the encoder's units
        squares = [math.ceil(side / taken) for side, taken in zip(grid, unit, strict=True)]
        count = math.ceil(squares[0] * squares[1] * self.config.mask_ratio)
        noise = step.shared_rand(step.batch_size, squares[0] * squares[1])
        chosen = torch.zeros_like(noise, dtype=torch.bool).scatter(1, noise.argsort(1)[:, :count], True)
        chosen = chosen.unflatten(1, squares).repeat_interleave(unit[0], 1).repeat_interleave(unit[1], 2)
        units = chosen[:, : grid[0], : grid[1]].flatten(1)  # (N, U)
        counted = units.sum(1).float().mean()
        if (patches := math.prod(patches_a_unit(self.encoder))) > 1:
            counted = counted * patches
        return units[step.rows], counted

    def masked_patches(self, images: Tensor, units: Tensor) -> Tensor:
        """The mask of patches (B, P) that a mask of the encoder's units (B, U) is."""
        return mask_of_patches(units, self.encoder, unit_grid(self.encoder, (images.shape[-2], images.shape[-1])))

    def paint(self, images: Tensor, units: Tensor, step: Step) -> Tensor:
        """All patches (B, P, F) as reconstructed from the images without the units (B, U)."""
        return self.head(encode(self.encoder, images, step, replace=(units, self.mask_token)).patches)

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Input, masked input and reconstruction (n, C, H, W); masked patches repainted."""
        images = batch.views["image"]
        units, _ = self.mask(images, step)
        masked = self.masked_patches(images, units)
        painted = self.paint(images, units, step).float()
        if self.config.norm_target:
            mean, deviation = (patchify(x, self.encoder.stride) for x in local_moments(images, self.config.norm_target))
            painted = painted * deviation + mean
        patches = patchify(images, self.encoder.stride).float()
        grid = tuple(size // side for size, side in zip(images.shape[-2:], self.encoder.stride, strict=True))
        hidden = patches.masked_fill(masked[:, :, None], 0.0)
        painted = torch.where(masked[:, :, None], painted, patches)
        return {
            "input": images,
            "masked": unpatchify(hidden, self.encoder.stride, (grid[0], grid[1])),
            "reconstruction": unpatchify(painted, self.encoder.stride, (grid[0], grid[1])),
        }
