"""Hiera (Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles", ICML 2023): a vision
transformer of several resolutions, without windows that shift and without relative positions, made for masked training.

An image is a grid of mask units. A unit begins with t x t tokens, and each pooling of queries halves its sides. What is
dropped or replaced is a whole unit, so the first stages can attend within units and lose nothing.

Shapes: B images, C channels, H x W pixels, U mask units on an (h, w) grid in raster order, K of them kept (U without
`keep`), T tokens of a unit, c channels of a stage, D width of the last stage, E width of the patch embeddings, d channels
of an attention head. Tokens are (B, K, T, c). Within a unit they are ordered such that those that are pooled together lie
T / 4 apart: the first of (2, 2, ..., 2, 2) axes are the last bits of the row and of the column. Parameters have timm's
names, except that the final norm, timm's `head.norm`, is `norm`.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..flags import AT_LEAST_1, FROM_0_BELOW_1, NOT_NEGATIVE, within
from .attention import attend
from .backbone import Backbone, Features
from .drop_path import rising_factors
from .positions import resize_table
from .vit import NORM_EPS, Mlp

SIZES = {
    "hiera_micro": {
        "embed_dim": 32, "heads": 1, "depths": (1, 2, 2), "q_pool": 2, "patch_stride": 2, "unit_tokens": 4,
        "local_stages": 1,
    },
    "hiera_tiny": {"embed_dim": 96, "heads": 1, "depths": (1, 2, 7, 2)},
    "hiera_small": {"embed_dim": 96, "heads": 1, "depths": (1, 2, 11, 2)},
    "hiera_base": {"embed_dim": 96, "heads": 1, "depths": (2, 3, 16, 3)},
    "hiera_base_plus": {"embed_dim": 112, "heads": 2, "depths": (2, 3, 16, 3)},
    "hiera_large": {"embed_dim": 144, "heads": 2, "depths": (2, 6, 36, 4)},
    "hiera_huge": {"embed_dim": 256, "heads": 4, "depths": (2, 6, 36, 4)},
}  # fmt: skip
BIAS = 0.02  # with which every bias begins, as released


def _pooled(x: Tensor) -> Tensor:
    """The maximum of 2 x 2 tokens of a unit: (B, K, T, ...) to (B, K, T / 4, ...)."""
    return x.unflatten(2, (4, -1)).max(2).values


class Stem(nn.Module):
    """A convolution of overlapping squares: a token sees `stride` - 1 pixels more above and to the left of its own."""

    def __init__(self, in_chans: int, dim: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 2 * stride - 1, stride, padding=stride - 1)

    def forward(self, images: Tensor, unit: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) to (B, Y, X, E), or to (B * K, t, t, E) of the units `keep` (B, K) of `unit` pixels, one
        after another. Only these are computed."""
        if keep is None:
            return self.proj(images).permute(0, 2, 3, 1)
        (down, right), more = unit, self.proj.stride[0] - 1
        # Each unit with the pixels above and to the left of it that its first tokens see.
        parts = F.pad(images, (more, 0, more, 0)).unfold(2, down + more, down).unfold(3, right + more, right)
        parts = parts.permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)  # (B, U, C * pixels)
        parts = torch.gather(parts, 1, keep[:, :, None].expand(-1, -1, parts.shape[2])).flatten(0, 1)
        parts = parts.unflatten(1, (images.shape[1], down + more, right + more))
        return F.conv2d(parts, self.proj.weight, self.proj.bias, self.proj.stride).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head self-attention of tokens (B, K, T, c), within each unit or among all; the queries may be pooled."""

    def __init__(self, inside: int, dim: int, heads: int, *, pool: bool, local: bool) -> None:
        super().__init__()
        self.heads, self.pool, self.local = heads, pool, local
        self.qkv = nn.Linear(inside, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, K, T, inside) to (B, K, T, dim), or (B, K, T / 4, dim) with pooled queries."""
        q, k, v = self.qkv(x).unflatten(3, (3, self.heads, -1)).unbind(3)  # (B, K, T, heads, d)
        if self.pool:
            q = _pooled(q)
        shape = (q.shape[0], q.shape[1], q.shape[2], -1)
        # One row of tokens for each unit, or for each image.
        q, k, v = (each.flatten(0, 1) if self.local else each.flatten(1, 2) for each in (q, k, v))
        x = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(x.transpose(1, 2).reshape(shape))


class Block(nn.Module):
    """A pre-norm transformer block. If it changes the width, the shortcut is a linear layer of the normalised tokens; if
    it pools, their maximum over 2 x 2 tokens (section 3 of the paper)."""

    def __init__(self, inside: int, dim: int, heads: int, *, pool: bool, local: bool) -> None:
        super().__init__()
        self.pool = pool
        self.norm1 = nn.LayerNorm(inside, eps=NORM_EPS)
        self.proj = nn.Linear(inside, dim) if inside != dim else None
        self.attn = Attention(inside, dim, heads, pool=pool, local=local)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, branches: Tensor | None = None) -> Tensor:
        """Tokens (B, K, T, c) to (B, K, T, dim), or (B, K, T / 4, dim). branches: (B, 1, 1, 2) factors on the two branches
        of each sample (drop path)."""
        seen = self.norm1(x)
        if self.proj is not None:
            x = self.proj(seen).to(x.dtype)  # see Hiera.forward
            x = _pooled(x) if self.pool else x
        y = self.attn(seen)
        x = x + (y if branches is None else y * branches[..., :1])
        y = self.mlp(self.norm2(x))
        return x + (y if branches is None else y * branches[..., 1:])


@final
class Hiera(Backbone):
    """A Hiera for images of any size that is a multiple of the mask unit: positions are resized if the grid is not the
    configured one; `depth` counts blocks. Raises UserError for options and image sizes that do not fit together."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (Hiera)."""

        embed_dim: int
        """Width of the first stage; each later stage is twice as wide."""
        heads: int
        """Number of attention heads of the first stage; it doubles with the width."""
        depths: tuple[int, ...]
        """Number of blocks of each stage."""
        q_pool: int = 3
        """Number of stages that begin with pooled queries, from the second on. Each halves the sides of the map, and the
        weights are the same for every number. The stride is 32 with 3; MAE's is 2, for a stride of 16."""
        patch_stride: int = 4
        """Pixels between the centres of the first stage's tokens. Each token sees a square of twice as many pixels less
        one."""
        unit_tokens: int = 8
        """Side of a mask unit in tokens of the first stage, a power of 2."""
        local_stages: int = 2
        """Number of stages, from the first on, whose blocks attend within mask units. The first block of the next stage
        does, too."""
        drop_path: float = 0.0
        """Drop path rate (stochastic depth) of the last block; it rises linearly from 0 at the first."""

        def __post_init__(self) -> None:
            within(self, AT_LEAST_1, "embed_dim", "heads", "depths", "patch_stride", "unit_tokens")
            within(self, NOT_NEGATIVE, "q_pool", "local_stages")
            within(self, FROM_0_BELOW_1, "drop_path")

    supports = frozenset({"keep", "replace", "drop_path", "maps"})

    def __init__(self, image_size: tuple[int, int], in_chans: int, config: Config) -> None:
        super().__init__()
        _validate(config, in_chans)
        height, width = image_size
        self.config, self.image_size, self.in_chans = config, (height, width), in_chans
        stages, first = len(config.depths), config.patch_stride
        self.dim, self.depth = config.embed_dim << (stages - 1), sum(config.depths)
        under = [1 << min(i, config.q_pool) for i in range(stages)]  # how many times coarser each map is
        self.map_strides = tuple((first * each, first * each) for each in under)
        self.map_channels = tuple(config.embed_dim << i for i in range(stages))
        self.stride = (first * under[-1], first * under[-1])
        self.units = self._units(height, width)

        self.patch_embed = Stem(in_chans, config.embed_dim, first)
        self.pos_embed = nn.Parameter(torch.empty(1, (height // first) * (width // first), config.embed_dim))
        self.blocks = nn.ModuleList()
        self.ends: list[int] = []  # index of the last block of each stage
        inside = config.embed_dim
        for stage, depth in enumerate(config.depths):
            dim, heads = config.embed_dim << stage, config.heads << stage
            for i in range(depth):
                pool = i == 0 < stage <= config.q_pool
                # A stage's first block attends as the stage before it.
                local = (stage if i or not stage else stage - 1) < config.local_stages
                self.blocks.append(Block(inside, dim, heads, pool=pool, local=local))
                inside = dim
            self.ends.append(len(self.blocks) - 1)
        self.norm = nn.LayerNorm(self.dim, eps=NORM_EPS)

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear | nn.Conv2d | nn.LayerNorm):
                assert part.bias is not None
                nn.init.constant_(part.bias, BIAS)

    @property
    def unit(self) -> tuple[int, int]:
        """See `Backbone.unit`."""
        side = self.config.patch_stride * self.config.unit_tokens
        return side, side

    @property
    def token_dim(self) -> int:
        """See `Backbone.token_dim`."""
        return self.config.embed_dim

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
    ) -> Features:
        """See `Backbone.forward`. `pooled` is the norm of the mean over positions, as published; `patches` are the norms of
        the single positions, so their mean differs from `pooled`. `maps` are the outputs of the stages, the last one
        before the norm; with `keep`, the kept units below each other. Pixels of units that are left out or replaced are
        0 for the stem, whose squares overlap.

        Raises UserError for images with another number of channels and for a size that the mask unit does not divide,
        UnsupportedByBackbone for another attention than "full", and blocks (their widths differ between stages),
        RuntimeError if the noise of drop path is missing.
        """
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        units = self._units(images.shape[2], images.shape[3])
        factors = rising_factors(drop, self.depth, self.config.drop_path, training=self.training)
        x = self._embedded(images, units, keep, replace)
        placed = units if keep is None else (keep.shape[1], 1)  # the kept units below each other
        outputs = []
        for i, block in enumerate(self.blocks):
            x = block(x, None if factors is None else factors[:, None, None, 2 * i : 2 * i + 2])
            if maps and i in self.ends:
                outputs.append(_raster(x, placed).permute(0, 3, 1, 2))
        return Features(
            cls=None,
            patches=_raster(self.norm(x), placed).flatten(1, 2),
            grid=(images.shape[2] // self.stride[0], images.shape[3] // self.stride[1]),
            pooled=self.norm(x.mean((1, 2))),
            maps=tuple(outputs),
        )

    def layer_of(self, parameter: str) -> int:
        """See `Backbone.layer_of`. Raises KeyError for an unknown parameter."""
        part, _, rest = parameter.partition(".")
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1
        return {"patch_embed": 0, "pos_embed": 0, "norm": self.depth + 1}[part]

    def adapt(self, weights: dict[str, Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """See `Backbone.adapt`: positions are resized to this encoder's grid, with antialiasing where it is smaller."""
        if image_size == self.image_size or "pos_embed" not in weights:
            return weights
        of, to = self._tokens(self._units(*image_size)), self._tokens(self.units)
        return weights | {"pos_embed": resize_table(weights["pos_embed"], of, to, antialias=True)}

    def _units(self, height: int, width: int) -> tuple[int, int]:
        """The grid (h, w) of mask units of an image of height x width pixels."""
        down, right = self.unit
        if height % down or width % right or height < down or width < right:
            fits = [max(unit, round(side / unit) * unit) for side, unit in ((height, down), (width, right))]
            raise UserError(
                f"images of {height} x {width} pixels (height x width) do not divide into mask units of {down} x {right} "
                f"pixels: use --image-size {fits[0]} {fits[1]}"
            )
        return height // down, width // right

    def _tokens(self, units: tuple[int, int]) -> tuple[int, int]:
        """The grid of the first stage's tokens."""
        return units[0] * self.config.unit_tokens, units[1] * self.config.unit_tokens

    def _embedded(
        self, images: Tensor, units: tuple[int, int], keep: Tensor | None, replace: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The tokens (B, K, T, E) that enter the first block."""
        unit = self.config.unit_tokens
        masked = None if replace is None else replace[0]
        hidden = masked
        if keep is not None:
            left_out = torch.ones(keep.shape[0], units[0] * units[1], dtype=torch.bool, device=keep.device)
            left_out = left_out.scatter(1, keep, False)
            hidden = left_out if masked is None else masked | left_out
        if hidden is not None:
            pixels = hidden.unflatten(1, units).repeat_interleave(self.unit[0], 1).repeat_interleave(self.unit[1], 2)
            images = images.masked_fill(pixels[:, None], 0.0)
        x = _by_units(self.patch_embed(images, self.unit, keep), unit)
        if keep is not None:
            x = x.view(keep.shape[0], keep.shape[1], unit * unit, -1)
        # The residual stream has the precision of the parameters, also under autocast.
        x = x.to(self.norm.weight.dtype)
        if replace is not None and masked is not None:
            here = masked if keep is None else masked.gather(1, keep)
            x = torch.where(here[:, :, None, None], replace[1].to(x.dtype), x)
        grid = self._tokens(units)
        table = _by_units(resize_table(self.pos_embed, self._tokens(self.units), grid).unflatten(1, grid), unit)
        if keep is not None:
            table = F.embedding(keep, table[0].flatten(1)).view_as(x)
        return x + table


def _by_units(x: Tensor, unit: int) -> Tensor:
    """A map (B, h * t, w * t, c) of tokens in raster order as (B, h * w, t * t, c), in the order of the module's head."""
    halvings = unit.bit_length() - 1
    b, height, width, channels = x.shape
    x = x.reshape(b, height // unit, *(2,) * halvings, width // unit, *(2,) * halvings, channels)
    rows, columns = range(2, 2 + halvings), range(3 + halvings, 3 + 2 * halvings)
    pairs = [axis for pair in zip(reversed(rows), reversed(columns), strict=True) for axis in pair]
    x = x.permute(0, 1, 2 + halvings, *pairs, 3 + 2 * halvings)
    return x.reshape(b, (height // unit) * (width // unit), unit * unit, channels)


def _raster(x: Tensor, units: tuple[int, int]) -> Tensor:
    """Tokens (B, h * w, a * a, c) of (h, w) units as a map (B, h * a, w * a, c)."""
    b, _, tokens, channels = x.shape
    halvings = (tokens.bit_length() - 1) // 2
    x = x.reshape(b, *units, *(2,) * (2 * halvings), channels)
    rows, columns = range(3, 3 + 2 * halvings, 2), range(4, 4 + 2 * halvings, 2)
    x = x.permute(0, 1, *reversed(rows), 2, *reversed(columns), 3 + 2 * halvings)
    return x.reshape(b, units[0] << halvings, units[1] << halvings, channels)


def _validate(config: Hiera.Config, in_chans: int) -> None:
    """Raise UserError for options that do not fit together."""
    if in_chans <= 0:
        raise UserError(f"--in-chans is {in_chans}; it must be above 0")
    if config.embed_dim % config.heads:
        raise UserError(f"--heads {config.heads} must divide --embed-dim {config.embed_dim}")
    if config.unit_tokens & (config.unit_tokens - 1):
        raise UserError(f"--unit-tokens {config.unit_tokens} must be a power of 2")
    most = min(len(config.depths) - 1, config.unit_tokens.bit_length() - 1)
    if config.q_pool > most:
        raise UserError(
            f"--q-pool {config.q_pool} is too much: {len(config.depths)} stages of units of {config.unit_tokens} x "
            f"{config.unit_tokens} tokens can be pooled {most} times at most"
        )
