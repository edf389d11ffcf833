"""AIM (El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image Models", ICML 2024).

Patches are in raster order. From each patch beyond a prefix, and all patches before it, the pixels of the next patch
are predicted. Shapes: B images, C channels, N patches, p patch side, D encoder width, E width of the head,
F = p * p * C values a patch.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.backbones.positions import sincos_table
from ssl_pretrain.backbones.vit import Mlp
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, NOT_NEGATIVE, within
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.patch_orders import Order, patch_order
from ssl_pretrain.parts.patches import moments, normalise, patchify, unpatchify, without
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


class ResidualMlp(nn.Module):
    """x + MLP(LayerNorm(x)): a block of the head, which looks at each token alone (section 3.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) to (..., E)."""
        return x + self.mlp(self.norm(x))


@final
class AIM(Method):
    """Predict the next patch; the mean squared error of normalised pixels beyond the prefix is the loss (section 3.1).

    Attention is causal, but bidirectional within a prefix of random length. So the encoder is also trained with the
    bidirectional attention that evaluation uses (section 3.2, "prefix Transformer"). Raises UnsupportedByBackbone for
    an encoder without attention masks, UserError for images of a single patch.
    """

    head_pos_embed: Tensor

    recipe = Recipe(
        lr=1e-3,
        lr_batch=4096,
        lr_scaling="linear",
        betas=(0.9, 0.95),
        weight_decay=0.05,
        clip_grad=1.0,
        warmup=31250 / 500000,
        encoder={"positions": "sincos", "cls": False, "pool": "mean", "qkv_bias": False},
        # Plain pixels: classes of the built-in images differ mainly by colour, which normalised patches do not contain.
        small={"lr": 1e-3, "head_dim": 128, "head_depth": 2, "norm_pix": False, "steps": 100},
        tiny={"head_dim": 32, "head_depth": 1},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Autoregressive image model (AIM)."""

        head_dim: int | None = None
        """Width of the prediction head (default: by the encoder; 2,048 from ViT-B on)."""
        head_depth: int | None = None
        """Number of residual MLP blocks of the prediction head (default: by the encoder; 12 from ViT-B on)."""
        norm_pix: bool = True
        """Predict each patch's pixels normalised by their own mean and variance."""
        patch_order: Order = "row"
        """Order in which patches are predicted: row (raster order), column, snake, diagonal, spiral or hilbert."""
        crop_scale: tuple[float, float] = (0.4, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, AT_LEAST_1, "head_dim")
            within(self, NOT_NEGATIVE, "head_depth")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("aim", "attention")
        if config.patch_order != "row":
            encoder.require("aim --patch-order", "keep")
        height, width = encoder.image_size
        self.grid = (height // encoder.stride[0], width // encoder.stride[1])
        if self.grid[0] * self.grid[1] < 2:
            raise UserError("aim needs images of at least two patches: raise --image-size or lower --patch-size")
        if self.config.head_dim % 4:
            raise UserError(f"--head-dim {self.config.head_dim} must be a multiple of 4")
        values = encoder.stride[0] * encoder.stride[1] * encoder.in_chans
        self.head_embed = nn.Linear(encoder.dim, self.config.head_dim)
        self.head_blocks = nn.ModuleList(ResidualMlp(self.config.head_dim) for _ in range(self.config.head_depth))
        self.head_norm = nn.LayerNorm(self.config.head_dim, eps=1e-6)
        self.head_pred = nn.Linear(self.config.head_dim, values)
        self.register_buffer("head_pos_embed", sincos_table(self.grid, self.config.head_dim)[None], persistent=False)
        for part in (self.head_embed, self.head_pred, *self.head_blocks.modules()):
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {
            "head_dim": sizes.width(2048, encoder.dim, multiple=64),
            "head_depth": sizes.depth(12, encoder.depth),
        }

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped (appendix, table of the pre-training hyperparameters)."""
        return (ViewSpec(name="image", size=image_size, scale=config.crop_scale),)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """Loss over batch.views["image"] (B, C, H, W): the mean over all patches beyond the prefixes of the global batch.
        The mean of `per_sample` (B,) is the loss."""
        images = batch.views["image"]
        predicted, prefixes = self.predict(images, step)
        target = self.ordered(patchify(images, self.encoder.stride).float(), images)
        if self.config.norm_pix:
            target = normalise(target)
        errors = (
            (predicted.float() - target[:, 1:]).square().mean(-1)
        )  # (B, N - 1): of patches 1 to N - 1, in their order
        patches = target.shape[1]
        wanted = torch.arange(1, patches, device=images.device) >= prefixes[step.rows, None]
        counted = (patches - prefixes).float().mean()  # the global batch's: equal weights on all ranks
        per_sample = (errors * wanted).sum(1) / counted
        return Losses(total=per_sample.mean(), per_sample=per_sample.detach())

    def predict(self, images: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Predictions (B, N - 1, F) of the patches 1 to N - 1 of the order, and the prefix lengths of the global batch,
        uniform in 1 ... N - 1."""
        p, q = self.encoder.stride
        grid = (images.shape[-2] // p, images.shape[-1] // q)
        patches = grid[0] * grid[1]
        prefixes = 1 + (step.shared_rand(step.batch_size) * (patches - 1)).long()
        own = prefixes[step.rows]
        order = self.order(images)
        keep = {} if order is None else {"keep": order.expand(len(images), -1)}
        tokens = encode(self.encoder, images, step, attention="prefix", prefix_length=own, **keep).patches[:, :-1]
        positions = self.head_pos_embed
        if grid != self.grid:
            positions = sincos_table(grid, self.config.head_dim)[None].to(images.device)
        positions = self.ordered(positions, images)
        x = self.head_embed(tokens)
        x = x + positions[:, :-1].to(x.dtype)
        for block in self.head_blocks:
            x = block(x)
        return self.head_pred(self.head_norm(x)), prefixes

    def order(self, images: Tensor) -> Tensor | None:
        """The order of the patches of images (B, C, H, W), (N,) int64; None for raster order."""
        if self.config.patch_order == "row":
            return None
        grid = (images.shape[-2] // self.encoder.stride[0], images.shape[-1] // self.encoder.stride[1])
        return patch_order(self.config.patch_order, grid).to(images.device, non_blocking=True)

    def ordered(self, rows: Tensor, images: Tensor) -> Tensor:
        """Rows (B, N, ...) of patches in raster order, in the order in which they are predicted."""
        order = self.order(images)
        return rows if order is None else rows.index_select(1, order)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """With normalised pixels, the loss of painting every patch in its mean colour."""
        if not self.config.norm_pix:
            return {}
        values = self.head_pred.out_features
        return {"loss": ((values - 1) / values, "every patch is predicted as its mean colour; nothing is learned")}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The input, its prefix, and each patch as predicted from the patches before it, (n, C, H, W). The loss counts the
        patches beyond the prefix. Predictions of normalised targets get the true mean and variance. The first patch,
        which is not predicted, is shown as it is."""
        images = batch.views["image"]
        predicted, prefixes = self.predict(images, step)
        patches = self.ordered(patchify(images, self.encoder.stride).float(), images)
        predicted = predicted.float()
        if self.config.norm_pix:
            mean, deviation = moments(patches[:, 1:])
            predicted = predicted * deviation + mean
        grid = tuple(size // side for size, side in zip(images.shape[-2:], self.encoder.stride, strict=True))
        painted = torch.cat([patches[:, :1], predicted], dim=1)
        beyond = torch.arange(patches.shape[1], device=images.device) >= prefixes[step.rows, None]
        order = self.order(images)
        if order is not None:
            back = order.argsort()
            painted, beyond = painted.index_select(1, back), beyond.index_select(1, back)
        return {
            "input": images,
            "prefix": without(images, beyond, self.encoder.stride),
            "prediction": unpatchify(painted, self.encoder.stride, (grid[0], grid[1])),
        }
