"""A vision transformer whose first blocks are equivariant to the eight symmetries of the square (Nordström et al.,
"Stronger ViTs With Octic Equivariance", 2025): quarter turns and mirror images of a square image turn its features in a
known way. An equivariant linear layer has an eighth of the weights of a dense one and 3/16 of its multiplications.

Shapes: B images, C channels, H x W pixels, p patch side, N patches on an (h, w) grid in raster order, K of them kept, L
tokens (N or K, and a class token), D width, c = D / 8 channels of a part, d width of a head. Equivariant features are
(B, L, 8, c). The parts are A1, A2, B1, B2 (one-dimensional representations), then the first component of the two copies
of the two-dimensional one, E, then its second component. A quarter turn of the image keeps A1 and A2, changes the sign of
B1 and B2, and turns each (x, y) of E to (-y, x). A mirror image (left and right) keeps A1 and B1, changes the sign of A2
and B2, and turns (x, y) to (-x, y).
"""

from dataclasses import dataclass
from typing import Literal, final

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
from .vit import NORM_EPS, Block

SIZES = {
    "octic_micro": {"dim": 128, "depth": 4, "heads": 4},
    "octic_tiny": {"dim": 192, "depth": 12, "heads": 3},
    "octic_small": {"dim": 384, "depth": 12, "heads": 6},
    "octic_base": {"dim": 768, "depth": 12, "heads": 12},
    "octic_large": {"dim": 1024, "depth": 24, "heads": 16},
    "octic_huge": {"dim": 1280, "depth": 32, "heads": 16},
}

SIGNS = ((1, 1), (-1, -1), (1, 1), (-1, -1), (1, -1), (1, -1))  # of a field's mirror images, vertical and horizontal


def _regular_basis() -> Tensor:
    """The orthonormal (8, 8) matrix from the eight values of a function on the group (k quarter turns, then those with a
    mirror image) to the parts."""
    alternating = torch.tensor([1.0, -1.0, 1.0, -1.0])
    ones = torch.ones(4)
    rows = [(ones, ones), (ones, -ones), (alternating, alternating), (alternating, -alternating)]
    first, second = [], []
    for x, y in ((1.0, 1.0), (1.0, -1.0)):
        even = torch.tensor([x, y, -x, -y])
        odd = torch.tensor([-y, x, y, -x])
        first.append((odd, -odd))
        second.append((even, even))
    return torch.stack([torch.cat(row) for row in (*rows, *first, *second)]) / 8**0.5


def _unfold(quarter: Tensor, vertical: int, horizontal: int) -> Tensor:
    """(..., s, s) to (..., 2 s, 2 s): even (1) or odd (-1) under a mirror image along each axis."""
    half = torch.cat([quarter, horizontal * quarter.flip(-1)], dim=-1)
    return torch.cat([half, vertical * half.flip(-2)], dim=-2)


def symmetric(quarters: Tensor) -> Tensor:
    """Free quarters (6, ..., s, s), for A1, A2, B1, B2 and the two copies of E, to fields (8, ..., 2 s, 2 s) of the eight
    parts that turn as features do: <field, turned image> is the turned <field, image>."""
    a1, a2, b1, b2, *e = (_unfold(quarter, *signs) for quarter, signs in zip(quarters, SIGNS, strict=True))
    half = 0.5**0.5
    ones = [half * (a1 + a1.mT), half * (a2 - a2.mT), half * (b1 - b1.mT), half * (b2 + b2.mT)]
    first = torch.stack(e)
    return torch.cat([torch.stack(ones), first, torch.rot90(first, 1, (-2, -1))])


class OcticLinear(nn.Module):
    """An equivariant linear layer: a matrix for each one-dimensional part, one for E, applied to both components, and a
    bias of A1. Weights are truncated normal; their deviation gives outputs as large as a dense layer's of 0.02."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.ones = nn.Parameter(torch.empty(4, inside // 8, outside // 8))
        self.twos = nn.Parameter(torch.empty(outside // 4, inside // 4))
        self.bias = nn.Parameter(torch.zeros(outside // 8))
        nn.init.trunc_normal_(self.ones, std=0.02 * 8**0.5, a=-1, b=1)
        nn.init.trunc_normal_(self.twos, std=0.02 * 4**0.5, a=-1, b=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, 8, c) to (B, L, 8, c')."""
        b, length = x.shape[:2]
        by_part = x[:, :, :4].flatten(0, 1).transpose(0, 1)  # (4, B * L, c)
        ones = (by_part @ self.ones).transpose(0, 1).unflatten(0, (b, length))
        twos = F.linear(x[:, :, 4:].reshape(b, length, 2, -1), self.twos)
        first, others = ones.split([1, 3], dim=2)
        first = first + self.bias.to(ones.dtype)
        return torch.cat([first, others, twos.reshape(b, length, 4, -1)], dim=2)


class OcticScale(nn.Module):
    """A learned factor for each channel of each part, the same for both components of E."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        # Of A1, A2, B1, B2 and both copies of E. One axis, so that optimisers treat it as a gain: no weight decay, no Muon.
        self.weight = nn.Parameter(torch.full((6 * (dim // 8),), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, 8, c) to the same shape."""
        parts = self.weight.unflatten(0, (6, -1))
        return x * torch.cat([parts, parts[4:]])


class OcticNorm(nn.Module):
    """A layer norm: each part without its mean over channels (E: over both copies), divided by the deviation of all
    channels; factors as `OcticScale`, and a bias of A1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = OcticScale(dim, 1.0)
        self.bias = nn.Parameter(torch.zeros(dim // 8))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, 8, c) to the same shape, in float32."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float() if x.dtype != torch.float64 else x
            ones, twos = x[:, :, :4], x[:, :, 4:].unflatten(2, (2, 2))
            x = torch.cat(
                [ones - ones.mean(3, keepdim=True), (twos - twos.mean((3, 4), keepdim=True)).flatten(2, 3)], 2
            )
            x = self.scale(x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + NORM_EPS))
            return torch.cat([x[:, :, :1] + self.bias, x[:, :, 1:]], dim=2)


class OcticAttention(nn.Module):
    """Self-attention. A head has channels of all eight parts, so its scores do not change with the image's turns."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = OcticLinear(dim, 3 * dim)
        self.proj = OcticLinear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, 8, c) to the same shape."""
        qkv = self.qkv(x).unflatten(3, (3, self.heads, -1))  # (B, L, 8, 3, heads, d / 8)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5).flatten(4).unbind(0)  # (B, heads, L, d)
        out = attend(q, k, v).unflatten(3, (8, -1))  # (B, heads, L, 8, d / 8)
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(3))


class OcticMlp(nn.Module):
    """Two linear layers with a GELU of the function on the group between them."""

    basis: Tensor

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = OcticLinear(dim, hidden)
        self.fc2 = OcticLinear(hidden, dim)
        self.register_buffer("basis", _regular_basis(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, 8, c) to the same shape."""
        x = self.fc1(x)
        basis = self.basis.to(x.dtype)
        return self.fc2(basis @ F.gelu(basis.mT @ x))


class OcticBlock(nn.Module):
    """x <- x + f(norm(x)) for f = attention, then for f = MLP, on equivariant features."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, layer_scale: float | None) -> None:
        super().__init__()
        self.norm1 = OcticNorm(dim)
        self.attn = OcticAttention(dim, heads)
        self.ls1 = nn.Identity() if layer_scale is None else OcticScale(dim, layer_scale)
        self.norm2 = OcticNorm(dim)
        self.mlp = OcticMlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else OcticScale(dim, layer_scale)

    def forward(self, x: Tensor, branches: Tensor | None = None) -> Tensor:
        """(B, L, 8, c) to the same shape. branches: (B, 1, 2) factors on the two branches of each sample (drop path)."""
        for i, (norm, layer, scale) in enumerate(((self.norm1, self.attn, self.ls1), (self.norm2, self.mlp, self.ls2))):
            y = scale(layer(norm(x)))
            x = x + (y if branches is None else y * branches[:, :, i, None, None])
        return x


class OcticPatchEmbed(nn.Module):
    """Patches to equivariant features: filters that are made from a free quarter each."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        half = patch_size // 2
        self.quarters = nn.Parameter(torch.empty(6, dim // 8, in_chans, half, half))
        self.bias = nn.Parameter(torch.zeros(dim // 8))
        bound = (3 / (in_chans * patch_size**2)) ** 0.5 / 3**0.5  # a convolution's by default
        nn.init.uniform_(self.quarters, -bound, bound)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) to (B, N, 8, c), or to (B, K, 8, c) of the patches `keep` (B, K)."""
        filters = symmetric(self.quarters)  # (8, c, C, p, p)
        p = filters.shape[-1]
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        if keep is not None:
            patches = torch.gather(patches, 1, keep[:, :, None].expand(-1, -1, patches.shape[2]))
        x = F.linear(patches, filters.flatten(2).flatten(0, 1)).unflatten(2, (8, -1))
        return torch.cat([x[:, :, :1] + self.bias.to(x.dtype), x[:, :, 1:]], dim=2)


@final
class Octic(Backbone):
    """An octic-equivariant ViT for square and other images of any size that is a multiple of the patch; equivariance is
    exact for square images. Raises UserError for options and image sizes that do not fit together."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (octic ViT)."""

        dim: int
        """Width: number of channels of every token."""
        depth: int
        """Number of blocks."""
        heads: int
        """Number of attention heads. Their width must be a multiple of 8."""
        patch_size: int = 16
        """Side of a patch in pixels, an even number; it must divide the image's sides."""
        octic_blocks: int | None = None
        """Number of equivariant blocks before the others (none: half of the blocks)."""
        octic_mode: Literal["hybrid", "invariant", "octic"] = "hybrid"
        """What follows the equivariant blocks: ordinary blocks on all channels (hybrid), ordinary blocks on invariants of
        the channels (invariant), or nothing, so that all blocks are equivariant (octic)."""
        mlp_ratio: float = 4.0
        """Hidden width of the MLP, as a multiple of the width; a multiple of 8 channels."""
        cls: bool = True
        """Use a class token."""
        pool: Literal["cls", "mean"] = "mean"
        """Vector of the whole image: the class token, or the mean of the patches."""
        layer_scale: float | None = None
        """Initial value of LayerScale; none: no LayerScale."""
        drop_path: float = 0.0
        """Drop path rate (stochastic depth) of the last block; it rises linearly from 0 at the first."""

        def __post_init__(self) -> None:
            within(self, POSITIVE, "dim", "depth", "heads", "patch_size", "octic_blocks", "mlp_ratio", "layer_scale")
            within(self, FROM_0_BELOW_1, "drop_path")

    supports = frozenset({"keep", "replace", "blocks", "drop_path", "maps"})

    def __init__(self, image_size: tuple[int, int], in_chans: int, config: Config) -> None:
        super().__init__()
        _validate(config, in_chans)
        height, width = image_size
        self.config, self.image_size, self.in_chans = config, (height, width), in_chans
        self.dim, self.depth = config.dim, config.depth
        self.stride = (config.patch_size, config.patch_size)
        self.map_strides, self.map_channels = pyramid.strides(self.stride), (self.dim,) * len(pyramid.SCALES)
        self.grid = self._grid(height, width)
        self.side = (max(self.grid) + 1) // 2 * 2  # of the table of positions, a square of an even side
        half = max(1, config.depth // 2) if config.octic_blocks is None else config.octic_blocks
        self.octic_depth = config.depth if config.octic_mode == "octic" else half

        c = config.dim // 8
        self.patch_embed = OcticPatchEmbed(config.patch_size, in_chans, config.dim)
        self.pos_quarters = nn.Parameter(torch.empty(6, c, self.side // 2, self.side // 2))
        self.cls_token = nn.Parameter(torch.empty(1, 1, c)) if config.cls else None
        nn.init.trunc_normal_(self.pos_quarters, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=8 * 0.02)
        ordinary = config.depth - self.octic_depth
        self.octic_blocks = nn.ModuleList(
            OcticBlock(config.dim, config.heads, config.mlp_ratio, config.layer_scale) for _ in range(self.octic_depth)
        )
        self.invariants = nn.Linear(6 * c, config.dim) if config.octic_mode == "invariant" else None
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, mlp_ratio=config.mlp_ratio, layer_scale=config.layer_scale)
            for _ in range(ordinary)
        )
        self.norm = OcticNorm(config.dim) if config.octic_mode == "octic" else nn.LayerNorm(config.dim, eps=NORM_EPS)
        if self.invariants is not None:
            nn.init.trunc_normal_(self.invariants.weight, std=0.02)
            nn.init.zeros_(self.invariants.bias)

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
        """See `Backbone.forward`. Features of equivariant blocks, and with --octic-mode octic all features, are the parts
        (B, L, 8, c) flattened. Raises UserError for images with another number of channels or a size that the patch does
        not divide, for a block that does not exist and for maps with keep, UnsupportedByBackbone for another attention
        than "full", RuntimeError if the noise of drop path is missing."""
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        if maps and keep is not None:
            raise UserError("maps are of whole images: leave out keep or maps")
        grid = self._grid(images.shape[2], images.shape[3])
        x = self._embedded(images, grid, keep, replace)
        factors = rising_factors(drop, self.depth, self.config.drop_path, training=self.training)
        wanted = [self._block(i) for i in blocks]
        outputs: dict[int, Tensor] = {}
        for i in range(self.depth):
            branches = None if factors is None else factors[:, None, 2 * i : 2 * i + 2]
            if i < self.octic_depth:
                x = self.octic_blocks[i](x, branches)
                if i + 1 == self.octic_depth and self.config.octic_mode != "octic":
                    x = self._plain(x)
            else:
                x = self.blocks[i - self.octic_depth](x, branches=branches)
            if i in wanted:
                outputs[i] = x.flatten(2)
        x = self.norm(x).flatten(2)
        first = int(self.config.cls)
        prefix, patches = x[:, :first], x[:, first:]
        cls = prefix[:, 0] if first else None
        pyramid_maps = pyramid.simple_pyramid(patches.mT.unflatten(2, grid)) if maps else ()
        return Features(
            cls=cls,
            patches=patches,
            grid=grid,
            pooled=cls if cls is not None and self.config.pool == "cls" else patches.mean(1),
            prefix=prefix if first else None,
            blocks=tuple(outputs[i] for i in wanted),
            tokens=x if first else None,
            maps=pyramid_maps,
        )

    def layer_of(self, parameter: str) -> int:
        """See `Backbone.layer_of`. Raises KeyError for an unknown parameter."""
        part, _, rest = parameter.partition(".")
        if part in ("octic_blocks", "blocks"):
            return int(rest.partition(".")[0]) + 1 + (self.octic_depth if part == "blocks" else 0)
        stem = dict.fromkeys(("patch_embed", "cls_token", "pos_quarters"), 0)
        return {**stem, "invariants": self.octic_depth, "norm": self.depth + 1}[part]

    def adapt(self, weights: dict[str, Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """See `Backbone.adapt`: the table of positions is resized to this encoder's side, with antialiasing where it is
        smaller."""
        quarters = weights.get("pos_quarters")
        if quarters is None or 2 * quarters.shape[-1] == self.side:
            return weights
        old, new = 2 * quarters.shape[-1], self.side
        whole = torch.stack([_unfold(quarter, *signs) for quarter, signs in zip(quarters, SIGNS, strict=True)])
        rows = whole.flatten(0, 1).flatten(1).mT[None]  # (1, old * old, 6 c)
        resized = resize_table(rows, (old, old), (new, new), antialias=True)[0].mT.unflatten(1, (new, new))
        return weights | {"pos_quarters": resized[:, : new // 2, : new // 2].unflatten(0, (6, -1)).contiguous()}

    def _embedded(
        self, images: Tensor, grid: tuple[int, int], keep: Tensor | None, replace: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The equivariant features (B, L, 8, c) that enter the first block."""
        x = self.patch_embed(images, keep)
        if replace is not None:
            masked, token = replace
            masked = masked if keep is None else masked.gather(1, keep)
            x = torch.where(masked[:, :, None, None], token.to(x.dtype).unflatten(0, (8, -1)), x)
        # The residual stream has the precision of the parameters, also under autocast.
        x = x.to(self.pos_quarters.dtype)
        table = symmetric(self.pos_quarters).flatten(0, 1).flatten(1).mT[None]  # (1, side * side, D)
        table = resize_table(table, (self.side, self.side), grid)
        positions = table if keep is None else F.embedding(keep, table[0])
        x = x + positions.unflatten(2, (8, -1))
        if self.cls_token is None:
            return x
        cls = F.pad(self.cls_token[:, :, None], (0, 0, 0, 7))  # only A1 can be the same for all turns of an image
        return torch.cat([cls.expand(x.shape[0], -1, -1, -1), x], dim=1)

    def _plain(self, x: Tensor) -> Tensor:
        """Equivariant features (B, L, 8, c) as ordinary ones (B, L, D)."""
        if self.invariants is None:
            return x.flatten(2)
        ones, twos = x[:, :, :4], x[:, :, 4:].unflatten(2, (2, 2))  # (B, L, components, copies, c)
        # Without the small number the gradient of a length of 0 is not finite.
        lengths = (twos.square().sum(2) + NORM_EPS).sqrt()
        found = torch.cat([ones[:, :, :1], ones[:, :, 1:].abs(), lengths], dim=2)
        return self.invariants(found.flatten(2)).to(x.dtype)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """The grid (h, w) of patches of an image of height x width pixels."""
        return patch_grid(height, width, self.config.patch_size)


def _validate(config: Octic.Config, in_chans: int) -> None:
    """Raise UserError for options that do not fit together."""
    if in_chans <= 0:
        raise UserError(f"--in-chans is {in_chans}; it must be above 0")
    if config.dim % (8 * config.heads):
        raise UserError(
            f"--dim {config.dim} must be a multiple of 8 times --heads {config.heads}: each part has all heads"
        )
    if config.patch_size % 2:
        raise UserError(f"--patch-size {config.patch_size} must be even: filters are made from quarters")
    if int(config.dim * config.mlp_ratio) % 8:
        raise UserError(f"--mlp-ratio {config.mlp_ratio} gives {int(config.dim * config.mlp_ratio)} channels, which is no "
                        "multiple of 8")  # fmt: skip
    if config.octic_blocks is not None and config.octic_blocks > config.depth:
        raise UserError(f"--octic-blocks {config.octic_blocks} is more than --depth {config.depth}")
    if config.pool == "cls" and not config.cls:
        raise UserError("--pool cls needs a class token (--cls); without one, --pool mean")
