"""BEiT (Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022) and BEiT v2 (Peng et al., 2022).

Blocks of an image are masked. The encoder sees the whole grid, with a mask token in the masked places, and one linear layer
predicts the ids that a frozen tokenizer gives the masked patches of the whole image. Shapes: B images, N patches on an
(h, w) grid, M of them masked, D encoder width, K codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone, Features
from ssl_pretrain.backbones.vit import Block
from ssl_pretrain.data.views import Jitter, Reads, ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, BETWEEN_0_AND_1, NOT_NEGATIVE, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts.block_masks import ATTEMPTS, block_masks, completed, listed
from ssl_pretrain.parts.id_prediction import NO_BETTER, compared
from ssl_pretrain.parts.masks import rows
from ssl_pretrain.parts.patches import without
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step


@final
class BEiT(Method):
    """Predict a tokenizer's ids of masked patches; the loss is the cross-entropy over all codes.

    Defaults are the papers' (BEiT, section 2.5 and appendix; masks of one size as in BEiT v2). Raises UserError for options
    out of range, and UnsupportedByBackbone for an encoder that cannot put a token in place of patches.
    """

    recipe = Recipe(
        lr=1.5e-3,
        lr_batch=2048,
        final_lr=1e-5,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        clip_grad=3.0,
        warmup=10 / 300,
        small={"lr": 2e-3, "steps": 250, "batch_size": 64, "patch_size": 4, "pool": "cls"},
        tiny={"aggregate_depth": 1},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Masked prediction of a tokenizer's ids (BEiT, BEiT v2)."""

        mask_ratio: float = 0.4
        """Masking ratio: share of the patches that are masked, in blocks."""
        crop_scale: tuple[float, float] = (0.2, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        colour_jitter: float = 0.4
        """Strength of the jitter of brightness, contrast and saturation; 0: none."""
        aggregate_cls: bool = False
        """Also predict the ids from the class token's last state and the patches' earlier ones, by blocks that are not
        exported (BEiT v2, patch aggregation)."""
        aggregate_depth: int = 2
        """With --aggregate-cls: number of these blocks."""

        def __post_init__(self) -> None:
            within(self, BETWEEN_0_AND_1, "mask_ratio")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)
            within(self, NOT_NEGATIVE, "colour_jitter")
            within(self, AT_LEAST_1, "aggregate_depth")

    tokenizer: Frozen
    head: nn.Linear

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        encoder.require("beit", "replace")
        self.mask_token = nn.Parameter(torch.empty(encoder.token_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if config.aggregate_cls:
            encoder.require("beit --aggregate-cls", "blocks")
            if getattr(encoder, "cls_token", None) is None:
                raise UserError("--aggregate-cls needs an encoder with a class token: leave it out, or give --cls")
            self.tap = max(0, encoder.depth * 3 // 4 - 1)  # after block 9 of 12
            self.aggregate_blocks = nn.ModuleList(
                Block(encoder.dim, encoder.config.heads, layer_scale=encoder.config.layer_scale)
                for _ in range(config.aggregate_depth)
            )

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The tokenizer."""
        return ("tokenizer",)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the tokenizer, and add the head for its codes."""
        self.tokenizer = networks["tokenizer"]
        assert self.tokenizer.quantizer is not None
        self.head = nn.Linear(self.encoder.dim, self.tokenizer.quantizer.size)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped, with jitter; and the same pixels for the tokenizer, with as many patches."""
        strength = config.colour_jitter
        jitter = Jitter(brightness=strength, contrast=strength, saturation=strength, hue=0.0, p=1.0)
        return (
            ViewSpec(name="image", size=image_size, scale=config.crop_scale, jitter=jitter if strength else None),
            ViewSpec(name="tokens", of="image", size=image_size, network="tokenizer", reads=Reads(outputs=("ids",))),
        )

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The mean cross-entropy over the masked patches, whose number is the same in every image.

        Terms: "accuracy", "majority" and "gain" of `parts.id_prediction`.
        """
        images = batch.views["image"]
        grid = (images.shape[-2] // self.encoder.stride[0], images.shape[-1] // self.encoder.stride[1])
        masks = self.masks(grid, step).to(images.device, non_blocking=True)
        index, _ = listed(masks, self.masked(grid))
        ids = self.tokenizer.ids(batch.views["tokens"]).flatten(1).gather(1, index)
        options: dict[str, Any] = {"blocks": (self.tap, -1)} if self.config.aggregate_cls else {}
        seen = encode(self.encoder, images, step, replace=(masks, self.mask_token), **options)
        logits = self.head(rows(seen.patches, index)).float()
        each = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        found, terms = each, {}
        if self.config.aggregate_cls:
            more = self.head(rows(self.aggregated(seen), index)).float()
            other = F.cross_entropy(more.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
            found = each + other
            terms = {"aggregated": other.detach().mean()}
        per_sample = found.mean(1)
        return Losses(
            total=per_sample.mean(),
            terms={**compared(logits.detach(), ids, each.detach()), **terms},
            per_sample=per_sample.detach(),
        )

    def aggregated(self, seen: Features) -> Tensor:
        """Patch features (B, N, D) of the blocks that read the last class token and the patches of an earlier block, after
        the encoder's final norm."""
        early, last = seen.blocks
        x = torch.cat([last[:, :1], early[:, early.shape[1] - seen.patches.shape[1] :]], dim=1)
        for block in self.aggregate_blocks:
            x = block(x)
        norm: nn.Module = self.encoder.norm  # type: ignore[assignment]
        return norm(x)[:, 1:]

    def masked(self, grid: tuple[int, int]) -> int:
        """How many patches of a grid are masked: rounded down, at least one, and not all."""
        n = grid[0] * grid[1]
        return min(n - 1, max(1, int(n * self.config.mask_ratio)))

    def masks(self, grid: tuple[int, int], step: Step) -> Tensor:
        """Blocks of patches, the same number in every image: bool (B, N), True for a masked patch."""
        n, count = grid[0] * grid[1], self.masked(grid)
        with step.on_host() as host:
            noise, rest = host.rand(ATTEMPTS, 4), host.rand(n)
            wanted = torch.full((len(noise),), float(count))
            return completed(
                block_masks(noise, grid, wanted, smallest=min(16, max(2, n // 12)), largest=count), wanted, rest
            )

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The codes' frequencies, predicted of every patch."""
        return {"gain": (0.0, NO_BETTER)}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The crop, and what the student sees of it (masked patches grey)."""
        images = batch.views["image"]
        grid = (images.shape[-2] // self.encoder.stride[0], images.shape[-1] // self.encoder.stride[1])
        masks = self.masks(grid, step).to(images.device)
        return {"view": images, "masked": without(images, masks, self.encoder.stride)}
