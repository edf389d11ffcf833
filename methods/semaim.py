"""SemAIM (Song et al., "Semantic-Aware Autoregressive Image Modeling for Visual Representation Learning", AAAI 2024).

Patches are predicted one after another, in an order of similarity to the image's main content. There are two streams,
as in XLNet. The content stream (the encoder) sees a patch and all before it. The query stream (the decoder) gets the
position of the next patch and attends to the content of the patches before it. Shapes: B images, N patches, p patch
side, D encoder width, E decoder width, F = p * p * C values a patch.
"""

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain.backbones.attention import attend
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.backbones.positions import sincos_table
from ssl_pretrain.backbones.vit import Mlp
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, POSITIVE, within
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.masks import put, rows
from ssl_pretrain.parts.patches import moments, normalise, patchify, unpatchify
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


class CrossBlock(nn.Module):
    """A pre-norm block of the query stream: queries attend to content, not to one another; then an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm_content = nn.LayerNorm(dim, eps=1e-6)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, content: Tensor) -> Tensor:
        """Queries (B, L, E) to (B, L, E); query i sees the content (B, L, E) of the places 0 to i."""
        q = self.q(self.norm1(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm_content(content)).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(attend(q, k, v, causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@final
class SemAIM(Method):
    """Predict each patch's blurred pixels from those before it in a semantic order; the loss is the mean squared error.

    With pixels as targets (section 3). Raises UserError for options out of range and images of a single patch,
    UnsupportedByBackbone for an encoder that cannot reorder its tokens or mask its attention.
    """

    decoder_pos_embed: Tensor

    recipe = Recipe(
        lr=1.5e-4,
        lr_batch=256,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        warmup=40 / 800,
        encoder={"positions": "sincos", "cls": False, "pool": "mean"},
        small={"lr": 1e-3, "decoder_dim": 128, "decoder_depth": 2, "decoder_heads": 4, "norm_pix": False, "steps": 70},
        tiny={"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Semantic-aware autoregressive image model (SemAIM)."""

        order: Literal["semantic", "raster", "random", "centre"] = "semantic"
        """Order of the patches: by similarity to the patch that is most similar to the whole image; row by row; random;
        or from the centre of the image outwards."""
        decoder_dim: int | None = None
        """Width of the query stream (default: by the encoder; 512 from ViT-B on)."""
        decoder_depth: int | None = None
        """Number of blocks of the query stream (default: by the encoder; 8 from ViT-B on)."""
        decoder_heads: int | None = None
        """Number of attention heads of the query stream (default: by the encoder; 16 from ViT-B on)."""
        norm_pix: bool = True
        """Predict each patch's pixels normalised by their own mean and variance."""
        blur_kernel: int = 9
        """Kernel size in pixels of the Gaussian that blurs the targets; odd; 1: no blur."""
        blur_sigma: float = 1.0
        """Standard deviation of that Gaussian in pixels."""
        crop_scale: tuple[float, float] = (0.2, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, AT_LEAST_1, "decoder_dim", "decoder_depth", "decoder_heads", "blur_kernel")
            within(self, POSITIVE, "blur_sigma")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("semaim", "keep", "attention")
        self.grid = self._grid(encoder.image_size)
        if self.grid[0] * self.grid[1] < 2:
            raise UserError("semaim needs images of at least two patches: raise --image-size or lower --patch-size")
        width = self.config.decoder_dim
        if width % self.config.decoder_heads or width % 4:
            raise UserError(
                f"--decoder-dim {width} must be a multiple of 4 and of --decoder-heads {self.config.decoder_heads}"
            )
        side = min(encoder.image_size)
        if config.blur_kernel % 2 == 0 or not 1 <= config.blur_kernel < 2 * side:
            raise UserError(f"--blur-kernel is {config.blur_kernel}; it must be odd, from 1 to {2 * side - 1}")
        self.decoder_embed = nn.Linear(encoder.dim, width)
        self.query_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_blocks = nn.ModuleList(
            CrossBlock(width, self.config.decoder_heads) for _ in range(self.config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, encoder.stride[0] * encoder.stride[1] * encoder.in_chans)
        self.register_buffer("decoder_pos_embed", sincos_table(self.grid, width), persistent=False)
        nn.init.trunc_normal_(self.query_token, std=0.02)
        for part in (self.decoder_embed, self.decoder_pred, *self.decoder_blocks.modules()):
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        width = config.decoder_dim or sizes.width(512, encoder.dim, multiple=32)
        return {
            "decoder_dim": width,
            "decoder_depth": sizes.depth(8, encoder.depth),
            "decoder_heads": sizes.heads(16, width, encoder.dim),
        }

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped; no colour (as MAE's)."""
        return (ViewSpec(name="image", size=image_size, scale=config.crop_scale),)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """Loss over batch.views["image"] (B, C, H, W): the mean over all patches except the first of each order.
        `per_sample` (B,) is the loss of each image."""
        images = batch.views["image"]
        order = self.order(images, step)
        predicted = self.predict(images, order, step)
        target = patchify(self.blurred(images), self.encoder.stride)
        if self.config.norm_pix:
            target = normalise(target)
        per_sample = (predicted.float() - rows(target, order[:, 1:])).square().mean(dim=(1, 2))
        return Losses(total=per_sample.mean(), per_sample=per_sample.detach())

    @torch.no_grad()
    def order(self, images: Tensor, step: Step) -> Tensor:
        """The patches in the order in which they are predicted, (B, N) int64 (section 3.2).

        "semantic" uses the encoder's features with full attention: patches are sorted by falling cosine similarity to
        the patch that is most similar to the pooled vector.
        """
        h, w = self._grid((images.shape[-2], images.shape[-1]))
        if self.config.order == "random":
            return step.rand(h * w).argsort(1)
        if self.config.order == "semantic":
            features = encode(self.encoder, images, step)
            patches = F.normalize(features.patches.float(), dim=-1)
            most = (patches @ F.normalize(features.pooled.float(), dim=-1)[:, :, None]).argmax(1, keepdim=True)
            alike = patches @ rows(patches, most.squeeze(2)).transpose(1, 2)  # (B, N, 1)
            return alike.squeeze(2).argsort(dim=1, descending=True, stable=True)
        late = torch.arange(h * w, device=images.device)
        if self.config.order == "centre":
            distance = (late // w - (h - 1) / 2).square() + (late % w - (w - 1) / 2).square()
            late = distance.argsort(stable=True)
        return late.expand(len(images), -1)

    def predict(self, images: Tensor, order: Tensor, step: Step) -> Tensor:
        """Predictions (B, N - 1, F) of the patches order[:, 1:], each from all those before it.

        In this order a patch may attend to what comes before it, so both streams use causal attention.
        """
        grid = self._grid((images.shape[-2], images.shape[-1]))
        positions = self.decoder_pos_embed
        if grid != self.grid:
            positions = sincos_table(grid, self.config.decoder_dim).to(images.device)
        content = self.decoder_embed(encode(self.encoder, images, step, keep=order, attention="causal").patches[:, :-1])
        x = (self.query_token + F.embedding(order[:, 1:], positions)).to(content.dtype)
        for block in self.decoder_blocks:
            x = block(x, content)
        return self.decoder_pred(self.decoder_norm(x))

    def blurred(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) through the Gaussian, mirrored at the edges; float32."""
        half = self.config.blur_kernel // 2
        along = torch.arange(-half, half + 1, device=images.device) / self.config.blur_sigma
        weights = torch.softmax(-along.square() / 2, dim=0)
        with torch.autocast(images.device.type, enabled=False):
            x = F.pad(images.float(), (half, half, half, half), mode="reflect").flatten(0, 1)[:, None]
            x = F.conv2d(F.conv2d(x, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
        return x.view(images.shape)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """With normalised pixels, the loss of painting every patch in its mean colour."""
        if not self.config.norm_pix:
            return {}
        values = self.decoder_pred.out_features
        return {"loss": ((values - 1) / values, "every patch is predicted as its mean colour; nothing is learned")}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The input, the place of each patch in the order (bright: early), and the predictions, (n, C, H, W).
        Predictions of normalised targets get their mean and variance. The first patch, which is not predicted, is
        shown as it is."""
        images = batch.views["image"]
        order = self.order(images, step)
        predicted = self.predict(images, order, step).float()
        target = patchify(self.blurred(images), self.encoder.stride)
        if self.config.norm_pix:
            mean, deviation = moments(rows(target, order[:, 1:]))
            predicted = predicted * deviation + mean
        grid = self._grid((images.shape[-2], images.shape[-1]))
        early = torch.linspace(1, -1, order.shape[1], device=images.device).expand_as(order)
        shade = torch.zeros_like(early).scatter(1, order, early)[:, :, None].expand_as(target)
        return {
            "input": images,
            "order": unpatchify(shade, self.encoder.stride, grid),
            "prediction": unpatchify(put(target, order[:, 1:], predicted), self.encoder.stride, grid),
        }

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid (h, w) of an image of that height and width in pixels."""
        return size[0] // self.encoder.stride[0], size[1] // self.encoder.stride[1]
