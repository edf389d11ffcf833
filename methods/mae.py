"""Masked autoencoders (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022).

Most patches are masked. The encoder sees only the others. A small decoder reconstructs the masked ones from its output.
Shapes: B images, C channels, N patches on an (h, w) grid, K of them kept, M = N - K masked, p patch side, D encoder
width, E decoder width, F = p * p * C values a patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.backbones.positions import sincos_table
from ssl_pretrain.backbones.vit import Block
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, BETWEEN_0_AND_1, NOT_NEGATIVE, POSITIVE, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import anchor, sizes
from ssl_pretrain.parts.init import xavier_
from ssl_pretrain.parts.masks import put, random_masking, rows
from ssl_pretrain.parts.patches import moments, normalise, patchify, unpatchify
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class MAE(Method):
    """Reconstruct the pixels of masked patches; the mean squared error over masked patches is the loss (eq. in section 3).

    Defaults are the paper's pre-training setting (appendix A.1, table 8). Raises UserError for options out of range and
    UnsupportedByBackbone for an encoder that cannot drop tokens.
    """

    decoder_pos_embed: Tensor

    recipe = Recipe(
        lr=1.5e-4,
        lr_batch=256,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        warmup=40 / 800,
        encoder={"positions": "sincos"},
        # The class token separates the fractals' classes much earlier in training than the mean of the patches does.
        small={"lr": 2e-3, "decoder_dim": 128, "decoder_depth": 1, "decoder_heads": 4, "pool": "cls"},
        tiny={"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Masked autoencoder (MAE)."""

        mask_ratio: float = 0.75
        """Masking ratio: share of the patches that are removed before the encoder."""
        norm_pix: bool = True
        """Reconstruct each patch's pixels normalised by their own mean and variance."""
        decoder_dim: int | None = None
        """Width of the decoder (default: by the encoder; 512 from ViT-B on)."""
        decoder_depth: int | None = None
        """Number of decoder blocks (default: by the encoder; 8 from ViT-B on)."""
        decoder_heads: int | None = None
        """Number of attention heads of the decoder (default: by the encoder; 16 from ViT-B on)."""
        crop_scale: tuple[float, float] = (0.2, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        anchor: Literal["none", "gram", "features", "weights"] = "none"
        """Loss that keeps the encoder near the start weights of --init-from (or near --teacher): the similarities between
        patches (Gram matrices), the features, the weights, or none."""
        anchor_weight: float = 1.0
        """Weight of the anchor's loss."""
        anchor_zoom: float = 1.0
        """Side of the images that the anchor's frozen network sees, over that of the crops (DINOv3's Gram teacher: 2)."""

        def __post_init__(self) -> None:
            within(self, BETWEEN_0_AND_1, "mask_ratio")
            within(self, AT_LEAST_1, "decoder_dim", "decoder_depth", "decoder_heads")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)
            within(self, NOT_NEGATIVE, "anchor_weight")
            within(self, POSITIVE, "anchor_zoom")

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("mae", "keep")
        self.anchor: anchor.Anchor | None = None
        width, heads = self.config.decoder_dim, self.config.decoder_heads
        if width % heads or width % 4:
            raise UserError(f"--decoder-dim {width} must be a multiple of 4 and of --decoder-heads {heads}")
        (h, w), (p, q) = encoder.image_size, encoder.stride
        self.grid = (h // p, w // q)
        if self.kept(self.grid[0] * self.grid[1]) < 1:
            raise UserError(
                f"--mask-ratio {config.mask_ratio} leaves none of the {self.grid[0]} x {self.grid[1]} patches"
            )
        values = encoder.stride[0] * encoder.stride[1] * encoder.in_chans
        self.decoder_embed = nn.Linear(encoder.dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_blocks = nn.ModuleList(Block(width, heads) for _ in range(self.config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, values)
        self.register_buffer("decoder_pos_embed", sincos_table(self.grid, width)[None], persistent=False)

        xavier_(self)
        nn.init.normal_(self.mask_token, std=0.02)
        for name, parameter in encoder.named_parameters():
            if name.endswith("cls_token"):
                nn.init.normal_(parameter, std=0.02)

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The start weights, for an anchor."""
        return anchor.networks(config.anchor)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the frozen network of an anchor."""
        self.anchor = anchor.make(self.config.anchor, self.encoder, networks)

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
        """One random resized crop with flips and no colour augmentation (section 4, "data augmentation")."""
        image = ViewSpec(name="image", size=image_size, scale=config.crop_scale)
        return (image, *anchor.twins(config.anchor, [image], config.anchor_zoom))

    def kept(self, patches: int) -> int:
        """How many of `patches` patches the encoder sees: rounded down, as released."""
        return int(patches * (1 - self.config.mask_ratio))

    def forward(self, batch: Batch, step: Step) -> Losses:
        """Loss over batch.views["image"] (B, C, H, W); `per_sample` is each image's mean over its masked patches."""
        images = batch.views["image"]
        predicted, masked, _, _ = self.reconstruct(images, step)
        target = rows(patchify(images, self.encoder.stride), masked).float()
        if self.config.norm_pix:
            target = normalise(target)
        # Every image has the same number of masked patches: the mean over all is the paper's sum(loss * mask) / sum(mask).
        predicted = predicted.float()
        per_sample = F.mse_loss(predicted.detach(), target, reduction="none").mean(dim=(1, 2))
        losses = Losses(total=F.mse_loss(predicted, target), per_sample=per_sample)
        if self.anchor is not None:
            losses.terms["reconstruction"] = losses.total.detach()
            each = None
            if self.anchor.sees:  # a second pass over the whole image, because the first one saw a part of it
                each = self.anchor(encode(self.encoder, images, step), batch.views["image_anchor"])
            self.anchor.add(losses, self.config.anchor_weight, each)
        return losses

    def reconstruct(self, images: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Predictions (B, M, F) for the masked patches, their indices (B, M), the kept ones' (B, K), and the grid."""
        p, q = self.encoder.stride
        grid = (images.shape[-2] // p, images.shape[-1] // q)
        patches = grid[0] * grid[1]
        keep, masked = random_masking(step.rand(patches), self.kept(patches))
        seen = encode(self.encoder, images, step, keep=keep)

        positions = self.decoder_pos_embed
        if grid != self.grid:
            positions = sincos_table(grid, self.config.decoder_dim)[None].to(images.device)
        # Prefix tokens take part in the decoder's attention, but have no position.
        tokens = self.decoder_embed(seen.patches if seen.tokens is None else seen.tokens)
        prefix, tokens = tokens.split([tokens.shape[1] - keep.shape[1], keep.shape[1]], dim=1)
        tokens = tokens + F.embedding(keep, positions[0]).to(tokens.dtype)
        masked_tokens = (self.mask_token + F.embedding(masked, positions[0])).to(tokens.dtype)
        # The order does not matter, because positions are added as embeddings. Masked tokens come first, so that the
        # last block can compute its outputs for them alone.
        x = torch.cat([masked_tokens, prefix, tokens], dim=1)
        *others, last = self.decoder_blocks
        for block in others:
            x = block(x)
        x = last(x, first=masked.shape[1])
        return self.decoder_pred(self.decoder_norm(x)), masked, keep, grid

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """With normalised pixels, the loss of painting every patch in its mean colour."""
        if not self.config.norm_pix:
            return {}
        values = self.decoder_pred.out_features
        name = "loss" if self.config.anchor == "none" else "reconstruction"
        return {name: ((values - 1) / values, "every patch is reconstructed as its mean colour; nothing is learned")}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Input, masked input and reconstruction of the masked patches, (n, C, H, W). Reconstructions of normalised
        targets get the true mean and variance, because the loss does not train these."""
        images = batch.views["image"]
        predicted, masked, _, grid = self.reconstruct(images, step)
        patches = patchify(images, self.encoder.stride).float()
        predicted = predicted.float()
        if self.config.norm_pix:
            mean, deviation = moments(rows(patches, masked))
            predicted = predicted * deviation + mean
        hidden = put(patches, masked, torch.zeros_like(predicted))
        painted = put(patches, masked, predicted)
        return {
            "input": images,
            "masked": unpatchify(hidden, self.encoder.stride, grid),
            "reconstruction": unpatchify(painted, self.encoder.stride, grid),
        }
