"""Masked autoencoders (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022).

Most patches are masked. The encoder sees only the others. A small decoder reconstructs the masked ones from its output.
Whole mask units of the encoder are masked; on a ViT a unit is a patch. With a hierarchical encoder (Hiera: Ryali et al.,
ICML 2023) the decoder also sees the outputs of its first stages.
Shapes: B images, C channels, N patches on an (h, w) grid, K of them kept, M = N - K masked, p patch side, D encoder
width, E decoder width, F = p * p * C values a patch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, BETWEEN_0_AND_1, NOT_NEGATIVE, POSITIVE, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import anchor, masked_autoencoder, multi_scale_fusion
from ssl_pretrain.parts.masked_autoencoder import decoded, masking_of_units, mean_colour, painted, pixel_loss
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class MAE(Method):
    """Reconstruct the pixels of masked patches; the mean squared error over masked patches is the loss (eq. in section 3).

    Defaults are the paper's pre-training setting (appendix A.1, table 8). Raises UserError for options out of range and
    UnsupportedByBackbone for an encoder that cannot drop tokens.
    """

    grid: tuple[int, int]
    decoder_embed: nn.Linear
    mask_token: nn.Parameter
    decoder_blocks: nn.ModuleList
    decoder_norm: nn.LayerNorm
    decoder_pred: nn.Linear
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
        encoder.require("mae", "keep", units=True)
        self.anchor: anchor.Anchor | None = None
        masked_autoencoder.add_decoder(
            self,
            width=self.config.decoder_dim,
            depth=self.config.decoder_depth,
            heads=self.config.decoder_heads,
            mask_ratio=config.mask_ratio,
        )
        self.fusion = multi_scale_fusion.make(encoder)
        masked_autoencoder.initialise(self)

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
        return masked_autoencoder.decoder_sizes(config.decoder_dim, encoder)

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop with flips and no colour augmentation (section 4, "data augmentation")."""
        image = ViewSpec(name="image", size=image_size, scale=config.crop_scale)
        return (image, *anchor.twins(config.anchor, [image], config.anchor_zoom))

    def kept(self, patches: int) -> int:
        """How many of `patches` patches (mask units) the encoder sees: rounded down, as released."""
        return masked_autoencoder.kept(patches, self.config.mask_ratio)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """Loss over batch.views["image"] (B, C, H, W); `per_sample` is each image's mean over its masked patches."""
        images = batch.views["image"]
        predicted, masked, _, _ = self.reconstruct(images, step)
        total, per_sample = pixel_loss(predicted, images, masked, self.encoder.stride, self.config.norm_pix)
        losses = Losses(total=total, per_sample=per_sample)
        if self.anchor is not None:
            losses.terms["reconstruction"] = losses.total.detach()
            each = None
            if self.anchor.sees:  # a second pass over the whole image, because the first one saw a part of it
                each = self.anchor(encode(self.encoder, images, step), batch.views["image_anchor"])
            self.anchor.add(losses, self.config.anchor_weight, each)
        return losses

    def reconstruct(self, images: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Predictions (B, M, F) for the masked patches, their indices (B, M), the kept ones' (B, K), and the grid."""
        drawn = masking_of_units(self.encoder, images, step, self.config.mask_ratio)
        more = {} if self.fusion is None else {"maps": True}
        seen = encode(self.encoder, images, step, keep=drawn.units, **more)
        return decoded(self, seen, drawn.keep, drawn.masked, drawn.grid), drawn.masked, drawn.keep, drawn.grid

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """With normalised pixels, the loss of painting every patch in its mean colour."""
        if not self.config.norm_pix:
            return {}
        return {"loss" if self.config.anchor == "none" else "reconstruction": mean_colour(self)}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Input, masked input and reconstruction of the masked patches, (n, C, H, W). Reconstructions of normalised
        targets get the true mean and variance, because the loss does not train these."""
        images = batch.views["image"]
        predicted, masked, _, grid = self.reconstruct(images, step)
        return painted(images, predicted, masked, self.encoder.stride, grid, self.config.norm_pix)
