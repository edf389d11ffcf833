"""Perceptual group tokenizer (Deng et al., "Perceptual Group Tokenizer: Building Perception with Iterative Grouping", ICLR
2024): tokens are refined only by grouping them, again and again. There is no self-attention between patches.

Shapes: B images, C channels, H x W pixels, p patch side, N patches on an (h, w) grid in raster order, K of them kept, M
groups, D width, d channels of a head, R rounds of a layer.
"""

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..flags import FROM_0_BELOW_1, POSITIVE, within
from . import pyramid
from .attention import attend
from .backbone import Backbone, Features
from .drop_path import rising_factors
from .positions import patch_grid, resize_table
from .vit import NORM_EPS, Mlp, PatchEmbed

SIZES = {
    "grouper_micro": {"dim": 128, "depth": 4, "heads": 4, "groups": 16},
    "grouper_small": {"dim": 384, "depth": 12, "heads": 6},
    "grouper_base": {"dim": 768, "depth": 12, "heads": 12},
}
MOST = 1024  # groups that an encoder can be asked for
SEED = 20240507  # of the noise of the groups, which is the same in every run
SMALL = 1e-6  # added to the sum of a group's weights


def group_noise(groups: int, dim: int) -> Tensor:
    """Standard normal noise (M, D) of the first M groups. The first rows do not depend on their number."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.stack([torch.randn(dim, generator=generator) for _ in range(groups)])


class Grouping(nn.Module):
    """Groups compete for the tokens: each token divides its attention among the groups, and a group becomes the mean of
    the tokens, weighted by what it got of them (section 3; as slot attention, Locatello et al., 2020). All rounds share
    their weights."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.mean = nn.Parameter(torch.zeros(dim))
        self.deviation = nn.Parameter(torch.full((dim,), 1.0))
        self.norm_x = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_groups = nn.LayerNorm(dim, eps=NORM_EPS)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, noise: Tensor, rounds: int) -> Tensor:
        """Tokens (B, N, D) and the groups' noise (M, D) to groups (B, M, D)."""
        k, v = (
            self.kv(self.norm_x(x)).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        )  # (B, h, N, d)
        groups = (self.mean + self.deviation * noise).expand(x.shape[0], -1, -1).to(x.dtype)
        for _ in range(rounds):
            q = self.q(self.norm_groups(groups)).unflatten(2, (self.heads, -1)).transpose(1, 2)
            scores = (q @ k.mT).float() * q.shape[3] ** -0.5  # (B, h, M, N)
            shares = scores.softmax(2)
            weights = shares / (shares.sum(3, keepdim=True) + SMALL)
            found = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
            groups = groups + self.proj(found)
            groups = groups + self.mlp(self.norm_mlp(groups))
        return groups


class Layer(nn.Module):
    """Grouping, then tokens attend to the groups, and an MLP of each token."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.grouping = Grouping(dim, heads, mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.norm_groups = nn.LayerNorm(dim, eps=NORM_EPS)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, noise: Tensor, rounds: int, branches: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D) to (B, N, D), and the groups (B, M, D). branches: (B, 1, 2) factors on the two branches of each
        sample (drop path)."""
        groups = self.grouping(x, noise, rounds)
        k, v = self.kv(self.norm_groups(groups)).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.q(self.norm1(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        y = self.proj(attend(q.to(v.dtype), k, v).transpose(1, 2).flatten(2))
        x = x + (y if branches is None else y * branches[..., :1])
        y = self.mlp(self.norm2(x))
        return x + (y if branches is None else y * branches[..., 1:]), groups


@final
class Grouper(Backbone):
    """A perceptual group tokenizer. The number of groups can be changed at any time (`groups`), because the groups of a
    layer are drawn from one learned distribution. Raises UserError for options and image sizes that do not fit together."""

    noise: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (perceptual group tokenizer)."""

        dim: int
        """Width: number of channels of every token and group."""
        depth: int
        """Number of layers."""
        heads: int
        """Number of attention heads; they share the width."""
        groups: int = 256
        """Number of groups of each layer, at most 1,024."""
        rounds: int = 3
        """Rounds of grouping in each layer."""
        patch_size: int = 4
        """Side of a patch in pixels; it must divide the image's sides."""
        mlp_ratio: float = 4.0
        """Hidden width of the MLPs, as a multiple of the width."""
        drop_path: float = 0.0
        """Drop path rate (stochastic depth) of the last layer; it rises linearly from 0 at the first."""

        def __post_init__(self) -> None:
            within(self, POSITIVE, "dim", "depth", "heads", "groups", "rounds", "patch_size", "mlp_ratio")
            within(self, FROM_0_BELOW_1, "drop_path")

    supports = frozenset({"keep", "replace", "blocks", "drop_path", "maps"})
    partly_used = True  # `pooled` has a layer of its own, and does not use the last block's patches

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
        self.blocks = nn.ModuleList(Layer(config.dim, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.pool_query = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pool_norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.pool_kv = nn.Linear(config.dim, 2 * config.dim)
        self.register_buffer("noise", torch.empty(0), persistent=False)
        self.groups = config.groups
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)
        for table in (self.pos_embed, self.pool_query):
            nn.init.trunc_normal_(table, std=0.02)

    @property
    def groups(self) -> int:
        """Number of groups of each layer in the next forward passes. Setting another raises UserError above `MOST`."""
        return len(self.noise)

    @groups.setter
    def groups(self, count: int) -> None:
        if not 1 <= count <= MOST:
            raise UserError(f"{count} groups: there are 1 to {MOST}")
        self.noise = group_noise(count, self.dim).to(self.pos_embed)

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
        """See `Backbone.forward`. `pooled` is an attention pool over the groups of the last layer. Raises UserError for
        images with another number of channels or a size that the patch does not divide, for a layer that does not exist
        and for maps with keep, UnsupportedByBackbone for another attention than "full", RuntimeError if the noise of drop
        path is missing."""
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        if maps and keep is not None:
            raise UserError("maps are of whole images: leave out keep or maps")
        grid = self._grid(images.shape[2], images.shape[3])
        x = self.patch_embed(images, keep)
        if replace is not None:
            masked, token = replace
            masked = masked if keep is None else masked.gather(1, keep)
            x = torch.where(masked[:, :, None], token.to(x.dtype), x)
        table = resize_table(self.pos_embed, self.grid, grid)
        # The residual stream has the precision of the parameters, also under autocast.
        x = x.to(self.pos_embed.dtype) + (table if keep is None else F.embedding(keep, table[0]))
        factors = rising_factors(drop, self.depth, self.config.drop_path, training=self.training)
        wanted = [self._block(i) for i in blocks]
        outputs: dict[int, Tensor] = {}
        groups = x
        for i, layer in enumerate(self.blocks):
            x, groups = layer(
                x, self.noise, self.config.rounds, None if factors is None else factors[:, None, 2 * i : 2 * i + 2]
            )
            if i in wanted:
                outputs[i] = x
        patches = self.norm(x)
        return Features(
            cls=None,
            patches=patches,
            grid=grid,
            pooled=self._pooled(groups),
            blocks=tuple(outputs[i] for i in wanted),
            maps=pyramid.simple_pyramid(patches.mT.unflatten(2, grid)) if maps else (),
        )

    def layer_of(self, parameter: str) -> int:
        """See `Backbone.layer_of`. Raises KeyError for an unknown parameter."""
        part, _, rest = parameter.partition(".")
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1
        after = dict.fromkeys(("norm", "pool_query", "pool_norm", "pool_kv"), self.depth + 1)
        return {"patch_embed": 0, "pos_embed": 0, **after}[part]

    def adapt(self, weights: dict[str, Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """See `Backbone.adapt`: positions are resized to this encoder's grid, with antialiasing where it is smaller."""
        if image_size == self.image_size or "pos_embed" not in weights:
            return weights
        table = resize_table(weights["pos_embed"], self._grid(*image_size), self.grid, antialias=True)
        return weights | {"pos_embed": table}

    def _pooled(self, groups: Tensor) -> Tensor:
        """Groups (B, M, D) to (B, D): what a learned query takes from them."""
        heads = self.config.heads
        k, v = self.pool_kv(self.pool_norm(groups)).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = self.pool_query.unflatten(2, (heads, -1)).transpose(1, 2).expand(groups.shape[0], -1, -1, -1)
        return attend(q.to(v.dtype), k, v).flatten(1).to(self.pos_embed.dtype)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """The grid (h, w) of patches of an image of height x width pixels."""
        return patch_grid(height, width, self.config.patch_size)
