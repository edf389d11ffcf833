"""ConvNeXt (Liu et al., "A ConvNet for the 2020s", CVPR 2022): a convolutional network with a transformer's proportions,
layer norms and GELUs, and without batch norm. ConvNeXt V2 (Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with
Masked Autoencoders", CVPR 2023) has a global response norm in each MLP, and no layer scale.

Shapes: B images, C channels, H x W pixels, c channels of a map of Y x X positions, (h, w) the last map, N = h * w
positions in raster order, D width of the last map. Maps between layers are (B, Y, X, c), so norms and linear layers act
on the last axis; convolutions get them as (B, c, Y, X) in channels-last layout, without a copy. Parameters have timm's
names, except that the final norm, timm's `head.norm`, is `norm`, and there is no `head.fc`.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..flags import FROM_0_BELOW_1, POSITIVE, within
from .backbone import Backbone, Features
from .drop_path import drop_factors, given
from .masked_convolution import Visible
from .vit import NORM_EPS, Mlp

SIZES = {
    "convnext_micro": {"dims": (32, 64, 128, 256), "depths": (1, 1, 2, 1), "stem_patch": 2},
    "convnext_tiny": {"dims": (96, 192, 384, 768), "depths": (3, 3, 9, 3)},
    "convnext_small": {"dims": (96, 192, 384, 768), "depths": (3, 3, 27, 3)},
    "convnext_base": {"dims": (128, 256, 512, 1024), "depths": (3, 3, 27, 3)},
    "convnext_large": {"dims": (192, 384, 768, 1536), "depths": (3, 3, 27, 3)},
    "convnextv2_micro": {
        "dims": (24, 48, 96, 192), "depths": (1, 1, 3, 1), "stem_patch": 2, "grn": True, "layer_scale": None,
    },
    "convnextv2_atto": {"dims": (40, 80, 160, 320), "depths": (2, 2, 6, 2), "grn": True, "layer_scale": None},
    "convnextv2_femto": {"dims": (48, 96, 192, 384), "depths": (2, 2, 6, 2), "grn": True, "layer_scale": None},
    "convnextv2_pico": {"dims": (64, 128, 256, 512), "depths": (2, 2, 6, 2), "grn": True, "layer_scale": None},
    "convnextv2_nano": {"dims": (80, 160, 320, 640), "depths": (2, 2, 8, 2), "grn": True, "layer_scale": None},
    "convnextv2_tiny": {"dims": (96, 192, 384, 768), "depths": (3, 3, 9, 3), "grn": True, "layer_scale": None},
    "convnextv2_base": {"dims": (128, 256, 512, 1024), "depths": (3, 3, 27, 3), "grn": True, "layer_scale": None},
    "convnextv2_large": {"dims": (192, 384, 768, 1536), "depths": (3, 3, 27, 3), "grn": True, "layer_scale": None},
    "convnextv2_huge": {"dims": (352, 704, 1408, 2816), "depths": (3, 3, 27, 3), "grn": True, "layer_scale": None},
}  # fmt: skip
GRN_EPS = 1e-6


def _convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution of a map (B, Y, X, c)."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class GlobalResponseNorm(nn.Module):
    """x + weight * x * n + bias, n the L2 norm of each channel over the image's positions, divided by the mean of these
    norms over the channels (ConvNeXt V2, algorithm 1). At first it changes nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, c) to the same shape. Positions that are 0 in all channels do not count, but get the bias."""
        norms = torch.linalg.vector_norm(x.float() if x.dtype != torch.float64 else x, dim=(1, 2), keepdim=True)
        share = (norms / (norms.mean(-1, keepdim=True) + GRN_EPS)).to(x.dtype)
        return x + torch.addcmul(self.bias.to(x.dtype), self.weight.to(x.dtype), x * share)


class ResponseMlp(nn.Module):
    """Two linear layers, with a GELU and a global response norm between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.grn = GlobalResponseNorm(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, Y, X, c) to the same shape. visible: (B, Y, X, 1) bool, the positions that the norm is over."""
        x = F.gelu(self.fc1(x))
        return self.fc2(self.grn(x if visible is None else x * visible))


class Block(nn.Module):
    """x + gamma * mlp(norm(depthwise 7x7 convolution of x)), gamma a learned factor for each channel (figure 4 of the
    paper; layer scale: Touvron et al., "Going deeper with Image Transformers", 2021) or, for layer_scale None, 1. grn: the
    block of ConvNeXt V2."""

    def __init__(self, dim: int, layer_scale: float | None, grn: bool = False) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = ResponseMlp(dim, 4 * dim) if grn else Mlp(dim, 4 * dim)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def forward(self, x: Tensor, factor: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """(B, Y, X, c) to the same shape. factor: (B,) on each sample's branch (drop path). visible: (B, Y, X, 1) bool, the
        positions that exist; all others are 0 in `x` and in the result."""
        y = self.norm(_convolve(self.conv_dw, x))
        y = self.mlp(y, visible) if isinstance(self.mlp, ResponseMlp) else self.mlp(y)
        if self.gamma is not None:
            y = y * self.gamma
        if factor is not None:
            y = y * factor[:, None, None, None]
        return x + (y if visible is None else y * visible)


class Stage(nn.Module):
    """Blocks of one width; before them, except in the first stage, a norm and a 2x2 convolution of stride 2."""

    def __init__(self, inside: int | None, dim: int, depth: int, layer_scale: float | None, grn: bool) -> None:
        super().__init__()
        self.downsample: nn.Sequential | None = None
        if inside is not None:
            self.downsample = nn.Sequential(nn.LayerNorm(inside, eps=NORM_EPS), nn.Conv2d(inside, dim, 2, stride=2))
        self.blocks = nn.ModuleList(Block(dim, layer_scale, grn) for _ in range(depth))

    def forward(self, x: Tensor, factors: Tensor | None = None, visible: Visible | None = None) -> Tensor:
        """(B, Y, X, c) to (B, Y // 2, X // 2, dim); the first stage keeps the shape. factors: (B, blocks). visible: the
        units that exist."""
        if self.downsample is not None:
            norm, conv = self.downsample
            x = _convolve(conv, norm(x)).to(x.dtype)  # see ConvNeXt.forward
        seen = None
        if visible is not None:
            seen = visible.at(x.shape[1], x.shape[2]).permute(0, 2, 3, 1)
            x = x * seen  # biases of the stem, the norm and the convolution
        for i, block in enumerate(self.blocks):
            x = block(x, None if factors is None else factors[:, i], seen)
        return x


@final
class ConvNeXt(Backbone):
    """A ConvNeXt; `depth` counts blocks. Its stride is 8 times the side of the stem's patches; pixels beyond a multiple
    of it are used only in part. Raises UserError for options out of range and images smaller than the stride."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (ConvNeXt)."""

        dims: tuple[int, int, int, int]
        """Width of each stage."""
        depths: tuple[int, int, int, int]
        """Number of blocks of each stage."""
        stem_patch: int = 4
        """Side of the stem's patches in pixels."""
        layer_scale: float | None = 1e-6
        """Initial value of the layer scale of each block; None: without layer scale."""
        grn: bool = False
        """Blocks of ConvNeXt V2: a global response norm in each MLP."""
        drop_path: float = 0.0
        """Drop path rate (stochastic depth) of the last block; it rises linearly from 0 at the first."""

        def __post_init__(self) -> None:
            within(self, POSITIVE, "dims", "depths", "stem_patch", "layer_scale")
            within(self, FROM_0_BELOW_1, "drop_path")

    supports = frozenset({"drop_path", "maps", "visible"})

    def __init__(self, image_size: tuple[int, int], in_chans: int, config: Config) -> None:
        super().__init__()
        if in_chans <= 0:
            raise UserError(f"--in-chans is {in_chans}; it must be above 0")
        height, width = image_size
        self.config, self.image_size, self.in_chans = config, (height, width), in_chans
        self.dim, self.depth = config.dims[-1], sum(config.depths)
        self.stride = (8 * config.stem_patch, 8 * config.stem_patch)
        self.map_strides = tuple((under * config.stem_patch, under * config.stem_patch) for under in (1, 2, 4, 8))
        self.map_channels = config.dims
        self._check_size(height, width)

        patch, first = config.stem_patch, config.dims[0]
        self.stem = nn.Sequential(nn.Conv2d(in_chans, first, patch, patch), nn.LayerNorm(first, eps=NORM_EPS))
        self.stages = nn.ModuleList(
            Stage(inside, dim, depth, config.layer_scale, config.grn)
            for inside, dim, depth in zip((None, *config.dims[:-1]), config.dims, config.depths, strict=True)
        )
        self.norm = nn.LayerNorm(self.dim, eps=NORM_EPS)
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                assert part.bias is not None
                nn.init.zeros_(part.bias)

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        replace: tuple[Tensor, Tensor] | None = None,
        attention: str | Tensor = "full",
        prefix_length: Tensor | None = None,
        blocks: tuple[int, ...] = (),
        drop: Tensor | None = None,
        maps: bool = False,
        visible: Tensor | None = None,
    ) -> Features:
        """See `Backbone.forward`. H and W may be any size from the stride up; the grid is H and W divided by the
        stride, rounded down. `pooled` is the norm of the mean over positions, as published; `patches` are the norms of
        the single positions, so their mean differs from `pooled`. `maps` are the outputs of the four stages, the last
        one before the norm, of sides H and W divided by their strides, rounded down. A block has one branch and uses
        the first of its two columns in `drop`.

        Raises UserError for images with another number of channels or smaller than the stride, UnsupportedByBackbone
        for keep, replace, another attention than "full", and blocks (their widths differ between stages), RuntimeError
        if the noise of drop path is missing, UserError for `visible` that does not fit the images.
        """
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        self._check_size(images.shape[2], images.shape[3])

        factors = self._drop_path(drop)
        units = None if visible is None else Visible.of(images, visible, self.unit)
        if units is not None:
            images = units.only(images)
        conv, norm = self.stem
        # The residual stream has the precision of the parameters, also under autocast.
        x = norm(_convolve(conv, images.permute(0, 2, 3, 1).contiguous()).to(self.norm.weight.dtype))
        first, outputs = 0, []
        for stage, depth in zip(self.stages, self.config.depths, strict=True):
            x = stage(x, None if factors is None else factors[:, first : first + depth], units)
            first += depth
            if maps:
                outputs.append(x.permute(0, 3, 1, 2))
        patches, grid = self.norm(x).flatten(1, 2), (x.shape[1], x.shape[2])
        if units is None:
            mean = x.mean((1, 2))
        else:
            patches = patches * units.at(*grid).flatten(1)[..., None]
            mean = x.sum((1, 2)) / units.count(*grid)
        return Features(cls=None, patches=patches, grid=grid, pooled=self.norm(mean), maps=tuple(outputs))

    def layer_of(self, parameter: str) -> int:
        """See `Backbone.layer_of`; the downsampling before a stage belongs to the stage's first block. Raises KeyError
        for an unknown parameter."""
        part, _, rest = parameter.partition(".")
        if part == "stages":
            stage, kind, block = rest.split(".")[:3]
            return sum(self.config.depths[: int(stage)]) + (int(block) if kind == "blocks" else 0) + 1
        return {"stem": 0, "norm": self.depth + 1}[part]

    def _check_size(self, height: int, width: int) -> None:
        """Raise UserError for images that are too small for the last map."""
        if height < self.stride[0] or width < self.stride[1]:
            fits = [max(side, self.stride[0]) for side in (height, width)]
            raise UserError(
                f"images of {height} x {width} pixels (height x width) are smaller than the encoder's stride, "
                f"{self.stride[0]} pixels: use --image-size {fits[0]} {fits[1]} or a smaller --stem-patch"
            )

    def _drop_path(self, drop: Tensor | None) -> Tensor | None:
        """Factors (B, depth) on each sample's branches (stochastic depth, Huang et al., 2016): 0 with the branch's
        probability, else 1 / (1 - probability); None if nothing is dropped."""
        if not self.training or self.config.drop_path == 0:
            return None
        noise = given(drop, self.depth)[:, ::2]
        return drop_factors(noise, torch.linspace(0, self.config.drop_path, self.depth, device=noise.device))
