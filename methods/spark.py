"""SparK (Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023) and
FCMAE (Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", CVPR 2023).

Most of an image is taken out, in units of the encoder's stride. A convolutional encoder sees the rest by masked
convolutions and norms (`backbones.masked_convolution`), and a decoder reconstructs the pixels of the units that were taken
out. Shapes: B images, U units on an (h, w) grid, K of them kept, M = U - K masked, F = p * q * C values a unit.
"""

from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.backbones.masked_convolution import Visible
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, BETWEEN_0_AND_1, within
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.dense_decoders import BlockDecoder, UNetDecoder
from ssl_pretrain.parts.masked_autoencoder import painted, pixel_loss
from ssl_pretrain.parts.masks import random_masking, rows
from ssl_pretrain.parts.patches import patchify
from ssl_pretrain.parts.units import unit_grid
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod

WIDTHS = {"unet": 768, "fcmae": 512}  # the papers' decoders


@final
class SparK(WholeBatchMethod):
    """Reconstruct the pixels of masked units from maps of the visible ones; the mean squared error over masked units is the
    loss (SparK, section 3.3).

    The decoder has batch norm, so it is a part of `loss`. Defaults are SparK's (section 4.1 and the released code). Raises
    UserError for options out of range, and UnsupportedByBackbone for an encoder that cannot take units out of an image or
    has no maps.
    """

    least_batch = 2
    recipe = Recipe(
        lr=2e-4,
        betas=(0.9, 0.95),
        weight_decay=0.04,
        final_weight_decay=0.2,
        clip_grad=5.0,
        warmup=40 / 1600,
        small={"encoder": "convnextv2_micro", "stem_patch": 1, "decoder_dim": 64, "lr": 2e-3},
        tiny={"decoder_dim": 32, "mask_ratio": 0.5},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """SparK and FCMAE."""

        mask_ratio: float = 0.6
        """Masking ratio: share of an image's units that the encoder does not see; the number of kept ones is rounded to
        the nearest (fcmae: rounded down)."""
        decoder: Literal["unet", "fcmae"] = "unet"
        """Decoder: SparK's UNet over all maps, or FCMAE's one block of ConvNeXt V2 on the last map."""
        decoder_dim: int | None = None
        """Width of the decoder, of the UNet at its coarsest map (default: by the encoder; 768 and fcmae 512 from a width
        of 768 on)."""
        norm_pix: bool = True
        """The target is each unit normalised by its own mean and variance."""
        crop_scale: tuple[float, float] = (0.67, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, BETWEEN_0_AND_1, "mask_ratio")
            within(self, AT_LEAST_1, "decoder_dim")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("spark", "visible", "maps", units=True)
        h, w = unit_grid(encoder, encoder.image_size)
        if not 0 < self.kept(h * w) < h * w:
            raise UserError(
                f"--mask-ratio {config.mask_ratio} keeps {self.kept(h * w)} of the {h} x {w} units of {encoder.unit[0]} x "
                f"{encoder.unit[1]} pixels; it must keep some and mask some: give larger images or an encoder of a smaller "
                f"stride (a ConvNeXt: --stem-patch; a ResNet: --stem small)"
            )
        kind = UNetDecoder if config.decoder == "unet" else BlockDecoder
        self.decoder = kind(encoder, self.config.decoder_dim)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the papers'."""
        return {"decoder_dim": sizes.width(WIDTHS[config.decoder], encoder.dim, multiple=32)}

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop with flips and no colour augmentation (SparK, appendix)."""
        return (ViewSpec(name="image", size=image_size, scale=config.crop_scale),)

    def kept(self, units: int) -> int:
        """How many of `units` units the encoder sees, as released."""
        share = units * (1 - self.config.mask_ratio)
        return round(share) if self.config.decoder == "unet" else int(share)

    def masks(self, images: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The units of each image that the encoder sees, (B, U) bool, and the indices of the others, (B, M) int64."""
        h, w = unit_grid(self.encoder, (images.shape[2], images.shape[3]))
        keep, masked = random_masking(step.rand(h * w), self.kept(h * w))
        visible = torch.zeros(len(images), h * w, dtype=torch.bool, device=images.device)
        return visible.scatter(1, keep, True), masked

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Of batch.views["image"] (B, C, H, W): the images, "visible" (B, U) bool, "masked" (B, M) int64, and the encoder's
        maps (B, c_i, Y_i, X_i), the last one after its final norm: "map0", the finest, and so on."""
        images = batch.views["image"]
        visible, masked = self.masks(images, step)
        every = {"maps": True} if self.config.decoder == "unet" else {}
        seen = encode(self.encoder, images, step, visible=visible, **every)
        maps = [*seen.maps[:-1], seen.patches.mT.unflatten(2, seen.grid)]
        return {"images": images, "visible": visible, "masked": masked, **{f"map{i}": x for i, x in enumerate(maps)}}

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The error over the masked units; `per_sample` is each image's mean over its own."""
        images, masked = embedded["images"].detach(), embedded["masked"]
        predicted = self.reconstruct(embedded)
        total, per_sample = pixel_loss(predicted, images, masked, self.encoder.unit, self.config.norm_pix)
        return Losses(total=total, per_sample=per_sample)

    def reconstruct(self, embedded: dict[str, Tensor]) -> Tensor:
        """Predictions (B, M, F) for the masked units of what `embed` gave."""
        height, width = embedded["images"].shape[2:]
        grid = unit_grid(self.encoder, (height, width))
        maps = [embedded[f"map{i}"] for i in range(len(embedded) - 3)]
        images = self.decoder(maps, Visible(embedded["visible"].unflatten(1, grid)))
        return rows(patchify(images, self.encoder.unit), embedded["masked"])

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """With normalised pixels, the loss of painting every unit in its mean colour."""
        if not self.config.norm_pix:
            return {}
        values = self.encoder.unit[0] * self.encoder.unit[1] * self.encoder.in_chans
        return {"loss": ((values - 1) / values, "every unit is reconstructed as its mean colour; nothing is learned")}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Input, masked input and reconstruction of the masked units, (n, C, H, W). Reconstructions of normalised targets
        get the true mean and variance, because the loss does not train these."""
        embedded = self.embed(batch, step)
        images, unit = embedded["images"], self.encoder.unit
        grid = unit_grid(self.encoder, (images.shape[2], images.shape[3]))
        return painted(images, self.reconstruct(embedded), embedded["masked"], unit, grid, self.config.norm_pix)
