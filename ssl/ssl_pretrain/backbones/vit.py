"""The vision transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021) with what later papers added:
registers, layer scale, SwiGLU, query-key norm, RMS norm, drop path, rotary and relative positions, decayed shortcuts,
parallel branches, the hMLP stem.

Shapes: B images, C channels, H x W pixels, p patch side, N patches on an (h, w) grid in raster order, K of them kept, P
prefix tokens (CLS, then registers), L = P + N or P + K tokens, D width, d width of a head, T tokens of several batches of
images. Parameters have the names of the released ViTs (MAE, DINO, DINOv2), registers are `reg_tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..flags import AT_LEAST_1, FROM_0_BELOW_1, FROM_0_TO_1, NOT_NEGATIVE, POSITIVE, within
from . import pyramid
from .attention import Packed, attend, attend_packed, prefix_mask, weights
from .backbone import Backbone, Features
from .drop_path import ROWS_ABOVE, Kept, drop_factors, given, kept_samples, kept_tokens
from .hmlp_stem import HMLPStem
from .parallel_block import ParallelBlock, spread
from .positions import Offsets, augmented, patch_grid, resize_offsets, resize_table, rope_angles, rotate, sincos_table

SIZES = {
    "vit_micro": {"dim": 128, "depth": 4, "heads": 4},
    "vit_tiny": {"dim": 192, "depth": 12, "heads": 3},
    "vit_small": {"dim": 384, "depth": 12, "heads": 6},
    "vit_base": {"dim": 768, "depth": 12, "heads": 12},
    "vit_large": {"dim": 1024, "depth": 24, "heads": 16},
    "vit_huge": {"dim": 1280, "depth": 32, "heads": 16},
    "vit_giant": {"dim": 1536, "depth": 40, "heads": 24},
}
NORM_EPS = 1e-6  # of every layer norm, as in nearly all published ViTs; torch's default is 1e-5

Rope = tuple[Tensor, Tensor]  # cosines and sines of the angles of rotary positions
Map = Literal["weights", "logits"]  # of attention


class RMSNorm(nn.RMSNorm):
    """RMS norm (Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019), which has no bias. Autocast does not widen
    it everywhere, so it computes in float32 by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D), in the dtype of x."""
        assert self.weight is not None
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def _norm(dim: int, eps: float, rms: bool) -> nn.Module:
    """A layer norm or an RMS norm."""
    return RMSNorm(dim, eps=eps) if rms else nn.LayerNorm(dim, eps=eps)


class PatchEmbed(nn.Module):
    """Patches to tokens by one linear layer; its weight has a convolution's shape (D, C, p, p), as in checkpoints."""

    def __init__(self, patch_size: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) to (B, N, D), or to (B, K, D) of the patches `keep` (B, K).

        A matrix product: patches that are left out cost nothing, and for all patches it is faster than the convolution.
        """
        p = self.proj.kernel_size[0]
        patches = images.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, C, p, p)
        patches = patches.flatten(3).flatten(1, 2)
        if keep is not None:
            patches = torch.gather(patches, 1, keep[:, :, None].expand(-1, -1, patches.shape[2]))
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class NoKeyBias(nn.Linear):
    """The linear layer of queries, keys and values, whose bias of keys is 0 (BEiT, DINOv3). It stays 0, because it gets no
    gradient, so the weights are also those of a layer with it."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim)
        self.biased: Tensor
        self.register_buffer("biased", torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., 3 D)."""
        return F.linear(x, self.weight, self.bias * self.biased)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values; `qk_norm` normalises the queries and keys
    of each head (Dehghani et al., 2023, section 2), `offsets` is the size of its table of relative positions (0: none).
    k_bias: with `qkv_bias`, whether keys have a bias, too."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        qkv_bias: bool,
        qk_norm: bool,
        norm_eps: float = NORM_EPS,
        rms_norm: bool = False,
        offsets: int = 0,
        k_bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias) if k_bias or not qkv_bias else NoKeyBias(dim)
        self.q_norm = _norm(dim // heads, norm_eps, rms_norm) if qk_norm else nn.Identity()
        self.k_norm = _norm(dim // heads, norm_eps, rms_norm) if qk_norm else nn.Identity()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, heads)) if offsets else None
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        causal: bool,
        rope: Rope | None,
        packed: Packed | None = None,
        first: int | None = None,
        offsets: Offsets | Tensor | None = None,
        attention: Map | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See `Block.forward`."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, L, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if self.relative_position_bias_table is not None and not isinstance(offsets, Offsets):
            raise ValueError("relative positions need `offsets`")
        if offsets is not None:
            own = self.relative_position_bias_table
            scores = offsets if isinstance(offsets, Tensor) else offsets.scores(cast(Tensor, own))
            scores = scores if first is None else scores[:, :, :first]
            mask = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        if packed is not None:
            x = attend_packed(q, k, v, packed, first)
        else:
            x = attend(q if first is None else q[:, :, :first], k, v, mask, causal)
        x = self.proj(x.transpose(1, 2).flatten(2))
        return x if attention is None else (x, weights(q, k, mask, causal, logits=attention == "logits"))


class OffsetTable(nn.Module):
    """A learned score of every offset (`Offsets`) for all blocks."""

    def __init__(self, offsets: int, heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, heads))

    def forward(self, offsets: Offsets) -> Tensor:
        """The scores (1 or B, heads, L, L)."""
        return offsets.scores(self.relative_position_bias_table)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Gated MLP, w3(silu(gate) * up) (Shazeer, 2020), its hidden width two thirds of an MLP's, rounded up to a multiple
    of 8 (DINOv2's rule); gate and up are one matrix w12, in that order."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * up)


class LayerScale(nn.Module):
    """A learned factor for each channel (Touvron et al., "Going deeper with Image Transformers", 2021, section 2)."""

    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(value)))  # a YAML file may say 1

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block: x <- shortcut * x + f(norm(x)) for f = attention, then for f = MLP. It is used by
    the ViT and by decoders and predictors of methods. With `post_norm`, as in the first transformers: x <-
    norm(shortcut * x + f(x)).

    shortcut: factor on the identity path ("Residual Connections Harm Generative Representation Learning", Zhang et al.,
    2024). Linear layers are initialised truncated normal with standard deviation 0.02, biases zero.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        swiglu: bool = False,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        shortcut: float = 1.0,
        post_norm: bool = False,
        norm_eps: float = NORM_EPS,
        rms_norm: bool = False,
        offsets: int = 0,
        k_bias: bool = True,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        # A tensor, not a number: otherwise a compiler would compile a block again for each factor.
        self.shortcut: Tensor | None
        self.register_buffer("shortcut", None if shortcut == 1 else torch.tensor(float(shortcut)), persistent=False)
        self.norm1 = _norm(dim, norm_eps, rms_norm)
        self.attn = Attention(
            dim, heads, qkv_bias=qkv_bias, qk_norm=qk_norm, norm_eps=norm_eps, rms_norm=rms_norm, offsets=offsets,
            k_bias=k_bias,
        )  # fmt: skip
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2 = _norm(dim, norm_eps, rms_norm)
        self.mlp = (SwiGLU if swiglu else Mlp)(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        rope: Rope | None = None,
        branches: Tensor | None = None,
        packed: Packed | None = None,
        first: int | None = None,
        offsets: Offsets | Tensor | None = None,
        kept: tuple[Kept, Kept] | None = None,
        attention: Map | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens (B, L, D) to (B, L, D), or (1, T, D) to (1, T, D) of `packed` batches.

        mask, causal: as `attend` takes them, bool, neither with `packed` or `first`. rope: each broadcastable to (B,
        heads, L, d / 2). branches: (B, 1, 2) or (1, T, 2) factors on the two branches of each sample or token (drop
        path). first: number of an image's tokens to compute, L' (default: all), so the output is (B, L', D) or (1, T',
        D); the other tokens only serve as keys and values. offsets: for a block with relative positions, or the scores
        (1 or B, heads, L, L) that all blocks share; neither with `causal` nor `packed`. kept: the samples that each
        branch is computed for, instead of `branches`; not with both `packed` and `first`. attention: return also the
        weights (B, heads, L, L) of the attention, or the logits before the softmax (`attention.weights`); not with
        `packed`, `first` or `kept`.
        """
        seen, (by_attention, by_mlp) = x, kept or (None, None)
        if by_attention is not None:
            seen, packed = by_attention.of(x), by_attention.packed
            mask, rope = by_attention.of_mask(mask), by_attention.of_rope(rope)
            offsets = by_attention.of_offsets(offsets)
        seen = seen if self.post_norm else self.norm1(seen)
        y, found = self.attn(seen, mask, causal, rope, packed, first, offsets, attention), None
        if attention is not None:
            y, found = y
        y = self.ls1(y)
        if first is not None:
            if branches is not None and packed is not None:
                branches = packed.of_each(branches, first)
            x = x[:, :first] if packed is None else packed.of_each(x, first)
        if branches is not None:
            y = y * branches[..., :1]
        x = self._joined(y, x, by_attention)
        if self.post_norm:
            x = self.norm1(x)
        seen = x if by_mlp is None else by_mlp.of(x)
        y = self.ls2(self.mlp(seen if self.post_norm else self.norm2(seen)))
        if branches is not None:
            y = y * branches[..., 1:]
        x = self._joined(y, x, by_mlp)
        x = self.norm2(x) if self.post_norm else x
        return x if found is None else (x, found)

    def _joined(self, y: Tensor, x: Tensor, kept: Kept | None) -> Tensor:
        """A branch and the shortcut."""
        if kept is not None:
            return kept.added(x if self.shortcut is None else x * self.shortcut.to(x.dtype), y)
        return y + x if self.shortcut is None else torch.addcmul(y, x, self.shortcut.to(x.dtype))


@final
class ViT(Backbone):
    """A vision transformer for images of any size that is a multiple of the patch: positions are resized if the grid is
    not the configured one. Raises UserError for options and image sizes that do not fit together."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (ViT)."""

        dim: int
        """Width: number of channels of every token."""
        depth: int
        """Number of blocks."""
        heads: int
        """Number of attention heads; they share the width."""
        patch_size: int = 16
        """Side of a patch in pixels; it must divide the image's sides."""
        stem: Literal["linear", "hmlp"] = "linear"
        """How patches become tokens: linear, or hmlp (three steps with batch norm; each patch sees only itself)."""
        parallel_branches: int = 1
        """Number of parallel attentions, and of parallel MLPs, in each block. With 2, a ViT of half the depth has as many
        parameters."""
        mlp_ratio: float = 4.0
        """Hidden width of the MLP, as a multiple of the width."""
        swiglu: bool = False
        """Use gated MLPs (SwiGLU) with two thirds of the hidden width."""
        cls: bool = True
        """Use a class token."""
        registers: int = 0
        """Number of register tokens (Darcet et al. 2024)."""
        positions: Literal["learned", "sincos", "rope", "relative"] = "learned"
        """Positions: learned (a table), sincos (fixed sine-cosine; MAE), rope (axial rotary; DINOv3), or relative (a
        learned score of every offset in each block's attention; BEiT)."""
        shared_relative: bool = False
        """Use one table of relative positions for all blocks (BEiT in pretraining) instead of one for each."""
        rope_shift: float | None = None
        """In training, shift the coordinates of rope by up to this value on each axis (an image has the length 2; none: do
        not). One draw for each step."""
        rope_jitter: float | None = None
        """In training, stretch each axis of rope by a factor between 1 / this value and this value."""
        rope_rescale: float | None = None
        """In training, stretch both axes of rope by one factor between 1 / this value and this value (DINOv3: 2)."""
        pool: Literal["cls", "mean"] = "mean"
        """Vector of the whole image: the class token, or the mean of the patches."""
        qkv_bias: bool = True
        """Use biases for queries, keys and values."""
        k_bias: bool = True
        """With --qkv-bias, also for keys. BEiT and DINOv3 have none."""
        qk_norm: bool = False
        """Apply layer norm to queries and keys."""
        layer_scale: float | None = None
        """Initial value of LayerScale; none: no LayerScale."""
        drop_path: float = 0.0
        """Drop path rate (stochastic depth) of the last block; it rises linearly from 0 at the first."""
        drop_path_uniform: bool = False
        """Use the same drop path rate at all blocks (DINOv2) instead of a rising one."""
        drop_rows: bool = False
        """If the drop path rate is above 0.1, compute a branch only for the samples that keep it (DINOv2). This needs
        less time and memory and has the same mean. A fixed share of every 32 samples is kept."""
        shortcut_decay: float = 1.0
        """Factor on the identity shortcuts of the last block; it changes linearly from 1 at the first."""
        norms: Literal["patches", "post"] | None = None
        """Layer norms other than before each branch and at the end: patches (also on patch embeddings; AIM), or post
        (on the first tokens and after each branch, none at the end; data2vec 2.0)."""
        norm_eps: float | None = None
        """Epsilon of every norm (none: 1e-6; DINOv3 and AIMv2: 1e-5)."""
        rms_norm: bool = False
        """Use RMS norms in the place of layer norms (AIMv2)."""

        def __post_init__(self) -> None:
            within(self, POSITIVE, "dim", "depth", "heads", "patch_size", "mlp_ratio", "norm_eps")
            within(self, NOT_NEGATIVE, "registers", "layer_scale")
            within(self, FROM_0_BELOW_1, "drop_path")
            within(self, FROM_0_TO_1, "shortcut_decay")
            within(self, AT_LEAST_1, "parallel_branches", "rope_jitter", "rope_rescale")
            within(self, NOT_NEGATIVE, "rope_shift")

    supports = frozenset(
        {"keep", "replace", "attention", "blocks", "drop_path", "pooled_only", "maps", "attention_maps"}
    )

    def __init__(self, image_size: tuple[int, int], in_chans: int, config: Config) -> None:
        super().__init__()
        _validate(config, in_chans)
        height, width = image_size
        self.config, self.image_size, self.in_chans = config, (height, width), in_chans
        self.dim, self.depth, self.stride = config.dim, config.depth, (config.patch_size, config.patch_size)
        self.map_strides, self.map_channels = pyramid.strides(self.stride), (config.dim,) * len(pyramid.SCALES)
        self.grid = self._grid(height, width)
        self.prefix_tokens = int(config.cls) + config.registers
        dim, patches, share = config.dim, self.grid[0] * self.grid[1], 1 / max(config.depth - 1, 1)
        eps, post = NORM_EPS if config.norm_eps is None else config.norm_eps, config.norms == "post"

        # The weights keep torch's initialisation, as in DINO and timm: its deviation fits every patch size.
        stem: Any = HMLPStem if config.stem == "hmlp" else PatchEmbed
        self.patch_embed: PatchEmbed = stem(config.patch_size, in_chans, dim)
        for part in self.patch_embed.modules():
            if isinstance(part, nn.Conv2d) and part.bias is not None:
                nn.init.zeros_(part.bias)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if config.cls else None
        self.reg_tokens = nn.Parameter(torch.randn(1, config.registers, dim) * 0.02) if config.registers else None
        self.pos_embed: Tensor | None
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, int(config.cls) + patches, dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        elif config.positions == "sincos":
            table = F.pad(sincos_table(self.grid, dim), (0, 0, int(config.cls), 0))  # zero for the class token
            self.register_buffer("pos_embed", table[None])
        else:
            self.pos_embed = None
        offsets = Offsets.count(self.grid, self.prefix_tokens) if config.positions == "relative" else 0
        self.rel_pos_bias = OffsetTable(offsets, config.heads) if config.shared_relative else None
        # Of a training step; the loop sets it. Coordinates of rope change by it, and without one they do not.
        self.positions_key: int | None = None

        def block(i: int) -> Block:
            return Block(
                dim,
                config.heads,
                mlp_ratio=config.mlp_ratio,
                swiglu=config.swiglu,
                qkv_bias=config.qkv_bias,
                qk_norm=config.qk_norm,
                layer_scale=config.layer_scale,
                shortcut=1 + (config.shortcut_decay - 1) * i * share,
                post_norm=post,
                norm_eps=eps,
                rms_norm=config.rms_norm,
                offsets=0 if config.shared_relative else offsets,
                k_bias=config.k_bias,
            )

        count = config.parallel_branches
        self.blocks = nn.ModuleList(
            block(i) if count == 1 else ParallelBlock([block(i) for _ in range(count)]) for i in range(config.depth)
        )
        self.norm_pre = _norm(dim, eps, config.rms_norm) if config.norms else nn.Identity()
        self.norm = nn.Identity() if post else _norm(dim, eps, config.rms_norm)

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
        pooled_only: bool = False,
        maps: bool = False,
        attention_of: tuple[int, ...] = (),
        attention_logits: bool = False,
    ) -> Features:
        """See `Backbone.forward`. With `keep`, masks, causality and prefix lengths refer to the kept tokens in the
        requested order; the mask of `replace` refers to all N patches. Maps are resampled from `patches` (pyramid.py).
        The attention of blocks is computed again from their queries and keys, beside the kernel that the block uses.

        Raises UserError for images with another number of channels, for a size that the patch does not divide, for
        blocks that do not exist, for maps with `keep` and for the attention of blocks whose drop path leaves samples out
        (`drop_rows`), ValueError for an unknown attention, RuntimeError if the noise of drop path is missing.
        """
        if maps and keep is not None:
            raise UserError("maps are of whole images: ask for them without keep, which leaves patches out")
        x, grid = self._embedded(images, keep, replace)
        mask, causal = self._mask(attention, prefix_length, x.shape[1])
        factors, kept = self._drop_path([drop])
        rope = self._rope(grid, keep, x.device)
        first = None if mask is not None or causal else self._first(pooled_only and not maps, blocks + attention_of)
        offsets: Offsets | Tensor | None = None
        if self.config.positions == "relative":
            offsets = Offsets.of(self.grid, grid, self.prefix_tokens, keep, x.device)
            if self.rel_pos_bias is not None:
                offsets = self.rel_pos_bias(offsets)
            if causal:  # the kernels take that or scores to add
                mask, causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril(), False
        of_each = factors[0][:, None] if factors else None
        kind: Map = "logits" if attention_logits else "weights"
        x, outputs, found = self._through(
            x, blocks, mask, causal, rope, of_each, kept, None, first, offsets, attention_of, kind
        )
        features = self._features(x, grid, outputs)
        features.attention = found
        if maps:
            features.maps = pyramid.simple_pyramid(features.patches.mT.unflatten(2, grid))
        return features

    def forward_crops(self, batches: Sequence[tuple[Tensor, dict[str, Any]]]) -> list[Features]:
        """See `Backbone.forward_crops`. The tokens of all batches are one sequence for norms, matrices and MLPs, and
        separate only in attention. This halves the kernels of two forward passes, and with sharded parameters (FSDP)
        the gathering. With masked attention and relative positions batches are encoded one after another, because
        packed attention cannot add scores."""
        wanted_blocks = [options.get("blocks", ()) for _, options in batches]
        wanted = [options.get("pooled_only", False) for _, options in batches]
        known = {"keep", "replace", "blocks", "drop", "pooled_only"}
        plain = self.config.positions != "relative" and all(not options.keys() - known for _, options in batches)
        if len(batches) < 2 or not plain or len(set(wanted_blocks)) > 1:
            return super().forward_crops(batches)

        rows, grids, ropes = [], [], []
        for images, options in batches:
            x, grid = self._embedded(images, options.get("keep"), options.get("replace"))
            rows.append(x)
            grids.append(grid)
            ropes.append(self._rope(grid, options.get("keep"), x.device))
        device, head = rows[0].device, self.dim // self.config.heads
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else rows[0].dtype
        packed = Packed.of([(len(x), x.shape[1]) for x in rows], device, dtype, head)

        def by_token(each: Sequence[Tensor]) -> Tensor:
            """Values (B or 1, L or 1, ...) of each batch, expanded to all tokens: (1, T, ...)."""
            shaped = zip(each, packed.batches, strict=True)
            return torch.cat([part.expand(*shape, *part.shape[2:]).flatten(0, 1) for part, shape in shaped])[None]

        rope = None
        if self.config.positions == "rope":
            cosines, sines = zip(*(pair for pair in ropes if pair is not None), strict=True)
            cos, sin = (by_token([part[:, 0] for part in parts]) for parts in (cosines, sines))
            rope = cos[:, None], sin[:, None]
        factors, kept = self._drop_path([options.get("drop") for _, options in batches], packed)
        of_each = by_token([part[:, None] for part in factors]) if factors else None
        # Kept samples in a packed sequence have no `first`: the last block is then computed for all tokens of fewer
        # images.
        first = None if kept else self._first(all(wanted), wanted_blocks[0])
        x, outputs, _ = self._through(by_token(rows), wanted_blocks[0], None, False, rope, of_each, kept, packed, first)
        shapes = packed.batches if first is None else tuple((images, 1) for images, _ in packed.batches)
        sizes = [images * length for images, length in shapes]
        parts = zip(*(whole[0].split(sizes) for whole in (x, *outputs)), shapes, grids, strict=True)
        return [
            self._features(part.unflatten(0, shape), grid, tuple(each.unflatten(0, shape) for each in of_blocks))
            for part, *of_blocks, shape, grid in parts
        ]

    def _embedded(
        self, images: Tensor, keep: Tensor | None, replace: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[int, int]]:
        """The tokens (B, L, D) that enter the first block, and the grid."""
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        grid = self._grid(images.shape[2], images.shape[3])
        uncounted = (replace[0],) if replace is not None and self.config.stem == "hmlp" else ()  # not in its statistics
        x = self.patch_embed(images, keep, *uncounted)
        if self.config.norms == "patches":
            x = self.norm_pre(x)
        if replace is not None:
            masked, token = replace
            if keep is not None:
                masked = masked.gather(1, keep)
            x = torch.where(masked[:, :, None], token.to(x.dtype), x)
        x = self._positioned(x, grid, keep)
        return (self.norm_pre(x) if self.config.norms == "post" else x), grid

    def _through(
        self,
        x: Tensor,
        wanted: tuple[int, ...],
        mask: Tensor | None,
        causal: bool,
        rope: Rope | None,
        factors: Tensor | None,
        kept: Sequence[tuple[Kept, Kept]],
        packed: Packed | None = None,
        first: int | None = None,
        offsets: Offsets | Tensor | None = None,
        attention_of: tuple[int, ...] = (),
        kind: Map = "weights",
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Tokens (B, L, D) or (1, T, D) after the blocks and the final norm (with `first` only an image's first ones),
        those after the wanted blocks without that norm, and the attention of the blocks `attention_of`. Drop path:
        `factors` (B, 1, 2 n) or (1, T, 2 n) of the first n blocks or None, and the samples that are `kept` by the
        branches of the last ones."""
        indices, of_attention = [self._block(i) for i in wanted], [self._block(i) for i in attention_of]
        outputs: dict[int, Tensor] = {}
        found: dict[int, Tensor] = {}
        by_rows = self.depth - len(kept)  # the first block that computes kept samples only
        width = 2 * self.config.parallel_branches
        if any(i >= by_rows for i in of_attention):
            raise UserError("attention maps are of all images, and --drop-rows leaves some out: give --no-drop-rows")
        for i, block in enumerate(self.blocks):
            branches = None if factors is None or i >= by_rows else factors[..., width * i : width * (i + 1)]
            pair = kept[i - by_rows] if i >= by_rows else None
            some = first if i == self.depth - 1 else None
            if i in of_attention:
                x, found[i] = block(x, mask, causal, rope, branches, packed, some, offsets, pair, kind)
            else:
                x = block(x, mask, causal, rope, branches, packed, some, offsets, pair)
            if i in indices:
                outputs[i] = x
        return self.norm(x), tuple(outputs[i] for i in indices), tuple(found[i] for i in of_attention)

    def _first(self, pooled_only: bool, blocks: tuple[int, ...]) -> int | None:
        """Number of tokens that the last block must compute: only the class token if nothing else is used."""
        pools_one = self.config.cls and self.config.pool == "cls"
        return 1 if pooled_only and pools_one and not blocks else None

    def _features(self, x: Tensor, grid: tuple[int, int], outputs: tuple[Tensor, ...]) -> Features:
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        cls = prefix[:, 0] if self.config.cls else None
        return Features(
            cls=cls,
            patches=patches,
            grid=grid,
            pooled=cls if cls is not None and self.config.pool == "cls" else patches.mean(1),
            prefix=prefix if self.prefix_tokens else None,
            blocks=outputs,
            tokens=x if self.prefix_tokens else None,
        )

    def layer_of(self, parameter: str) -> int:
        """See `Backbone.layer_of`. Raises KeyError for an unknown parameter."""
        part, _, rest = parameter.partition(".")
        if part == "blocks":
            return int(rest.partition(".")[0]) + 1
        stem = ("patch_embed", "cls_token", "reg_tokens", "pos_embed", "rel_pos_bias", "norm_pre")
        return {**dict.fromkeys(stem, 0), "norm": self.depth + 1}[part]

    def adapt(self, weights: dict[str, Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """See `Backbone.adapt`: position tables are resized to this encoder's grid, with antialiasing where it is
        smaller."""
        if image_size == self.image_size:
            return weights
        of, tokens = self._grid(*image_size), int(self.config.cls)
        adapted = {
            name: resize_offsets(table, of, self.grid, antialias=True)
            for name, table in weights.items()
            if name.endswith("relative_position_bias_table")
        }
        if (table := weights.get("pos_embed")) is not None:
            resized = resize_table(table[:, tokens:], of, self.grid, antialias=True)
            adapted["pos_embed"] = torch.cat([table[:, :tokens], resized], dim=1)
        return weights | adapted

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """The grid (h, w) of patches of an image of height x width pixels."""
        return patch_grid(height, width, self.config.patch_size)

    def _positioned(self, x: Tensor, grid: tuple[int, int], keep: Tensor | None) -> Tensor:
        """Patch embeddings (B, N or K, D) with their positions, after the prefix tokens: (B, L, D)."""
        # The residual stream has the precision of the parameters, also under autocast, with or without prefix tokens.
        proj: Any = self.patch_embed.proj
        first: Any = proj[0] if isinstance(proj, nn.Sequential) else proj
        x = x.to(first.weight.dtype)
        cls: Tensor | None = self.cls_token
        if self.pos_embed is not None:
            tokens = int(self.config.cls)
            table = resize_table(self.pos_embed[:, tokens:], self.grid, grid)
            x = x + (table if keep is None else F.embedding(keep, table[0]))
            cls = None if cls is None else cls + self.pos_embed[:, :1]
        # Not len(x), which is a number also where a program for any batch is made (torch.export).
        prefix = [token.expand(x.shape[0], -1, -1) for token in (cls, self.reg_tokens) if token is not None]
        return torch.cat([*prefix, x], dim=1) if prefix else x

    def _mask(self, attention: str | Tensor, prefix_length: Tensor | None, length: int) -> tuple[Tensor | None, bool]:
        """Arguments of `attend`: a mask (B or 1, 1, L, L) or None, and whether attention is causal without a mask."""
        if isinstance(attention, Tensor):
            if attention.ndim != 3 or attention.shape[1:] != (length, length):
                raise ValueError(f"the attention mask must be (B or 1, {length}, {length}), not {(*attention.shape,)}")
            return attention[:, None], False
        if attention == "prefix":
            if prefix_length is None:
                raise ValueError('attention="prefix" needs prefix_length')
            return prefix_mask(prefix_length, length - self.prefix_tokens, self.prefix_tokens), False
        if attention not in ("full", "causal"):
            raise ValueError(f"attention is {attention!r}; it must be full, causal, prefix or a bool mask")
        return None, attention == "causal"

    @property
    def moves_positions(self) -> bool:
        """Whether the coordinates of patches change in training."""
        config = self.config
        changes = config.rope_shift is not None or config.rope_jitter is not None or config.rope_rescale is not None
        return config.positions == "rope" and changes

    def _rope(self, grid: tuple[int, int], keep: Tensor | None, device: torch.device) -> Rope | None:
        """Rotary positions, each (1 or B, 1, L, d / 2); prefix tokens have angle 0, that is no rotation."""
        if self.config.positions != "rope":
            return None
        config, change = self.config, None
        # Where nothing moves, the key is not read: a compiler would compile again for each.
        if self.training and self.moves_positions and self.positions_key is not None:
            change = augmented(self.positions_key, grid, config.rope_shift, config.rope_jitter, config.rope_rescale)
        angles = rope_angles(grid, self.dim // config.heads, device, change)
        angles = angles[None] if keep is None else angles[keep]
        angles = F.pad(angles, (0, 0, self.prefix_tokens, 0))[:, None]
        return angles.cos(), angles.sin()

    def _drop_path(
        self, drops: Sequence[Tensor | None], packed: Packed | None = None
    ) -> tuple[list[Tensor], list[tuple[Kept, Kept]]]:
        """Drop path from one batch's noise (B, 2 * depth), or from that of each packed batch: factors (B, 2 n) of each
        batch for the branches of the first n blocks, and the samples (or packed tokens) for which the branches of each
        later block are computed. Empty lists if nothing is dropped."""
        top = self.config.drop_path
        if not self.training or top == 0:
            return [], []
        count = self.config.parallel_branches
        noises = [given(drop, self.depth) for drop in drops]
        noises = noises if count == 1 else [spread(noise, count) for noise in noises]
        bottom = top if self.config.drop_path_uniform else 0.0
        steps = max(self.depth - 1, 1)
        rates = [bottom + (top - bottom) * i / steps for i in range(self.depth) for _ in range(2 * count)]
        by_rows = next((i for i, rate in enumerate(rates) if self.config.drop_rows and rate > ROWS_ABOVE), len(rates))
        factors = []
        if by_rows:
            at = torch.linspace(bottom, top, self.depth, device=noises[0].device).repeat_interleave(2 * count)
            factors = [drop_factors(noise[:, :by_rows], at[:by_rows]) for noise in noises]
        later, of_later = [noise[:, by_rows:] for noise in noises], rates[by_rows:]
        if not of_later:
            return factors, []
        each = kept_samples(later[0], of_later) if packed is None else kept_tokens(later, packed, of_later)
        return factors, list(zip(each[::2], each[1::2], strict=True))


def _validate(config: ViT.Config, in_chans: int) -> None:
    """Raise UserError for options that do not fit together."""
    if in_chans <= 0:
        raise UserError(f"--in-chans is {in_chans}; it must be above 0")
    if config.dim % config.heads:
        fits = [heads for heads in range(1, config.dim + 1) if config.dim % heads == 0]
        near = min(fits, key=lambda heads: abs(heads - config.heads))
        raise UserError(f"--heads {config.heads} must divide --dim {config.dim}; {near} does")
    if config.positions == "sincos" and config.dim % 4:
        raise UserError(f"--positions sincos needs a --dim that is a multiple of 4, not {config.dim}")
    if config.positions == "rope" and config.dim // config.heads % 4:
        head = config.dim // config.heads
        raise UserError(f"--positions rope needs a head width (--dim / --heads) that is a multiple of 4, not {head}")
    if config.parallel_branches > 1 and (config.norms == "post" or config.shortcut_decay != 1 or config.drop_rows):
        raise UserError(
            "--parallel-branches does not go with --norms post, --shortcut-decay and --drop-rows: leave these out"
        )
    if config.shared_relative and config.positions != "relative":
        raise UserError(f"--shared-relative is of --positions relative, not of {config.positions}")
    changes = ("rope_shift", "rope_jitter", "rope_rescale")
    if config.positions != "rope" and (given_ := [name for name in changes if getattr(config, name) is not None]):
        raise UserError(f"--{given_[0].replace('_', '-')} is of --positions rope, not of {config.positions}")
    if config.pool == "cls" and not config.cls:
        raise UserError("--pool cls needs a class token (--cls); without one, --pool mean")
