"""Swin Transformer V2 (Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution", CVPR 2022): a pyramid of
stages whose attention stays within windows, every second time within windows that are shifted by half their side (Liu et
al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021).

Shapes: B images, C channels, H x W pixels, c channels of a map of Y x X positions, n windows of wy x wx = L positions, d
width of a head, O = (2 wy - 1)(2 wx - 1) offsets, (h, w) the last map, N = h * w positions in raster order, D its width, E
width of the first stage. Maps between layers are (B, Y, X, c). Parameters have the names of the authors' release; there is
no `head`.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..flags import FROM_0_BELOW_1, POSITIVE, at_least, within
from .backbone import Backbone, Features
from .drop_path import rising_factors
from .vit import Mlp, PatchEmbed

SIZES = {
    "swin_micro": {"dim": 32, "depths": (2, 2, 2), "heads": (1, 2, 4), "window": 4, "patch_size": 2},
    "swin_tiny": {"dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)},
    "swin_small": {"dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)},
    "swin_base": {"dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
    "swin_large": {"dim": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48)},
}
NORM_EPS = 1e-5  # of every layer norm
LARGEST_SCALE = math.log(
    100.0
)  # of the logarithm of the factor on cosines (section 3.2: the temperature is above 0.01)
LARGEST_BIAS = 16.0  # as released
FAR = 8.0  # offsets are scaled to -8 to 8 before the logarithm, as released
OTHER_REGION = -100.0  # added to scores between positions that are no neighbours in the image, as released
HIDDEN = 512  # width of the MLP that gives the biases, as released


@dataclass(frozen=True)
class Windows:
    """How one kind of block (shifted or not) divides a map of one size, and the offsets within a window."""

    sides: tuple[int, int]  # positions (wy, wx)
    shift: tuple[int, int]  # by which the map is rolled up and to the left before it is divided
    padding: tuple[int, int]  # rows below and columns on the right that fill the last windows
    offsets: Tensor  # (O, 2) log-spaced, what the MLP of the biases takes
    index: Tensor  # (L * L,) int64, the row of `offsets` of each pair of a query and a key
    mask: Tensor | None  # (n, 1, L, L) to add to scores; None without a shift

    @classmethod
    def of(cls, size: tuple[int, int], window: int, trained: int, shifted: bool, weight: Tensor) -> "Windows":
        """The windows of a map of `size` (Y, X). trained: the side of the windows with which the weights were trained,
        whose largest offset is 8 before the logarithm (section 3.3). weight: gives the device and the dtype.

        A window is at most as large as the map, and along an axis with one window only nothing is shifted.
        """
        sides = min(window, size[0]), min(window, size[1])
        padding = -size[0] % sides[0], -size[1] % sides[1]
        shift = tuple(side // 2 if shifted and length > side else 0 for side, length in zip(sides, size, strict=True))
        down, right = (torch.arange(1 - side, side, device=weight.device) for side in sides)
        apart = torch.stack(torch.meshgrid(down, right, indexing="ij"), dim=-1).flatten(0, 1)  # (O, 2)
        scaled = apart.float() * (FAR / (trained - 1))
        offsets = (scaled.sign() * torch.log2(scaled.abs() + 1) / math.log2(FAR)).to(weight.dtype)
        rows, columns = (torch.arange(side, device=weight.device) for side in sides)
        by_row = rows[:, None] - rows + sides[0] - 1  # (wy, wy)
        by_column = columns[:, None] - columns + sides[1] - 1
        index = by_row[:, None, :, None] * (2 * sides[1] - 1) + by_column[None, :, None, :]  # (wy, wx, wy, wx)
        whole = size[0] + padding[0], size[1] + padding[1]
        mask = cls._mask(whole, sides, (shift[0], shift[1]), weight) if any(shift) else None
        return cls(sides, (shift[0], shift[1]), padding, offsets, index.flatten(), mask)

    @staticmethod
    def _mask(whole: tuple[int, int], sides: tuple[int, int], shift: tuple[int, int], weight: Tensor) -> Tensor:
        """Rolling brings rows of the top to the bottom, beside others that they do not touch: up to three regions an
        axis. The scores between regions, (n, 1, L, L)."""
        regions = []
        for length, side, rolled in zip(whole, sides, shift, strict=True):
            at = torch.arange(length, device=weight.device)
            last = (at >= length - side).long() + (at >= length - rolled)
            regions.append(last if rolled else torch.zeros_like(at))
        region = divide((3 * regions[0][:, None] + regions[1])[None, :, :, None], sides).flatten(0, 1).squeeze(-1)
        other = region[:, :, None] != region[:, None, :]  # (n, L, L)
        scores = torch.zeros(other.shape, dtype=weight.dtype, device=weight.device)
        return scores.masked_fill(other, OTHER_REGION)[:, None]

    def split(self, x: Tensor) -> Tensor:
        """A map (B, Y, X, c) as windows (B, n, L, c). The padding is of zeros, and nothing hides it from attention."""
        if any(self.padding):
            x = F.pad(x, (0, 0, 0, self.padding[1], 0, self.padding[0]))
        if any(self.shift):
            x = x.roll((-self.shift[0], -self.shift[1]), (1, 2))
        return divide(x, self.sides)

    def joined(self, windows: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse of `split`, without the padding: (B, n, L, c) to (B, Y, X, c)."""
        across = (size[1] + self.padding[1]) // self.sides[1]
        x = windows.unflatten(2, self.sides).unflatten(1, (-1, across))  # (B, down, across, wy, wx, c)
        x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(self.shift):
            x = x.roll(self.shift, (1, 2))
        return x[:, : size[0], : size[1]] if any(self.padding) else x


def divide(x: Tensor, sides: tuple[int, int]) -> Tensor:
    """A map (B, Y, X, c) as windows (B, n, L, c) in raster order; the sides divide the map's."""
    x = x.unflatten(2, (-1, sides[1])).unflatten(1, (-1, sides[0]))  # (B, down, wy, across, wx, c)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class WindowAttention(nn.Module):
    """Attention by cosines within windows, with biases that a small MLP gives for log-spaced offsets (sections 3.2 and
    3.3). Keys have no bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """(B, n, L, c) to the same shape."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(3, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        # One copy here instead of one of each part before its product.
        q, k, v = qkv.contiguous().unbind(0)  # (B, n, heads, L, d)
        # The factor is on the queries, which are smaller than the scores. In the dtype of v: autocast norms in float32.
        q = F.normalize(q, dim=-1) * self.logit_scale.clamp(max=LARGEST_SCALE).exp()
        scores = q.to(v.dtype) @ F.normalize(k, dim=-1).to(v.dtype).mT + self.scores(windows)
        y = scores.softmax(-1).to(v.dtype) @ v
        return self.proj(y.transpose(2, 3).flatten(3))

    def scores(self, windows: Windows) -> Tensor:
        """What is added to the scores, (n or 1, heads, L, L): the biases, and the mask of a shift."""
        offsets, first, last = windows.offsets, self.cpb_mlp[0], self.cpb_mlp[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        # In the dtype of the offsets: autocast, and sharded parameters that are gathered in bfloat16, would round biases.
        with torch.autocast(offsets.device.type, enabled=False):
            hidden = F.relu(F.linear(offsets, first.weight.to(offsets.dtype), first.bias.to(offsets.dtype)))
            table = LARGEST_BIAS * torch.sigmoid(F.linear(hidden, last.weight.to(offsets.dtype)))  # (O, heads)
            length = windows.sides[0] * windows.sides[1]
            biases = F.embedding(windows.index, table).unflatten(0, (length, length)).permute(2, 0, 1)[None]
            return biases if windows.mask is None else biases + windows.mask


class Block(nn.Module):
    """x <- x + norm(f(x)) for f = attention within windows, then for f = MLP (section 3.2). The norms begin with weight 0,
    as released, so a block begins as the identity."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attn = WindowAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor, windows: Windows, factors: Tensor | None = None) -> Tensor:
        """(B, Y, X, c) to the same shape. factors: (B, 2) on the two branches of each sample (drop path)."""
        y = windows.joined(self.attn(windows.split(x), windows), (x.shape[1], x.shape[2]))
        y = self.norm1(y)
        if factors is not None:
            y = y * factors[:, :1, None, None]
        x = x + y
        y = self.norm2(self.mlp(x))
        if factors is not None:
            y = y * factors[:, 1:, None, None]
        return x + y


class Merging(nn.Module):
    """Neighbourhoods of 2 x 2 positions become one of twice the width: a linear layer, then a norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, c) to (B, Y / 2, X / 2, 2c). The four positions are joined column by column."""
        joined = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        reduced = self.norm(self.reduction(joined))
        return reduced.to(x.dtype)  # see Swin.forward


class Stage(nn.Module):
    """Blocks of one width, every second one with shifted windows; after them, except in the last stage, neighbours are
    merged."""

    def __init__(self, dim: int, depth: int, heads: int, *, merge: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.downsample = Merging(dim) if merge else None

    def forward(self, x: Tensor, window: int, trained: int, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A map (B, Y, X, c) after the blocks, and merged, (B, Y / 2, X / 2, 2c); of the last stage the same map twice.
        factors: (B, 2 * blocks)."""
        weight = self.get_parameter("blocks.0.norm1.weight")
        kinds = [
            Windows.of((x.shape[1], x.shape[2]), window, trained, shifted, weight)
            for shifted in (False, True)[: len(self.blocks)]
        ]
        for i, block in enumerate(self.blocks):
            x = block(x, kinds[i % 2], None if factors is None else factors[:, 2 * i : 2 * i + 2])
        return x, x if self.downsample is None else self.downsample(x)


class NormedPatchEmbed(PatchEmbed):
    """Patches to tokens by one linear layer and a norm."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__(patch_size, in_chans, dim)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) to (B, N, D), or to (B, K, D) of the patches `keep` (B, K)."""
        return self.norm(super().forward(images, keep))


@final
class Swin(Backbone):
    """A Swin Transformer V2; `depth` counts blocks. Its stride is the side of a patch times 2 for each stage after the
    first. Raises UserError for options that do not fit together and images that the stride does not divide."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (Swin Transformer V2)."""

        dim: int
        """Width of the first stage; it doubles with each stage."""
        depths: tuple[int, ...]
        """Number of blocks of each stage."""
        heads: tuple[int, ...]
        """Number of attention heads of each stage."""
        window: int = 8
        """Side of a window of attention in positions of the map; a smaller map is one window."""
        pretrained_windows: tuple[int, ...] | None = None
        """Sides of the windows with which the weights were trained, one for each stage (default: those of this run).
        Biases of attention are functions of the offset relative to them."""
        patch_size: int = 4
        """Side of a patch in pixels."""
        drop_path: float = 0.0
        """Drop path rate (stochastic depth) of the last block; it rises linearly from 0 at the first."""

        def __post_init__(self) -> None:
            within(self, POSITIVE, "dim", "depths", "heads", "patch_size")
            within(self, at_least(2), "window", "pretrained_windows")
            within(self, FROM_0_BELOW_1, "drop_path")

    supports = frozenset({"replace", "drop_path", "maps"})
    undecayed = ("*.cpb_mlp.*", "*.logit_scale")

    def __init__(self, image_size: tuple[int, int], in_chans: int, config: Config) -> None:
        super().__init__()
        _validate(config, in_chans)
        height, width = image_size
        stages = len(config.depths)
        self.config, self.image_size, self.in_chans = config, (height, width), in_chans
        self.map_channels = tuple(config.dim * 2**i for i in range(stages))
        strides = [config.patch_size * 2**i for i in range(stages)]
        self.map_strides = tuple((stride, stride) for stride in strides)
        self.dim, self.depth = self.map_channels[-1], sum(config.depths)
        self.stride = (strides[-1], strides[-1])
        self._check_size(height, width)
        # Of a window of one position every offset is 0, whatever the largest one is.
        self.pretrained_windows = config.pretrained_windows or tuple(
            max(2, min(config.window, max(height, width) // stride)) for stride in strides
        )

        self.patch_embed = NormedPatchEmbed(config.patch_size, in_chans, config.dim)
        self.layers = nn.ModuleList(
            Stage(dim, depth, heads, merge=i < stages - 1)
            for i, (dim, depth, heads) in enumerate(zip(self.map_channels, config.depths, config.heads, strict=True))
        )
        self.norm = nn.LayerNorm(self.dim, eps=NORM_EPS)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, Block):
                nn.init.zeros_(part.norm1.weight)
                nn.init.zeros_(part.norm2.weight)

    @property
    def token_dim(self) -> int:
        """E, the width of the first stage."""
        return self.config.dim

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
        """See `Backbone.forward`. The grid is that of the last stage. The mask of `replace` is of that grid, and its token
        (E,) takes the place of the embeddings, after their norm, of all patches under a masked position. `pooled` is the
        mean of `patches`. `maps` are the outputs of the stages, the last one before the norm.

        Windows keep their side in positions whatever the size of the images; a map that they do not divide is padded
        below and on the right, as in detection.

        Raises UserError for images with another number of channels or of a size that the stride does not divide,
        UnsupportedByBackbone for keep, another attention than "full", and blocks (their widths differ between stages),
        RuntimeError if the noise of drop path is missing.
        """
        self.refuse_options(keep, replace, attention, prefix_length, blocks)
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        height, width = images.shape[2], images.shape[3]
        self._check_size(height, width)

        factors = rising_factors(drop, self.depth, self.config.drop_path, training=self.training)
        patch = self.config.patch_size
        # The residual stream has the precision of the parameters, also under autocast.
        x = self.patch_embed(images).to(self.norm.weight.dtype).unflatten(1, (height // patch, width // patch))
        grid = height // self.stride[0], width // self.stride[1]
        if replace is not None:
            masked, token = replace
            under = self.stride[0] // patch
            masked = masked.unflatten(1, grid).repeat_interleave(under, 1).repeat_interleave(under, 2)
            x = torch.where(masked[..., None], token.to(x.dtype), x)
        first, outputs = 0, []
        for stage, depth, trained in zip(self.layers, self.config.depths, self.pretrained_windows, strict=True):
            of_stage = None if factors is None else factors[:, 2 * first : 2 * (first + depth)]
            of_map, x = stage(x, self.config.window, trained, of_stage)
            first += depth
            if maps:
                outputs.append(of_map.permute(0, 3, 1, 2))
        patches = self.norm(x).flatten(1, 2)
        return Features(cls=None, patches=patches, grid=grid, pooled=patches.mean(1), maps=tuple(outputs))

    def layer_of(self, parameter: str) -> int:
        """See `Backbone.layer_of`; the merging after a stage belongs to the stage's last block, as released. Raises
        KeyError for an unknown parameter."""
        part, _, rest = parameter.partition(".")
        if part == "layers":
            stage, kind, block = rest.split(".")[:3]
            of_stage = self.config.depths[: int(stage) + 1]
            return sum(of_stage[:-1]) + int(block) + 1 if kind == "blocks" else sum(of_stage)
        return {"patch_embed": 0, "norm": self.depth + 1}[part]

    def describe(self) -> dict[str, Any]:
        """See `Backbone.describe`; `pretrained_windows` are always named, so that the weights keep their meaning with
        other windows and other images."""
        return asdict(self.config) | {"pretrained_windows": self.pretrained_windows}

    def _check_size(self, height: int, width: int) -> None:
        """Raise UserError for images that the stride does not divide."""
        side = self.stride[0]
        if height % side or width % side or height < side or width < side:
            fits = [max(side, round(length / side) * side) for length in (height, width)]
            raise UserError(
                f"images of {height} x {width} pixels (height x width) do not divide by the encoder's stride, {side} "
                f"pixels: use --image-size {fits[0]} {fits[1]} or a smaller --patch-size"
            )


def _validate(config: Swin.Config, in_chans: int) -> None:
    """Raise UserError for options that do not fit together."""
    if in_chans <= 0:
        raise UserError(f"--in-chans is {in_chans}; it must be above 0")
    stages = len(config.depths)
    for name in ("heads", "pretrained_windows"):
        given_for = getattr(config, name)
        if given_for is not None and len(given_for) != stages:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} has {len(given_for)} numbers, and --depths says {stages} stages: one for each")
    for i, heads in enumerate(config.heads):
        if config.dim * 2**i % heads:
            raise UserError(
                f"--heads {' '.join(map(str, config.heads))}: {heads} must divide the width of stage {i + 1}, "
                f"{config.dim * 2**i} (--dim {config.dim}, doubled with each stage)"
            )
