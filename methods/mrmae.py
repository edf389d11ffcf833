"""MR-MAE (Gao et al., "Mimic before Reconstruct: Enhancing Masked Autoencoders with Feature Mimicking", IJCV 2023).

A masked autoencoder whose encoder also mimics a frozen teacher. The decoder reconstructs the pixels of masked patches,
and a linear layer on the encoder's output predicts the teacher's features of the visible patches. The two losses act on
different tokens. Shapes: B images, N patches on an (h, w) grid, K of them kept, M = N - K masked, D encoder width, T values
of a target.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import Reads, ViewSpec
from ssl_pretrain.flags import (
    ABOVE_0_TO_1,
    AT_LEAST_1,
    BETWEEN_0_AND_1,
    NOT_NEGATIVE,
    POSITIVE,
    within,
)
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import masked_autoencoder, targets
from ssl_pretrain.parts.masked_autoencoder import decoded, masking, mean_colour, painted, pixel_loss
from ssl_pretrain.parts.masks import rows
from ssl_pretrain.parts.targets import PatchTarget, distances, spread
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class MRMAE(Method):
    """Reconstruct masked patches, and mimic a frozen network's features, or HOG, of visible ones.

    Defaults are the paper's (section 3) as far as it says; the rest is MAE's. Raises UserError for options out of range
    or a teacher that does not fit, and UnsupportedByBackbone for an encoder that cannot drop tokens.
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
        warmup=40 / 400,
        encoder={"positions": "sincos"},
        small={
            "lr": 2e-3,
            "decoder_dim": 128,
            "decoder_depth": 1,
            "decoder_heads": 4,
            "pool": "cls",
            "target": "hog",
        },
        tiny={
            "decoder_dim": 32,
            "decoder_depth": 1,
            "decoder_heads": 2,
            "target_norm": "layer_norm",
            "target_images": 32,
        },
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Masked autoencoder that mimics a teacher (MR-MAE)."""

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
        target: Literal["teacher", "hog"] = "teacher"
        """What the visible patches mimic: patch features of --teacher, or histograms of oriented gradients (no
        teacher)."""
        target_block: int = -1
        """Block of the teacher whose patch features are the target; negative numbers count from the end."""
        target_final_norm: bool = True
        """Take the teacher's features after its final norm."""
        target_norm: Literal["none", "layer_norm", "l2", "standardise", "phi_s"] = "none"
        """Transform of each target vector: none, layer norm without affine, or length 1; with statistics of the data:
        channels of mean 0 and variance 1, or the same by a rotation and one scale (PHI-S)."""
        target_images: int = 1024
        """Images at the start of the run from which standardise and phi_s are learned. The mimic loss is 0 until then."""
        loss: Literal["mse", "cosine", "smooth_l1"] = "mse"
        """Distance between prediction and target of a visible patch."""
        beta: float = 2.0
        """With smooth_l1: where the loss goes from a square to a line."""
        hog_cell: int = 8
        """With HOG: side of a cell in pixels. At most half a patch is used, and it must divide the patch."""
        mimic_weight: float = 1.0
        """Weight of the mimic loss; the reconstruction has 1."""
        gradient_norms: bool = False
        """Log the norm of each loss's gradient at the encoder's output; costs a second backward pass of the decoder."""
        crop_scale: tuple[float, float] = (0.2, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, BETWEEN_0_AND_1, "mask_ratio")
            within(self, AT_LEAST_1, "decoder_dim", "decoder_depth", "decoder_heads", "hog_cell", "target_images")
            within(self, NOT_NEGATIVE, "mimic_weight")
            within(self, POSITIVE, "beta")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("mrmae", "keep")
        masked_autoencoder.add_decoder(
            self,
            width=self.config.decoder_dim,
            depth=self.config.decoder_depth,
            heads=self.config.decoder_heads,
            mask_ratio=config.mask_ratio,
        )
        masked_autoencoder.initialise(self)
        self.target = PatchTarget(
            config.target,
            encoder,
            norm=config.target_norm,
            block=config.target_block,
            final_norm=config.target_final_norm,
            hog_cell=config.hog_cell,
            images=config.target_images,
        )

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The teacher, unless HOG is mimicked."""
        return targets.networks(config.target)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the teacher, and add the layer that predicts its features."""
        self.target.prepare(networks)
        self.mimic = nn.Linear(self.encoder.dim, self.target.width)
        nn.init.trunc_normal_(self.mimic.weight, std=0.02)
        nn.init.zeros_(self.mimic.bias)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """The decoder's, as of `mae`."""
        return masked_autoencoder.decoder_sizes(config.decoder_dim, encoder)

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped, without colour; for a teacher also the same pixels with as many patches."""
        image = ViewSpec(name="image", size=image_size, scale=config.crop_scale)
        return targets.with_teacher(config.target, image, Reads(config.target_block, config.target_final_norm))

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The reconstruction of the masked patches plus `mimic_weight` times the mimic loss of the visible ones.

        Terms: "reconstruction", "mimic", and "relative", the mimic loss over that of predicting the batch's mean target
        for every patch. With `gradient_norms`, in training, also "gradient_reconstruction" and "gradient_mimic": the norm
        of the gradient of each (weighted) loss with respect to the encoder's output tokens.
        """
        config, images = self.config, batch.views["image"]
        keep, masked, grid = masking(self.encoder, images, step, config.mask_ratio)
        seen = encode(self.encoder, images, step, keep=keep)
        predicted = decoded(self, seen, keep, masked, grid)
        pixels, per_sample = pixel_loss(predicted, images, masked, self.encoder.stride, config.norm_pix)

        features = self.target.features(batch, grid)
        wanted = self.target.transformed(features)
        each = distances(self.mimic(seen.patches), rows(wanted, keep), config.loss, config.beta).mean(1)
        relative = self.target.relative(each.detach().mean(), spread(wanted, config.loss, config.beta))
        each = self.target.gated(each)
        mimic = each.mean()
        terms = {"reconstruction": pixels.detach(), "mimic": mimic.detach(), "relative": relative}
        if config.gradient_norms and torch.is_grad_enabled():
            output = seen.patches if seen.tokens is None else seen.tokens
            for name, part in (("reconstruction", pixels), ("mimic", config.mimic_weight * mimic)):
                (gradient,) = torch.autograd.grad(part, output, retain_graph=True)
                terms[f"gradient_{name}"] = gradient.float().norm()
        return Losses(
            total=pixels + config.mimic_weight * mimic,
            terms=terms,
            per_sample=per_sample + config.mimic_weight * each.detach(),
            carry=self.target.carry(features, step),
        )

    def after_step(self, step: Step) -> None:
        """Learn the transform of the targets, where it needs statistics."""
        self.target.after_step(step)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The mimic loss relative to that of the mean target; with normalised pixels, the loss of painting every patch in
        its mean colour."""
        found = {"relative": (1.0, "every visible patch mimics the mean target; nothing is learned from the teacher")}
        return found | ({"reconstruction": mean_colour(self)} if self.config.norm_pix else {})

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Input, masked input and reconstruction of the masked patches, (n, C, H, W), as of `mae`."""
        images = batch.views["image"]
        keep, masked, grid = masking(self.encoder, images, step, self.config.mask_ratio)
        predicted = decoded(self, encode(self.encoder, images, step, keep=keep), keep, masked, grid)
        return painted(images, predicted, masked, self.encoder.stride, grid, self.config.norm_pix)
