"""MAGE (Li et al., "MAGE: MAsked Generative Encoder to Unify Representation Learning and Image Synthesis", CVPR 2023).

A frozen tokenizer turns images into ids. A share of the ids that varies from step to step is masked, and most masked
places do not enter the encoder. A decoder predicts the masked ids. Shapes: B images, V views, N ids on an (h, w) grid, K
codes, D encoder width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain.backbones.backbone import Backbone, Features
from ssl_pretrain.backbones.positions import sincos_table
from ssl_pretrain.backbones.vit import Block
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, FROM_0_BELOW_1, NOT_NEGATIVE, POSITIVE, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts import sizes
from ssl_pretrain.parts.id_prediction import NO_BETTER, ONE_CODE, prediction_terms
from ssl_pretrain.parts.init import xavier_
from ssl_pretrain.parts.masks import put
from ssl_pretrain.parts.nt_xent import contrast
from ssl_pretrain.parts.patches import without
from ssl_pretrain.parts.token_stem import begin_with, vit_of, with_tokenizer
from ssl_pretrain.parts.views import by_image, encode
from ssl_pretrain.pretext import Batch, Losses, Recipe, Step, WholeBatchMethod


@final
class MAGE(WholeBatchMethod):
    """Predict the masked ids; the loss is the cross-entropy with label smoothing, over the masked places.

    Defaults are the paper's (section 4 and appendix). Raises UserError for options out of range, and
    UnsupportedByBackbone for an encoder that is no ViT.
    """

    decoder_pos_embed: Tensor
    tokenizer: Frozen
    code_bias: nn.Parameter

    recipe = Recipe(
        lr=1.5e-4,
        lr_batch=256,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        clip_grad=3.0,
        warmup=40 / 1600,
        small={"lr": 2e-3, "steps": 250, "batch_size": 64, "patch_size": 4, "decoder_depth": 1},
        tiny={"decoder_depth": 1},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Masked generative encoder (MAGE)."""

        mask_ratio: tuple[float, float] = (0.5, 1.0)
        """Smallest and largest masking ratio. The ratio of a step is drawn between them. The encoder never sees the
        smallest share of the places."""
        mask_ratio_mean: float = 0.55
        """Mean of the normal distribution of which the ratio is drawn, before it is cut at --mask-ratio."""
        mask_ratio_std: float = 0.25
        """Standard deviation of that distribution."""
        label_smoothing: float = 0.1
        """Label smoothing of the cross-entropy."""
        decoder_depth: int | None = None
        """Number of decoder blocks (default: by the encoder; 8 from ViT-B on). The decoder is as wide as the encoder."""
        decoder_heads: int | None = None
        """Number of attention heads of the decoder (default: by the encoder; 16 from ViT-B on)."""
        crop_scale: tuple[float, float] = (0.2, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""
        contrast: bool = False
        """Also contrast the encoder's mean vectors of two views of each image (MAGE-C)."""
        contrast_weight: float = 0.1
        """With --contrast: weight of that loss."""
        contrast_temperature: float = 0.2
        """With --contrast: temperature of the similarities."""
        contrast_dim: int = 128
        """With --contrast: width of the vectors that are contrasted."""

        def __post_init__(self) -> None:
            within(self, ABOVE_0_TO_1, "mask_ratio", ascending=True)
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)
            within(self, POSITIVE, "mask_ratio_mean", "mask_ratio_std", "contrast_temperature")
            within(self, FROM_0_BELOW_1, "label_smoothing")
            within(self, AT_LEAST_1, "decoder_depth", "decoder_heads", "contrast_dim")
            within(self, NOT_NEGATIVE, "contrast_weight")

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        vit, heads = vit_of(encoder, "mage"), self.config.decoder_heads
        if vit.cls_token is None:
            raise UserError("mage needs an encoder with a class token, which fills the masked places: give --cls")
        if vit.dim % heads or vit.dim % 4:
            raise UserError(f"the encoder's width {vit.dim} must be a multiple of 4 and of --decoder-heads {heads}")
        self.grid = vit.grid
        self.mask_token = nn.Parameter(torch.empty(vit.dim))
        self.decoder_embed = nn.Linear(vit.dim, vit.dim)
        self.decoder_blocks = nn.ModuleList(Block(vit.dim, heads) for _ in range(self.config.decoder_depth))
        self.decoder_norm = nn.LayerNorm(vit.dim, eps=1e-6)
        self.code_fc = nn.Linear(vit.dim, vit.dim)
        self.code_norm = nn.LayerNorm(vit.dim, eps=1e-5)
        self.register_buffer("decoder_pos_embed", sincos_table(self.grid, vit.dim)[None], persistent=False)
        self.projector: nn.Module | None = None
        if config.contrast:
            self.projector = nn.Sequential(
                nn.Linear(vit.dim, vit.dim), nn.ReLU(), nn.Linear(vit.dim, config.contrast_dim)
            )
        xavier_(self)
        nn.init.normal_(self.mask_token, std=0.02)

    @classmethod
    def sizes(cls, config: Any, encoder: Backbone, images: int | None) -> dict[str, int]:
        """By the rule of `parts.sizes`, from the paper's."""
        return {
            "decoder_depth": sizes.depth(8, encoder.depth),
            "decoder_heads": sizes.heads(16, encoder.dim, encoder.dim),
        }

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The tokenizer."""
        return ("tokenizer",)

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the tokenizer. The encoder reads its ids from now on."""
        self.tokenizer = networks["tokenizer"]
        self.encoder = vit = begin_with(self.encoder, self.tokenizer, "mage")
        self.code_bias = nn.Parameter(torch.zeros(vit.patch_embed.proj.weight.shape[0]))

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped, as the tokenizer sees it; two with --contrast."""
        count = 2 if config.contrast else 1
        return (ViewSpec(name="image", count=count, size=image_size, scale=config.crop_scale, network="tokenizer"),)

    def exported(self) -> Backbone:
        """The tokenizer and the encoder after it."""
        return with_tokenizer(vit_of(self.encoder, "mage"), self.tokenizer)

    def embed(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Of each image: "token" (B,), its loss; "nll" and "hits" (B,), the cross-entropy without smoothing and the share
        of right predictions; "ids" and "masked" (B, V, N); with --contrast "pooled" (B, V, D), the mean of the encoder's
        patch features."""
        views = batch.views["image"]
        views = views if views.ndim == 5 else views[None]
        count = len(views)
        maps = self.tokenizer.ids(views.flatten(0, 1))
        ids = maps.flatten(1)
        masked, order, dropped, share = self.masks(ids.shape[1], count, step)
        keep = order[:, dropped:]
        shaped = maps[:, None].unflatten(0, (count, -1))
        seen = encode(self.encoder, shaped, step, keep=keep, replace=(masked, self.mask_token))
        grid = (maps.shape[1], maps.shape[2])
        logp = F.log_softmax(self.code_logits(self.decoded(seen, keep, masked, grid)).float(), dim=-1)
        nll = -logp.gather(2, ids[..., None])[..., 0]
        smooth = self.config.label_smoothing
        each = (1 - smooth) * nll - smooth * logp.mean(-1)
        weight = masked / share

        def of_images(values: Tensor) -> Tensor:
            return (values * weight).sum(1).unflatten(0, (count, -1)).mean(0)

        found = {
            "token": of_images(each),
            "nll": of_images(nll.detach()),
            "hits": of_images((logp.detach().argmax(-1) == ids).float()),
            "ids": by_image(ids, count),
            "masked": by_image(masked, count),
        }
        return found if self.projector is None else {**found, "pooled": by_image(seen.pooled, count)}

    def loss(self, embedded: dict[str, Tensor], step: Step) -> Losses:
        """The mean over all images, each the mean over its masked places, whose number is the same in all; with --contrast
        also NT-Xent between the views, times its weight.

        Terms: "accuracy" at the masked places, "majority" and "gain" as `parts.id_prediction` says; with --contrast
        "tokens" and "contrast", the two losses.
        """
        per_sample, codes = embedded["token"], len(self.code_bias)
        found = torch.where(embedded["masked"], embedded["ids"], codes).flatten()
        counts = per_sample.new_zeros(codes + 1).scatter_add_(0, found, torch.ones_like(found, dtype=per_sample.dtype))
        terms = prediction_terms(counts[:codes], embedded["hits"].mean(), embedded["nll"].mean())
        if self.projector is not None:
            first, second = self.projector(embedded["pooled"]).unbind(1)
            each = contrast(first, second, self.config.contrast_temperature).unflatten(0, (2, -1)).mean(0)
            terms |= {"tokens": per_sample.detach().mean(), "contrast": each.detach().mean()}
            per_sample = per_sample + self.config.contrast_weight * each
        return Losses(total=per_sample.mean(), terms=terms, per_sample=per_sample.detach())

    def masks(self, places: int, views: int, step: Step) -> tuple[Tensor, Tensor, int, Tensor]:
        """For V * B rows of N places: which are masked, bool; the places in random order, of which the first ones do not
        enter the encoder; how many these are; and the number of masked ones () float. The masked ones are the first in
        that order, as many in every row of the global batch."""
        config = self.config
        low, high = config.mask_ratio
        noise = step.rand(views, places).transpose(0, 1).flatten(0, 1)
        bounds = [_below((limit - config.mask_ratio_mean) / config.mask_ratio_std) for limit in (low, high)]
        drawn = bounds[0] + step.shared_rand(1)[0] * (bounds[1] - bounds[0])
        ratio = config.mask_ratio_mean + config.mask_ratio_std * torch.special.ndtri(drawn)
        dropped = min(places - 1, math.ceil(low * places))
        count = (ratio.clamp(low, high) * places).ceil().clamp(max(1, dropped), places)
        order = torch.argsort(noise, dim=1)
        return torch.argsort(order, dim=1) < count, order, dropped, count

    def decoded(self, seen: Features, keep: Tensor, masked: Tensor, grid: tuple[int, int]) -> Tensor:
        """The decoder's features (B, N, D) of all places. Masked ones begin as the encoded class token."""
        assert seen.tokens is not None
        tokens = self.decoder_embed(seen.tokens)
        prefix, tokens = tokens.split([tokens.shape[1] - keep.shape[1], keep.shape[1]], dim=1)
        first = prefix[:, :1]
        x = put(first.expand(-1, masked.shape[1], -1), keep, tokens)
        x = torch.where(masked[..., None], first, x)
        positions = self.decoder_pos_embed
        if grid != self.grid:
            positions = sincos_table(grid, self.encoder.dim)[None].to(x.device)
        x = torch.cat([prefix, x + positions.to(x.dtype)], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x[:, prefix.shape[1] :])

    def code_logits(self, features: Tensor) -> Tensor:
        """Logits (B, N, K): similarities to the encoder's vectors of the codes, which get no gradient here."""
        vectors: Tensor = self.encoder.patch_embed.proj.weight  # type: ignore[assignment, union-attr]
        return F.linear(self.code_norm(F.gelu(self.code_fc(features))), vectors.detach(), self.code_bias)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The codes' frequencies, predicted of every place; and one code for all."""
        return {"gain": (0.0, NO_BETTER), "majority": (1.0, ONE_CODE)}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The crop, and the places that are not masked in this step (masked ones grey)."""
        views = batch.views["image"]
        images = views if views.ndim == 4 else views[0]
        grid = self.tokenizer.ids(images).shape[1:]
        masked = self.masks(grid[0] * grid[1], 1 if views.ndim == 4 else 2, step)[0][: len(images)]
        patch = (images.shape[-2] // grid[0], images.shape[-1] // grid[1])
        return {"view": images, "masked": without(images, masked, patch)}


def _below(x: float) -> float:
    """The share of a standard normal distribution below x."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
