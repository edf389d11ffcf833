"""iGPT (Chen et al., "Generative Pretraining from Pixels", ICML 2020), Toto's images (Rajasegaran et al., 2025), and the
order by scale of VAR (Tian et al., NeurIPS 2024).

An image is a sequence of ids: of the nearest colours of a palette, or of a frozen tokenizer. A causal encoder predicts each
id from those before it, or all ids of a scale from those of the coarser ones. Features come from a middle block. Shapes: B
images, C channels, N ids on an (h, w) grid, K codes, D encoder width, S scales with L ids.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_pretrain import distributed
from ssl_pretrain.backbones.backbone import Backbone
from ssl_pretrain.backbones.quantizer import Quantizer
from ssl_pretrain.backbones.scale_stem import reading
from ssl_pretrain.backbones.scales import Levels
from ssl_pretrain.backbones.token_stem import Palette, shuffled
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.flags import ABOVE_0_TO_1, AT_LEAST_1, within
from ssl_pretrain.frozen import NONE, Frozen
from ssl_pretrain.parts.codebook import kmeans
from ssl_pretrain.parts.id_prediction import NO_BETTER, ONE_CODE, prediction_terms
from ssl_pretrain.parts.patches import unpatchify
from ssl_pretrain.parts.token_stem import begin_with, vit_of, with_tokenizer
from ssl_pretrain.parts.views import encode
from ssl_pretrain.pretext import Batch, Losses, Method, Recipe, Step

SAMPLED = 64  # colours of an image from which the palette is made


@final
class IGPT(Method):
    """Predict the next id; the loss is the mean cross-entropy over all ids, the first one included.

    Defaults are the paper's (section 3 and appendix). Raises UserError for options out of range, and
    UnsupportedByBackbone for an encoder that is no ViT.
    """

    tokenizer: Frozen | Palette
    head: nn.Linear
    started: Tensor

    recipe = Recipe(
        lr=3e-3,
        lr_batch=128,
        lr_scaling="none",
        betas=(0.9, 0.95),
        weight_decay=0.0,
        warmup=0.01,
        encoder={"rms_norm": True, "norm_eps": 1e-5, "qkv_bias": False},
        small={"lr": 2e-3, "steps": 250, "batch_size": 64, "patch_size": 4, "colours": 64},
        tiny={"colours": 16},
    )

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Next-id prediction (iGPT)."""

        ids: Literal["colours", "tokenizer"] = "colours"
        """What is predicted: colours of a palette that the run makes of its first batch (the mean colour of each patch;
        iGPT), or the ids of --tokenizer (Toto)."""
        colours: int = 512
        """With --ids colours: number of colours of the palette."""
        order: Literal["raster", "random", "scale"] = "raster"
        """Order of the ids: by rows, a fixed random order, the same in all images, or from the coarsest scale to the
        finest, of a tokenizer of several (vqtok --scales; VAR)."""
        feature_depth: float = 0.5
        """Share of the blocks after which the features of the exported encoder are taken. The later blocks are not
        exported."""
        crop_scale: tuple[float, float] = (0.4, 1.0)
        """Smallest and largest share of the image's area that a crop covers."""

        def __post_init__(self) -> None:
            within(self, AT_LEAST_1, "colours")
            within(self, ABOVE_0_TO_1, "feature_depth")
            within(self, ABOVE_0_TO_1, "crop_scale", ascending=True)
            if self.order == "scale" and self.ids != "tokenizer":
                raise UserError(
                    "--order scale: colours have one scale; give --ids tokenizer and --tokenizer RUN, a run of vqtok with "
                    "--scales"
                )

    def __init__(self, encoder: Backbone, config: Config) -> None:
        super().__init__(encoder, config)
        vit = vit_of(encoder, "igpt")
        if vit.cls_token is None and config.order != "scale":
            raise UserError(
                "igpt needs an encoder with a class token, from which the first id is predicted: give --cls"
            )
        if vit.config.pool == "cls":
            raise UserError("--pool cls: the class token comes first and sees no image with igpt: give --pool mean")
        if vit.config.norms == "post":
            raise UserError("--norms post: igpt takes features after the first norm of a block: leave it out")
        self.feature_block = max(1, math.floor(config.feature_depth * vit.depth))
        self._has_started = False  # as `started`, once it was read from the device

    @classmethod
    def frozen(cls, config: Any) -> tuple[str, ...]:
        """The tokenizer, if its ids are predicted."""
        return ("tokenizer",) if config.ids == "tokenizer" else ()

    def prepare(self, images: int, networks: Mapping[str, Frozen] = NONE) -> None:
        """Keep the tokenizer, or add the palette. The encoder reads ids from now on."""
        if self.config.ids == "tokenizer":
            self.tokenizer = networks["tokenizer"]
        else:
            self.tokenizer = Palette(self.encoder.stride, self.config.colours, self.encoder.in_chans)
            self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        by_scale = self.config.order == "scale"
        self.encoder = vit = begin_with(self.encoder, self.tokenizer, "igpt", by_scale=by_scale)
        self.head = nn.Linear(vit.dim, _codes(self.tokenizer), bias=False)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    @classmethod
    def views(cls, config: Any, image_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
        """One random resized crop, flipped; as the tokenizer sees it, if there is one."""
        network = "tokenizer" if config.ids == "tokenizer" else None
        return (ViewSpec(name="image", size=image_size, scale=config.crop_scale, network=network),)

    def exported(self) -> Backbone:
        """The tokenizer and the encoder's blocks up to the one of the features."""
        return with_tokenizer(
            vit_of(self.encoder, "igpt"),
            self.tokenizer,
            feature_block=self.feature_block,
            attention="causal",
            order=self.config.order,
        )

    def forward(self, batch: Batch, step: Step) -> Losses:
        """The mean cross-entropy of all ids; `per_sample` is each image's.

        Terms: "bits", the loss in bits an id, with several scales also of each of them, "bits_SIDE"; "accuracy", "majority"
        and "gain" as `parts.id_prediction` says.
        """
        images = batch.views["image"]
        by_scale = self.config.order == "scale"
        ids, logits = self.predict_scales(images, step) if by_scale else self.predict(self.maps(images), step)
        each = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view(ids.shape)
        counts = each.new_zeros(logits.shape[-1]).scatter_add_(0, ids.flatten(), torch.ones_like(each).flatten())
        accuracy, per_sample = (logits.argmax(-1) == ids).float().mean(), each.mean(1)
        terms = prediction_terms(counts, accuracy, each.detach().mean())
        bits = {"bits": each.detach().mean() / math.log(2)}
        if by_scale:
            sides, shapes = self._scales(images)
            parts = each.detach().split([h * w for h, w in shapes], dim=1)
            bits |= {f"bits_{side}": part.mean() / math.log(2) for side, part in zip(sides, parts, strict=True)}
        return Losses(
            total=per_sample.mean(),
            terms={**bits, **terms},
            per_sample=per_sample.detach(),
            carry=self._colours(images, step) if isinstance(self.tokenizer, Palette) else {},
        )

    def maps(self, images: Tensor) -> Tensor:
        """The ids (B, h, w) of images (B, C, H, W)."""
        return self.tokenizer(images) if isinstance(self.tokenizer, Palette) else self.tokenizer.ids(images)

    def predict(self, maps: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Ids (B, N) in their order, and the logits (B, N, K) float32 of each one from those before it."""
        ids = maps.flatten(1)
        options: dict[str, Any] = {"attention": "causal"}
        if self.config.order == "random":
            order = shuffled(ids.shape[1]).to(ids.device, non_blocking=True)
            ids, options["keep"] = ids.index_select(1, order), order.expand(len(ids), -1)
        tokens = encode(self.encoder, maps[:, None], step, **options).tokens
        assert tokens is not None
        before = tokens.shape[1] - ids.shape[1] - 1  # the last prefix token predicts the first id
        return ids, self.head(tokens[:, before:-1]).float()

    def predict_scales(self, images: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Ids (B, L) of all scales of images, the coarsest first, and the logits (B, L, K) float32 of each one from those
        of the coarser scales."""
        assert isinstance(self.tokenizer, Frozen)
        levels, grid = self.tokenizer.levels(images)
        return levels.ids, self.predict_levels(levels, grid, step)

    def predict_levels(self, levels: Levels, grid: tuple[int, int], step: Step) -> Tensor:
        """The logits (B, L, K) float32 of all ids of levels, whose finest scale has this grid."""
        maps, how = reading(vit_of(self.encoder, "igpt"), levels, grid)
        logits: Tensor = self.head(encode(self.encoder, maps, step, **how).patches).float()
        return logits

    def _scales(self, images: Tensor) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """The sides of the tokenizer's scales, and their grids of images."""
        assert isinstance(self.tokenizer, Frozen)
        assert isinstance(self.tokenizer.quantizer, Quantizer)
        assert self.tokenizer.quantizer.scales is not None
        height, width = (side // step for side, step in zip(images.shape[2:], self.tokenizer.sight.stride, strict=True))
        return self.tokenizer.quantizer.scales.sides, self.tokenizer.quantizer.scales.shapes((height, width))

    def _colours(self, images: Tensor, step: Step) -> dict[str, Tensor]:
        """Random patches' colours of each image, and the images' rows in the global batch."""
        assert isinstance(self.tokenizer, Palette)
        found = self.tokenizer.colours_of(images)
        order = torch.argsort(step.rand(found.shape[1]), dim=1)[:, :SAMPLED]
        rows = torch.arange(step.batch_size, device=images.device)[step.rows]
        return {"colours": found.gather(1, order[..., None].expand(-1, -1, found.shape[2])), "rows": rows}

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Make the palette of the colours of the first step's batch, by k-means; it is fixed from then on."""
        if not isinstance(self.tokenizer, Palette):
            return
        # Read from the device until it is true, in the first two steps. A first step that was skipped starts nothing.
        self._has_started = self._has_started or bool(self.started)
        if self._has_started:
            return
        order = torch.argsort(distributed.gather(step.carried["rows"]))
        colours = distributed.gather(step.carried["colours"]).index_select(0, order).flatten(0, 1)
        made, _ = kmeans(colours, self.tokenizer.codes, step.generator(), unit=False)
        self.tokenizer.colours.copy_(torch.where(step.ok, made, self.tokenizer.colours))
        self.started.logical_or_(step.ok)

    def collapsed(self, batch_size: int) -> dict[str, tuple[float, str]]:
        """The codes' frequencies, predicted of every place; and one code for all."""
        return {"gain": (0.0, NO_BETTER), "majority": (1.0, ONE_CODE)}

    @torch.no_grad()
    def pictures(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The crop; with a palette also the crop in its colours, and each patch as predicted from those before it."""
        images = batch.views["image"]
        if not isinstance(self.tokenizer, Palette):
            return {"input": images}
        maps = self.maps(images)
        ids, logits = self.predict(maps, step)
        back = torch.argsort(shuffled(ids.shape[1]).to(ids.device)) if self.config.order == "random" else slice(None)
        shown = {"palette": maps.flatten(1), "prediction": logits.argmax(-1)[:, back]}
        stride = self.tokenizer.stride
        area = stride[0] * stride[1]
        return {"input": images} | {
            name: unpatchify(
                F.embedding(found, self.tokenizer.colours).repeat(1, 1, area), stride, (maps.shape[1], maps.shape[2])
            )
            for name, found in shown.items()
        }


def _codes(tokenizer: Frozen | Palette) -> int:
    """The number of codes."""
    if isinstance(tokenizer, Palette):
        return tokenizer.codes
    assert tokenizer.quantizer is not None
    return tokenizer.quantizer.size
