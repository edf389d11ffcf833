"""A vision transformer with one wide global token, Jumbo (Fuller et al., "Simpler Fast Vision Transformers with a Jumbo CLS
Token", 2025): the token is J times as wide as a patch. In attention it is J tokens of the usual width. Its own MLP, which
all blocks share, sees it as one.

Shapes: B images, C channels, H x W pixels, p patch side, N patches on an (h, w) grid in raster order, K of them kept, D
width, J tokens of width D that are the global one, L = J + N or J + K tokens.
"""

from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..flags import FROM_0_BELOW_1, POSITIVE, within
from . import pyramid
from .backbone import Backbone, Features
from .drop_path import rising_factors
from .positions import patch_grid, resize_table
from .vit import Attention, Mlp, PatchEmbed

SIZES = {
    "jumbo_micro": {"dim": 128, "depth": 4, "heads": 4, "jumbo": 4},
    "jumbo_pico": {"dim": 96, "depth": 12, "heads": 3},
    "jumbo_nano": {"dim": 128, "depth": 12, "heads": 4},
    "jumbo_tiny": {"dim": 192, "depth": 12, "heads": 3},
    "jumbo_small": {"dim": 384, "depth": 12, "heads": 6},
    "jumbo_base": {"dim": 768, "depth": 12, "heads": 12, "jumbo": 3},
}
EPS = 1e-5  # of every layer norm, as released


class JumboBlock(nn.Module):
    """Attention of all tokens, an MLP of each patch, and the shared MLP of the global token (section 3)."""

    def __init__(self, dim: int, heads: int, jumbo: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, qkv_bias=True, qk_norm=False)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.norm3 = nn.LayerNorm(jumbo * dim, eps=EPS)

    def forward(self, x: Tensor, jumbo: int, shared: nn.Module, branches: Tensor | None = None) -> Tensor:
        """Tokens (B, L, D) to (B, L, D). shared: the MLP of the global token. branches: (B, 1, 2) factors on attention and
        on both MLPs of each sample (drop path)."""
        y = self.attn(self.norm1(x), None, False, None)
        x = x + (y if branches is None else y * branches[..., :1])
        wide, patches = x[:, :jumbo].flatten(1), x[:, jumbo:]
        of_wide, of_patches = shared(self.norm3(wide)), self.mlp(self.norm2(patches))
        if branches is not None:
            of_wide, of_patches = of_wide * branches[:, 0, 1:], of_patches * branches[..., 1:]
        return torch.cat([(wide + of_wide).unflatten(1, (jumbo, -1)), patches + of_patches], dim=1)


@final
class Jumbo(Backbone):
    """A ViT with a Jumbo token. The J parts of the token are the prefix of `Features`; `pooled` has J * D, (J + 1) * D
    or D channels. Raises UserError for options and image sizes that do not fit together."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (ViT with a Jumbo token)."""

        dim: int
        """Width: number of channels of every patch."""
        depth: int
        """Number of blocks."""
        heads: int
        """Number of attention heads; they share the width."""
        jumbo: int = 6
        """Width of the global token, as a multiple of a patch's."""
        patch_size: int = 16
        """Side of a patch in pixels; it must divide the image's sides."""
        mlp_ratio: float = 4.0
        """Hidden width of the MLPs, as a multiple of their token's width."""
        pool: Literal["cls", "all", "mean"] = "all"
        """Vector of the whole image: the global token (cls), the global token and the mean of the patches, or that mean."""
        drop_path: float = 0.0
        """Drop path rate (stochastic depth) of the last block; it rises linearly from 0 at the first."""

        def __post_init__(self) -> None:
            within(self, POSITIVE, "dim", "depth", "heads", "jumbo", "patch_size", "mlp_ratio")
            within(self, FROM_0_BELOW_1, "drop_path")

    supports = frozenset({"keep", "replace", "blocks", "drop_path", "maps"})

    def __init__(self, image_size: tuple[int, int], in_chans: int, config: Config) -> None:
        super().__init__()
        if in_chans <= 0:
            raise UserError(f"--in-chans is {in_chans}; it must be above 0")
        if config.dim % config.heads:
            raise UserError(f"--heads {config.heads} must divide --dim {config.dim}")
        height, width = image_size
        self.config, self.image_size, self.in_chans = config, (height, width), in_chans
        self.dim, self.depth = config.dim, config.depth
        self.stride = (config.patch_size, config.patch_size)
        self.map_strides, self.map_channels = pyramid.strides(self.stride), (self.dim,) * len(pyramid.SCALES)
        self.grid = self._grid(height, width)
        self.patch_embed = PatchEmbed(config.patch_size, in_chans, config.dim)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], config.dim))
        self.jumbo_token = nn.Parameter(torch.empty(1, config.jumbo, config.dim))
        wide = config.jumbo * config.dim
        self.jumbo_mlp = Mlp(wide, int(wide * config.mlp_ratio))
        self.blocks = nn.ModuleList(
            JumboBlock(config.dim, config.heads, config.jumbo, config.mlp_ratio) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, eps=EPS)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        for table in (self.pos_embed, self.jumbo_token):
            nn.init.trunc_normal_(table, std=0.02)

    @property
    def pooled_dim(self) -> int:
        """See `Backbone.pooled_dim`."""
        return self.dim * {"cls": self.config.jumbo, "all": self.config.jumbo + 1, "mean": 1}[self.config.pool]

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
        """See `Backbone.forward`. There is no `cls` of width D. Raises UserError for images with another number of channels
        or a size that the patch does not divide, for a block that does not exist and for maps with keep,
        UnsupportedByBackbone for another attention than "full", RuntimeError if the noise of drop path is missing."""
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        if maps and keep is not None:
            raise UserError("maps are of whole images: leave out keep or maps")
        grid, jumbo = self._grid(images.shape[2], images.shape[3]), self.config.jumbo
        x = self.patch_embed(images, keep)
        if replace is not None:
            masked, token = replace
            masked = masked if keep is None else masked.gather(1, keep)
            x = torch.where(masked[:, :, None], token.to(x.dtype), x)
        table = resize_table(self.pos_embed, self.grid, grid)
        # The residual stream has the precision of the parameters, also under autocast.
        x = x.to(self.pos_embed.dtype) + (table if keep is None else F.embedding(keep, table[0]))
        x = torch.cat([self.jumbo_token.expand(x.shape[0], -1, -1), x], dim=1)
        factors = rising_factors(drop, self.depth, self.config.drop_path, training=self.training)
        wanted = [self._block(i) for i in blocks]
        outputs: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            x = block(x, jumbo, self.jumbo_mlp, None if factors is None else factors[:, None, 2 * i : 2 * i + 2])
            if i in wanted:
                outputs[i] = x
        x = self.norm(x)
        prefix, patches = x[:, :jumbo], x[:, jumbo:]
        parts = {"cls": (prefix.flatten(1),), "all": (prefix.flatten(1), patches.mean(1)), "mean": (patches.mean(1),)}
        return Features(
            cls=None,
            patches=patches,
            grid=grid,
            pooled=torch.cat(parts[self.config.pool], dim=1),
            prefix=prefix,
            blocks=tuple(outputs[i] for i in wanted),
            tokens=x,
            maps=pyramid.simple_pyramid(patches.mT.unflatten(2, grid)) if maps else (),
        )

    def layer_of(self, parameter: str) -> int:
        """See `Backbone.layer_of`; the shared MLP belongs to the first block, where it is used first. Raises KeyError for
        an unknown parameter."""
        part, _, rest = parameter.partition(".")
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1
        stem = dict.fromkeys(("patch_embed", "pos_embed", "jumbo_token"), 0)
        return {**stem, "jumbo_mlp": 1, "norm": self.depth + 1}[part]

    def adapt(self, weights: dict[str, Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """See `Backbone.adapt`: positions are resized to this encoder's grid, with antialiasing where it is smaller."""
        if image_size == self.image_size or "pos_embed" not in weights:
            return weights
        table = resize_table(weights["pos_embed"], self._grid(*image_size), self.grid, antialias=True)
        return weights | {"pos_embed": table}

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """The grid (h, w) of patches of an image of height x width pixels."""
        return patch_grid(height, width, self.config.patch_size)
