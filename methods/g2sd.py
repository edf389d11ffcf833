"""G2SD, generic stage (Huang et al., "Generic-to-Specific Distillation of Masked Autoencoders", CVPR 2023).

A small masked autoencoder learns from a frozen, larger one with its decoder: both encoders see the same patches, and the
small decoder predicts what the large decoder makes of all tokens in its middle. Shapes: B images, N patches on an (h, w)
grid, K of them kept, M = N - K masked, P prefix tokens, L = M + P + K tokens of a decoder, D encoder width, E decoder
width, T width of the teacher's decoder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone, Features
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, BETWEEN_0_AND_1, POSITIVE, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import masked_autoencoder, sizes
from ssl_pretrain.parts.init import xavier_
from ssl_pretrain.parts.masked_autoencoder import HasDecoder, decoder_tokens, masking
from ssl_pretrain.parts.patches import without
from ssl_pretrain.parts.targets import distances, spread, transformed
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class G2SD(Method):
    """Predict the tokens in the middle of a frozen masked autoencoder's decoder, for the same visible patches.

    Defaults are the paper's generic stage (section 3.2) as released. Raises UserError for options out of range and for a
    teacher without a decoder or of other tokens, and UnsupportedByBackbone for an encoder that cannot drop tokens.
    """

    grid: tuple[int, int]
    decoder_embed: nn.Linear
    mask_token: nn.Parameter
    decoder_blocks: nn.ModuleList
    decoder_norm: nn.LayerNorm
    decoder_pos_embed: Tensor
    teacher: Frozen

    recipe = Recipe(
        lr=1.5e-4,
        lr_batch=256,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        warmup=10 / 300,
        encoder={"positions": "sincos"},
        small={
            "lr": 2e-3,
            "decoder_dim": 128,
            "decoder_depth": 1,
            "decoder_heads": 4,
            "predictor_dim": 128,
            "pool": "cls",
        },
        tiny={"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2, "predictor_dim": 24, "mask_ratio": 0.5},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Distillation of a masked autoencoder's decoder (G2SD)."""

        mask_ratio: float = 0.75
        """Masking ratio: share of the patches that are removed before the encoder and the teacher's encoder."""
        decoder_dim: int | None = None
        """Width of the decoder (default: by the encoder; 256 for ViT-S, 512 from ViT-B on)."""
        decoder_depth: int | None = None
        """Number of decoder blocks (default: by the encoder; 4 from 12 encoder blocks on)."""
        decoder_heads: int | None = None
        """Number of attention heads of the decoder (default: by the encoder; 16 from ViT-B on)."""
        predictor_dim: int = 512
        """Hidden width of the MLP on the decoder that predicts the target."""
        target_block: int | Literal["middle"] = "middle"
        """Block of the teacher's decoder whose output is the target: middle (the 4th of 8), or its index; negative numbers
        count from the end."""
        supervise: Literal["all", "masked"] = "all"
        """Tokens with a loss: all (masked patches, visible patches, class token), or masked patches alone."""
        beta: float = 2.0
        """Where the smooth L1 loss goes from a square to a line."""
        crop_scale: tuple[float, float] = (0.2, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, BETWEEN_0_AND_1, "mask_ratio")
            within(self, AT_LEAST_1, "decoder_dim", "decoder_depth", "decoder_heads", "predictor_dim")
            within(self, POSITIVE, "beta")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("g2sd", "keep")
        masked_autoencoder.add_blocks(
            self,
            width=self.config.decoder_dim,
            depth=self.config.decoder_depth,
            heads=self.config.decoder_heads,
            mask_ratio=config.mask_ratio,
        )
        masked_autoencoder.initialise(self)

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The teacher, with its decoder."""
        return ("teacher_run",)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the teacher, and add the MLP for the width of its decoder. Both encoders see one blank image to compare
        their tokens."""
        self.teacher = networks["teacher_run"]
        decoder = self._decoder()
        depth, chosen = len(decoder.decoder_blocks), self.config.target_block
        if chosen != "middle" and not -depth <= chosen < depth:
            raise UserError(
                f"--target-block {chosen}: the decoder of {self.teacher.spec} has {depth} blocks, {-depth} to {depth - 1}"
            )
        self.block = max(0, depth // 2 - 1) if chosen == "middle" else chosen % depth
        self._check_tokens()
        hidden = self.config.predictor_dim
        self.predictor = nn.Sequential(
            nn.Linear(self.decoder_embed.out_features, hidden),
            nn.GELU(),
            nn.Linear(hidden, decoder.decoder_embed.out_features),
        )
        xavier_(self.predictor)

    def _decoder(self) -> HasDecoder:
        """The teacher's method. Raises UserError where it is not there, or has no decoder of masked patches."""
        method = self.teacher.method
        if not isinstance(method, HasDecoder):
            raise UserError(f"--teacher {self.teacher.spec} has no decoder of masked patches: give a run of mae")
        return method

    @torch.no_grad()
    def _check_tokens(self) -> None:
        """Raise UserError where the tokens of teacher and encoder are not of the same parts of an image."""
        own = self._blank(self.encoder, self.encoder, self.encoder.stride)
        theirs = self._blank(self.teacher, self.teacher.backbone, self.teacher.sight.stride)
        self._check_grid(own.grid, theirs.grid)
        before = [0 if seen.tokens is None else seen.tokens.shape[1] - seen.patches.shape[1] for seen in (own, theirs)]
        if self.config.supervise == "all" and before[0] != before[1]:
            raise UserError(
                f"--teacher {self.teacher.spec} has {before[1]} tokens before the patches (class token, registers) and the "
                f"encoder {before[0]}: give the encoder as many with --cls, --no-cls or --registers, or --supervise masked"
            )

    def _blank(self, network: Callable[..., Features], backbone: Backbone, stride: tuple[int, int]) -> Features:
        """What a network with this backbone gives for a blank image, on its own device, in eval mode."""
        training, device = backbone.training, next(backbone.parameters()).device
        size = [side * step for side, step in zip(self.grid, stride, strict=True)]
        backbone.eval()
        seen = network(torch.zeros(1, backbone.in_chans, *size, device=device))
        backbone.train(training)
        return seen

    def _check_grid(self, own: tuple[int, int], theirs: tuple[int, int]) -> None:
        """Raise UserError where the teacher's patches are not those of the encoder."""
        if own != theirs:
            raise UserError(
                f"--teacher {self.teacher.spec} sees an image as {theirs[0]} x {theirs[1]} patches and the encoder as "
                f"{own[0]} x {own[1]}: both must see the same patches, choose another teacher or --patch-size"
            )

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """The decoder's: the width and the heads as of `mae`, half as many blocks."""
        paper = masked_autoencoder.decoder_sizes(config.decoder_dim, encoder)
        return {**paper, "decoder_depth": sizes.depth(4, encoder.depth)}

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped, without colour, and the same pixels with as many patches for the teacher."""
        image = ViewSpec(name="image", size=image_size, scale=config.crop_scale)
        return image, ViewSpec(name="teacher", of="image", size=image_size, network="teacher_run")

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The mean smooth L1 loss of the supervised tokens.

        The term "relative" is the loss over that of predicting the batch's mean target for every token.
        """
        config, images = self.config, batch.views["image"]
        keep, masked, grid = masking(self.encoder, images, step, config.mask_ratio)
        wanted = self.targets(batch.views["teacher"], keep, masked, grid)
        seen = encode(self.encoder, images, step, keep=keep)
        found = decoder_tokens(self, seen, keep, masked, grid, len(self.decoder_blocks) - 1)[:, : wanted.shape[1]]
        predicted = self.predictor(self.decoder_norm(found))
        per_sample = distances(predicted, wanted, "smooth_l1", config.beta).mean(1)
        total = per_sample.mean()
        return Losses(
            total=total,
            terms={"relative": total.detach() / spread(wanted, "smooth_l1", config.beta)},
            per_sample=per_sample.detach(),
        )

    @torch.no_grad()
    def targets(self, view: Tensor, keep: Tensor, masked: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the teacher's decoder makes of a view of the visible patches: float32 (B, L, T), or (B, M, T) of the masked
        patches, each token with mean 0 and variance 1. The order is masked, prefix, kept."""
        p, q = self.teacher.sight.stride
        self._check_grid(grid, (view.shape[-2] // p, view.shape[-1] // q))
        tokens = decoder_tokens(self._decoder(), self.teacher(view, keep=keep), keep, masked, grid, self.block)
        if self.config.supervise == "masked":
            tokens = tokens[:, : masked.shape[1]]
        return transformed(tokens, "layer_norm")

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The loss relative to that of the mean target."""
        return {"relative": (1.0, "every token is predicted as the mean target; nothing is learned from the teacher")}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The crop, and what both encoders see of it (masked patches grey)."""
        images = batch.views["image"]
        keep, _, grid = masking(self.encoder, images, step, self.config.mask_ratio)
        hidden = torch.ones(len(images), grid[0] * grid[1], dtype=torch.bool, device=images.device).scatter(
            1, keep, False
        )
        return {"view": images, "masked": without(images, hidden, self.encoder.stride)}
