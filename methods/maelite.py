"""MAE-Lite (Wang et al., "A Closer Look at Self-Supervised Lightweight Vision Transformers", ICML 2023).

A masked autoencoder for a small encoder whose attention also follows that of a frozen, larger one. Both see the same
patches. Shapes: B images, N patches on an (h, w) grid, K of them kept, M = N - K masked, P prefix tokens, L = P + K tokens,
D encoder width, S heads of the encoder's block, T of the teacher's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, BETWEEN_0_AND_1, NOT_NEGATIVE, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import masked_autoencoder
from ssl_pretrain.parts.masked_autoencoder import decoded, masking, mean_colour, painted, pixel_loss
from ssl_pretrain.parts.targets import attention_maps, check_attention, with_teacher
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class MAELite(Method):
    """Reconstruct masked patches, and give one block the attention of a frozen teacher's block for the same patches.

    Defaults are the paper's distillation setting (section 5) as released. Raises UserError for options out of range and for
    a teacher whose attention is of other tokens, and UnsupportedByBackbone for an encoder that cannot drop tokens or gives
    no attention maps.
    """

    grid: tuple[int, int]
    decoder_embed: nn.Linear
    mask_token: nn.Parameter
    decoder_blocks: nn.ModuleList
    decoder_norm: nn.LayerNorm
    decoder_pred: nn.Linear
    decoder_pos_embed: Tensor
    teacher: Frozen

    recipe = Recipe(
        lr=1.5e-4,
        lr_batch=256,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        warmup=40 / 400,
        encoder={"positions": "sincos"},
        small={"lr": 2e-3, "decoder_dim": 128, "decoder_depth": 1, "decoder_heads": 4, "pool": "cls"},
        tiny={"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.5},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Masked autoencoder with attention distillation (MAE-Lite)."""

        mask_ratio: float = 0.75
        """Masking ratio: share of the patches that are removed before the encoder and the teacher."""
        norm_pix: bool = True
        """Reconstruct each patch's pixels normalised by their own mean and variance."""
        decoder_dim: int | None = None
        """Width of the decoder (default: by the encoder; 512 from ViT-B on)."""
        decoder_depth: int | None = None
        """Number of decoder blocks (default: by the encoder; 8 from ViT-B on)."""
        decoder_heads: int | None = None
        """Number of attention heads of the decoder (default: by the encoder; 16 from ViT-B on)."""
        attention_weight: float = 1.0
        """Weight of the attention loss; the reconstruction has 1. The loss is smaller the more tokens there are, about
        with the square of their number."""
        student_block: int = -1
        """Block of the encoder whose attention is trained; negative numbers count from the end."""
        teacher_block: int = -1
        """Block of the teacher whose attention is the target; negative numbers count from the end."""
        crop_scale: tuple[float, float] = (0.08, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, BETWEEN_0_AND_1, "mask_ratio")
            within(self, AT_LEAST_1, "decoder_dim", "decoder_depth", "decoder_heads")
            within(self, NOT_NEGATIVE, "attention_weight")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("maelite", "keep", "attention_maps")
        if not -encoder.depth <= config.student_block < encoder.depth:
            raise UserError(
                f"--student-block {config.student_block}: the encoder has {encoder.depth} blocks, {-encoder.depth} to "
                f"{encoder.depth - 1}"
            )
        masked_autoencoder.add_decoder(
            self,
            width=self.config.decoder_dim,
            depth=self.config.decoder_depth,
            heads=self.config.decoder_heads,
            mask_ratio=config.mask_ratio,
        )
        masked_autoencoder.initialise(self)

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The teacher."""
        return ("teacher",)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the teacher, and add the linear map from the encoder's heads to the teacher's. Both see one blank image to
        compare the shapes of their attention."""
        self.teacher = networks["teacher"]
        check_attention("--teacher-block", self.teacher, self.config.teacher_block)
        if "keep" not in self.teacher.backbone.supports:
            raise UserError(
                f"--teacher {self.teacher.spec}: {type(self.teacher.backbone).__name__} cannot leave patches out, and the "
                f"teacher sees those that the encoder sees: use the export of a ViT"
            )
        own, theirs = self._heads()
        self.adapter = nn.Linear(own, theirs, bias=False)

    @torch.no_grad()
    def _heads(self) -> tuple[int, int]:
        """S and T. Raises UserError where the two attention maps are not of the same tokens."""
        encoder, teacher = self.encoder, self.teacher
        training, device = encoder.training, next(encoder.parameters()).device
        own_size, their_size = (
            tuple(side * step for side, step in zip(self.grid, stride, strict=True))
            for stride in (encoder.stride, teacher.sight.stride)
        )
        blank = torch.zeros(1, encoder.in_chans, *own_size, device=device)
        own = encoder.eval()(blank, attention_of=(self.config.student_block,))
        encoder.train(training)
        device = next(teacher.backbone.parameters()).device  # the encoder is moved there later
        blank = torch.zeros(1, encoder.in_chans, *their_size, device=device)
        theirs = teacher(blank, attention_of=(self.config.teacher_block,))
        self._check_grid(own.grid, theirs.grid)
        mine, wanted = own.attention[0].shape, theirs.attention[0].shape
        if mine[3] != wanted[3]:
            patches = own.patches.shape[1]
            raise UserError(
                f"--teacher {teacher.spec} has {wanted[3] - patches} tokens before the patches (class token, registers) "
                f"and the encoder {mine[3] - patches}: give the encoder as many with --cls, --no-cls or --registers"
            )
        return mine[1], wanted[1]

    def _check_grid(self, own: tuple[int, int], theirs: tuple[int, int]) -> None:
        """Raise UserError where the teacher's patches are not those of the encoder."""
        if own != theirs:
            raise UserError(
                f"--teacher {self.teacher.spec} sees an image as {theirs[0]} x {theirs[1]} patches and the encoder as "
                f"{own[0]} x {own[1]}: attention needs the same patches, choose another teacher or --patch-size"
            )

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """The decoder's, as of `mae`."""
        return masked_autoencoder.decoder_sizes(config.decoder_dim, encoder)

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped, without colour, and the same pixels with as many patches for the teacher."""
        return with_teacher("teacher", ViewSpec(name="image", size=image_size, scale=config.crop_scale))

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The reconstruction of the masked patches plus `attention_weight` times the mean squared error of the attention.

        Terms: "reconstruction", "attention", and "relative", the attention loss over that of uniform attention (every
        token attends to all equally).
        """
        config, images = self.config, batch.views["image"]
        keep, masked, grid = masking(self.encoder, images, step, config.mask_ratio)
        seen = encode(self.encoder, images, step, keep=keep, attention_of=(config.student_block,))
        predicted = decoded(self, seen, keep, masked, grid)
        pixels, per_sample = pixel_loss(predicted, images, masked, self.encoder.stride, config.norm_pix)

        view, (p, q) = batch.views["teacher"], self.teacher.sight.stride
        self._check_grid(grid, (view.shape[-2] // p, view.shape[-1] // q))
        (wanted,) = attention_maps(self.teacher, view, (config.teacher_block,), keep=keep)
        each = (self.adapted(seen.attention[0]) - wanted).square().mean((1, 2, 3))
        attention = each.mean()
        uniform = distributed.mean((wanted - 1 / wanted.shape[-1]).square().mean())
        return Losses(
            total=pixels + config.attention_weight * attention,
            terms={
                "reconstruction": pixels.detach(),
                "attention": attention.detach(),
                "relative": attention.detach() / uniform,
            },
            per_sample=per_sample + config.attention_weight * each.detach(),
        )

    def adapted(self, attention: Tensor) -> Tensor:
        """The encoder's attention (B, S, L, L) mapped to the teacher's heads, float32 (B, T, L, L)."""
        with torch.autocast(attention.device.type, enabled=False):
            return self.adapter(attention.movedim(1, -1)).movedim(-1, 1)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The attention loss relative to that of uniform attention; with normalised pixels, the loss of painting every
        patch in its mean colour."""
        found = {"relative": (1.0, "attention is uniform; nothing is learned from the teacher")}
        return found | ({"reconstruction": mean_colour(self)} if self.config.norm_pix else {})

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Input, masked input and reconstruction of the masked patches, (n, C, H, W), as of `mae`."""
        images = batch.views["image"]
        keep, masked, grid = masking(self.encoder, images, step, self.config.mask_ratio)
        predicted = decoded(self, encode(self.encoder, images, step, keep=keep), keep, masked, grid)
        return painted(images, predicted, masked, self.encoder.stride, grid, self.config.norm_pix)
