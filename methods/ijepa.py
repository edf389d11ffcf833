"""I-JEPA (Assran et al., "Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture", CVPR 2023).

From the features of one part of an image (the context), a predictor predicts the features of other parts. The target
features come from an EMA teacher; pixels are not predicted. Shapes: B images, N patches on an (h, w) grid, K of them
context, T target blocks of M patches, D encoder width, E predictor width.
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
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, FROM_0_BELOW_1, POSITIVE, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.ema_teacher import ema_copy, ema_update_
from ssl_pretrain.parts.masks import rows
from ssl_pretrain.parts.multi_block_masks import multi_block_masks
from ssl_pretrain.parts.patches import without
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class IJEPA(Method):
    """Predict the teacher's features of target blocks from those of a context; the exported encoder is the teacher.

    Defaults are the paper's (section 3 and appendix A). Raises UserError for options out of range and for grids of less
    than 2 x 2 patches, UnsupportedByBackbone for an encoder that cannot drop tokens.
    """

    predictor_pos_embed: Tensor

    recipe = Recipe(
        lr=1e-3,
        lr_scaling="none",
        final_lr=1e-6,
        betas=(0.9, 0.999),
        weight_decay=0.04,
        final_weight_decay=0.4,
        warmup=40 / 600,
        encoder={"positions": "sincos", "cls": False, "pool": "mean"},
        small={
            "lr": 1e-3,
            "final_weight_decay": 0.04,
            "predictor_dim": 64,
            "predictor_depth": 2,
            "predictor_heads": 4,
            "momentum": 0.98,
            "steps": 150,
        },
        tiny={"predictor_dim": 32, "predictor_depth": 1, "predictor_heads": 2},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """I-JEPA."""

        targets: int = 4
        """Number of target blocks of an image."""
        target_scale: tuple[float, float] = (0.15, 0.2)
        """Smallest and largest share of the image that a target block covers."""
        target_aspect: tuple[float, float] = (0.75, 1.5)
        """Smallest and largest aspect ratio (height / width) of a target block; it rises with the block's share."""
        context_scale: tuple[float, float] = (0.85, 1.0)
        """Smallest and largest share of the image that the context block covers before the targets are removed."""
        min_keep: int = 10
        """Minimum number of context patches: if the targets leave fewer, the last targets are not removed."""
        context_truncation: Literal["random", "reference"] = "random"
        """How contexts are cut to the length of the shortest one: random patches are dropped, or, as in the released
        code, the last patches in raster order (then the last row and column are never masked either)."""
        predictor_dim: int | None = None
        """Width of the predictor (default: by the encoder; 384 from ViT-B on)."""
        predictor_depth: int | None = None
        """Number of predictor blocks (default: by the encoder; 12 from ViT-B on)."""
        predictor_heads: int | None = None
        """Number of attention heads of the predictor (default: by the encoder; 12 from ViT-B on)."""
        momentum: float = 0.996
        """Teacher's momentum at the start; it rises to 1 linearly."""
        crop_scale: tuple[float, float] = (0.3, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, AT_LEAST_1, "targets", "min_keep", "predictor_dim", "predictor_depth", "predictor_heads")
            within(self, FROM_0_BELOW_1, "momentum")
            within(self, POSITIVE, "target_aspect", ascending=True)
            within(self, ABOVE_0_TO_1, "target_scale", "context_scale", "crop_scale", ascending=True)

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("ijepa", "keep")
        self.grid = self._grid(*encoder.image_size)
        if min(self.grid) < 2:
            raise UserError(
                f"ijepa needs a grid of at least 2 x 2 patches to mask blocks of, not {self.grid[0]} x {self.grid[1]}: "
                f"raise --image-size or lower --patch-size"
            )
        width = self.config.predictor_dim
        if width % self.config.predictor_heads or width % 4:
            raise UserError(
                f"--predictor-dim {width} must be a multiple of 4 and of --predictor-heads {self.config.predictor_heads}"
            )
        self.predictor_embed = nn.Linear(encoder.dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.predictor_blocks = nn.ModuleList(
            Block(width, self.config.predictor_heads) for _ in range(self.config.predictor_depth)
        )
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, encoder.dim)
        self.register_buffer("predictor_pos_embed", sincos_table(self.grid, width), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for part in (self.predictor_embed, self.predictor_proj):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """The teacher begins as the encoder."""
        self.teacher = ema_copy(self.encoder)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        width = config.predictor_dim or sizes.width(384, encoder.dim, multiple=32)
        return {
            "predictor_dim": width,
            "predictor_depth": sizes.depth(12, encoder.depth),
            "predictor_heads": sizes.heads(12, width, encoder.dim),
        }

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random crop, neither flipped nor coloured (section 3: no hand-crafted augmentations)."""
        return (ViewSpec(name="image", size=image_size, scale=config.crop_scale, interpolation="bilinear", hflip=0.0),)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """Loss over batch.views["image"] (B, C, H, W), the mean over all target patches and channels; `per_sample` is each
        image's."""
        images = batch.views["image"]
        context, targets = self.masks(images, step)
        wanted = self.targets(images, step)
        predicted = self.predict(images, context, targets, step)
        wanted_here = rows(wanted, targets.flatten(1)).unflatten(1, targets.shape[1:])
        per_sample = F.smooth_l1_loss(predicted.float(), wanted_here, reduction="none").mean(dim=(1, 2, 3))
        # Across images, at each position: a teacher whose features depend only on the position has collapsed too.
        spread = wanted.std(0, correction=0).mean()
        terms = {"target_std": spread} if len(images) > 1 else {}
        return Losses(total=per_sample.mean(), terms=terms, per_sample=per_sample.detach())

    def masks(self, images: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The context's patches (B, K) and the target blocks' (B, T, M), drawn for this step."""
        return multi_block_masks(
            step,
            self._grid(*images.shape[-2:]),
            targets=self.config.targets,
            target_scale=self.config.target_scale,
            target_aspect=self.config.target_aspect,
            context_scale=self.config.context_scale,
            min_keep=self.config.min_keep,
            reference=self.config.context_truncation == "reference",
        )

    def predict(self, images: Tensor, context: Tensor, targets: Tensor, step: Step) -> Tensor:
        """The teacher's features (B, T, M, D) of the targets as predicted, each block without knowing of the others."""
        b, t, m = targets.shape
        grid = self._grid(*images.shape[-2:])
        positions = self.predictor_pos_embed
        if grid != self.grid:
            positions = sincos_table(grid, self.config.predictor_dim).to(images.device)
        seen = self.predictor_embed(encode(self.encoder, images, step, keep=context).patches)
        seen = seen + F.embedding(context, positions).to(seen.dtype)
        masked_tokens = (self.mask_token + F.embedding(targets.flatten(0, 1), positions)).to(
            seen.dtype
        )  # (B * T, M, E)
        x = torch.cat([masked_tokens, seen.repeat_interleave(t, dim=0)], dim=1)
        *others, last = self.predictor_blocks
        for block in others:
            x = block(x)
        x = last(x, first=m)  # its outputs for the context are not used
        return self.predictor_proj(self.predictor_norm(x)).unflatten(0, (b, t))

    @torch.no_grad()
    def targets(self, images: Tensor, step: Step) -> Tensor:
        """The teacher's features of all patches (B, N, D), each normalised over its channels; float32."""
        patches = encode(self.teacher, images, step).patches.float()
        return F.layer_norm(patches, patches.shape[-1:])

    def after_step(self, step: Step) -> None:
        """The teacher follows the encoder."""
        start = self.config.momentum
        ema_update_(self.teacher, self.encoder, start + (1 - start) * step.progress, step.ok)

    def exported(self) -> Backbone:
        """The teacher (the released evaluations use it)."""
        return self.teacher

    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The input, the context that the encoder sees, and all target blocks together, (n, C, H, W)."""
        images = batch.views["image"]
        context, targets = self.masks(images, step)
        height, width = self._grid(*images.shape[-2:])
        nothing = torch.ones(len(images), height * width, dtype=torch.bool, device=images.device)
        hidden = (nothing.scatter(1, index, False) for index in (context, targets.flatten(1)))
        shown = [without(images, each, self.encoder.stride) for each in hidden]
        return {"input": images, "context": shown[0], "targets": shown[1]}

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """A teacher that does not look at the image."""
        return {
            "loss": (0.0, "the teacher gives every patch the same features, so the prediction is trivial"),
            "target_std": (0.0, "the teacher's features of a position are the same for all images"),
        }

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """The grid (h, w) of an image of height x width pixels."""
        return height // self.encoder.stride[0], width // self.encoder.stride[1]
