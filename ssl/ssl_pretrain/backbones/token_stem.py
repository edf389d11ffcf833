"""An encoder whose stem is a tokenizer: a frozen tokenizer, or a palette of colours, turns images into ids, and a ViT reads
vectors of these ids.

Methods that train on ids (MAGE, iGPT) export it, so that their encoder takes images as any other. Its weights include the
tokenizer's, as buffers: nothing trains them. Its name is "tokens:NAME", where NAME is the ViT's.

Shapes: B images, C channels, H x W pixels, N ids on an (h, w) grid, K codes, D width of the ViT.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.sampler import permute
from ..errors import UserError
from ..randomness import key
from . import build, prefix
from .backbone import Backbone, Features
from .nearest_codes import nearest, without_autocast
from .quantizer import Quantizer
from .scale_stem import by_scale, read_scales_of
from .scales import Levels, read_scales
from .vit import ViT

MOST = 2**28  # numbers in a codebook that a description may ask for
Scale = tuple[Sequence[float], Sequence[float]]  # mean and std of normalised images, each C numbers


class IdEmbed(nn.Module):
    """A vector for each id, in the place of a ViT's patch embedding. They start normal with deviation 0.02."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Embedding(codes, dim)
        nn.init.normal_(self.proj.weight, std=0.02)

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """Ids (B, 1, h, w) int64 to (B, N, D), or to those of the places `keep` (B, n)."""
        ids = ids.flatten(1)
        return self.proj(ids if keep is None else ids.gather(1, keep))


def read_ids(vit: ViT, codes: int) -> None:
    """From now on the ViT takes maps (B, 1, h, w) int64 of ids below `codes` instead of images, with all options of its
    forward: its patch embedding becomes an `IdEmbed`. `image_size` and `stride` stay those of the images."""
    vit.patch_embed = IdEmbed(codes, vit.dim)  # type: ignore[assignment]
    vit.config, vit.in_chans = replace(vit.config, patch_size=1), 1


def first_blocks(vit: ViT, count: int) -> ViT:
    """The ViT without the blocks after its first `count`, with the same weights. Its last norm is the first one of the
    block that would follow (iGPT's features), or its own if there is none. Raises UserError for a number of blocks that it
    does not have."""
    if not 1 <= count <= vit.depth:
        raise UserError(f"the encoder has {vit.depth} blocks: features are taken after 1 to {vit.depth}, not {count}")
    part = copy.copy(vit)
    part._modules = dict(vit._modules)
    if count < vit.depth:
        part.norm = vit.blocks[count].norm1  # type: ignore[assignment]
    part.blocks = vit.blocks[:count]
    part.depth = count
    return part


def shuffled(places: int) -> Tensor:
    """Fixed random order of N places of a grid, (N,) int64: the same in every run, on every device."""
    return torch.from_numpy(permute(np.arange(places), places, key("order of ids", places)))


@final
class TokenStem(Backbone):
    """A tokenizer and a ViT. Images are normalised as `config.tokenizer` says; their ids are computed in the precision of
    the weights, also under autocast. All options of forward are about the ids.

    Raises UserError for a tokenizer that is made by the user's own code, and for sizes that do not fit.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The encoder (a ViT on the ids of a tokenizer)."""

        encoder: str
        """Name of the ViT."""
        options: dict
        """Options of the ViT."""
        tokenizer: dict
        """The tokenizer: "backbone" (name, image_size, in_chans, options), "quantizer" (its arguments), and mean and std
        of the images that it was trained with ("own") and of those that this encoder gets ("given"). Or a palette:
        "palette" (the arguments of `Palette`)."""
        feature_block: int | None = None
        """Number of the ViT's blocks that are used and exported (none: all). The features are those of the last of them,
        after the norm that follows it."""
        attention: Literal["full", "causal"] = "full"
        """Attention of forward, unless it is told otherwise: full, or causal in the order of the ids."""
        order: Literal["raster", "random", "scale"] = "raster"
        """Order of the ids for causal attention: by rows, a fixed random order, or from the coarsest scale to the finest,
        of a tokenizer of several (`scale_stem`)."""

    supports = frozenset({"keep", "replace", "attention", "blocks", "pooled_only", "attention_maps"})

    def __init__(
        self,
        image_size: tuple[int, int],
        in_chans: int,
        config: Config,
        *,
        vit: ViT | None = None,
        tokenizer: "FrozenTokenizer | Palette | None" = None,
    ) -> None:
        """vit, tokenizer: existing modules to use, of this description (default: new ones). Such a ViT reads ids, and has
        all its blocks."""
        super().__init__()
        self.config, self.image_size, self.in_chans = config, image_size, in_chans
        self.tokenizer = _tokenizer(config.tokenizer) if tokenizer is None else tokenizer
        if config.order == "scale":
            if isinstance(self.tokenizer, Palette) or self.tokenizer.quantizer.scales is None:
                raise UserError("the order by scale needs a tokenizer of several scales")
            self.supports = frozenset({"blocks", "pooled_only"})
        self.stride = self.tokenizer.stride
        if self.tokenizer.in_chans != in_chans:
            raise UserError(f"the tokenizer takes images of {self.tokenizer.in_chans} channels, not {in_chans}")
        if any(side % step or side < step for side, step in zip(image_size, self.stride, strict=True)):
            raise UserError(
                f"images of {image_size[0]} x {image_size[1]} pixels do not divide into the tokenizer's patches of "
                f"{self.stride[0]} x {self.stride[1]}"
            )
        whole = self._new_vit() if vit is None else vit
        self.vit = whole if config.feature_block is None else first_blocks(whole, config.feature_block)
        self.dim, self.depth = self.vit.dim, self.vit.depth
        self.name = f"tokens:{config.encoder}"

    def _new_vit(self) -> ViT:
        grid = (self.image_size[0] // self.stride[0], self.image_size[1] // self.stride[1])
        self.check_name(self.config.encoder)
        vit = build(self.config.encoder, image_size=grid, in_chans=1, **self.config.options)
        if not isinstance(vit, ViT):
            raise UserError(f"tokens:{self.config.encoder}: the encoder behind a tokenizer is a ViT of this package")
        if self.config.order == "scale":
            assert isinstance(self.tokenizer, FrozenTokenizer)
            assert self.tokenizer.quantizer.scales is not None
            read_scales_of(vit, self.tokenizer.quantizer.scales.sides, self.tokenizer.quantizer.width)
        else:
            read_ids(vit, self.tokenizer.codes)
        return vit

    def forward(
        self,
        images: Tensor,
        *,
        keep: Tensor | None = None,
        replace: tuple[Tensor, Tensor] | None = None,
        attention: str | Tensor = "full",
        prefix_length: Tensor | None = None,
        blocks: tuple[int, ...] = (),
        drop: Tensor | None = None,
        pooled_only: bool = False,
        attention_of: tuple[int, ...] = (),
        attention_logits: bool = False,
    ) -> Features:
        """See `Backbone.forward`. `patches` are the ids' places. Raises UserError for images with another number of
        channels, or of a size that the tokenizer does not take."""
        if images.shape[1] != self.in_chans:
            raise UserError(f"the encoder takes images of {self.in_chans} channels, not {images.shape[1]}")
        if self.config.order == "scale":
            assert isinstance(self.tokenizer, FrozenTokenizer)
            self.refuse_options(keep, replace, attention, prefix_length, blocks)
            return by_scale(self.vit, *self.tokenizer.levels(images), blocks=blocks, drop=drop)
        ids = self.tokenizer(images)[:, None]
        if isinstance(attention, str) and attention == "full" and keep is None and self.config.attention == "causal":
            return in_order(
                self.vit,
                ids,
                self.config.order,
                replace=replace,
                blocks=blocks,
                drop=drop,
                attention_of=attention_of,
                attention_logits=attention_logits,
            )
        return self.vit(
            ids,
            keep=keep,
            replace=replace,
            attention=attention,
            prefix_length=prefix_length,
            blocks=blocks,
            drop=drop,
            pooled_only=pooled_only,
            attention_of=attention_of,
            attention_logits=attention_logits,
        )

    def train(self, mode: bool = True) -> "TokenStem":
        """As `nn.Module.train`; the tokenizer stays in evaluation mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    @property
    def norm(self) -> nn.Module:
        """The norm after the last block."""
        return self.vit.norm

    def layer_of(self, parameter: str) -> int:
        """See `Backbone.layer_of`. Raises KeyError for an unknown parameter."""
        part, _, rest = parameter.partition(".")
        return {"vit": self.vit.layer_of}[part](rest)

    def adapt(self, weights: dict[str, Tensor], image_size: tuple[int, int]) -> dict[str, Tensor]:
        """See `Backbone.adapt`: the ViT's tables of positions are resized to this grid of ids."""
        grid = (image_size[0] // self.stride[0], image_size[1] // self.stride[1])
        own = {name.removeprefix("vit."): value for name, value in weights.items() if name.startswith("vit.")}
        return weights | {f"vit.{name}": value for name, value in self.vit.adapt(own, grid).items()}

    @staticmethod
    def check_name(name: str) -> None:
        """Raise UserError unless the name is that of an encoder of this package. Imports nothing."""
        if prefix(name) is not None:
            raise UserError(f"tokens:{name}: the encoder behind a tokenizer is a ViT of this package")


def in_order(vit: ViT, ids: Tensor, order: str, **options: Any) -> Features:
    """Features of ids (B, 1, h, w) with causal attention in an order (`TokenStem.Config.order`); their places are in raster
    order again."""
    if order == "raster":
        return vit(ids, attention="causal", **options)
    sequence = shuffled(ids.shape[2] * ids.shape[3]).to(ids.device)
    seen = vit(ids, keep=sequence.expand(len(ids), -1), attention="causal", **options)
    back = torch.argsort(sequence)

    def sorted_(values: Tensor, dim: int = 1) -> Tensor:
        prefix, places = values.split([values.shape[dim] - len(back), len(back)], dim=dim)
        return torch.cat([prefix, places.index_select(dim, back)], dim=dim)

    return dataclasses.replace(
        seen,
        patches=sorted_(seen.patches),
        tokens=None if seen.tokens is None else sorted_(seen.tokens),
        blocks=tuple(sorted_(each) for each in seen.blocks),
        attention=tuple(sorted_(sorted_(each, 2), 3) for each in seen.attention),
    )


@final
class Palette(nn.Module):
    """Images to ids of the nearest colours: a patch's colour is the mean of its pixels.

    Attributes: `colours` (K, C) of normalised images; `stride`, the pixels of a patch (height, width); `in_chans`, C.
    """

    colours: Tensor

    def __init__(self, stride: Sequence[int], codes: int, in_chans: int) -> None:
        super().__init__()
        self.stride, self.codes, self.in_chans = (stride[0], stride[1]), codes, in_chans
        self.register_buffer("colours", torch.randn(codes, in_chans))

    def describe(self) -> dict[str, Any]:
        """Its arguments."""
        return {"stride": list(self.stride), "codes": self.codes, "in_chans": self.in_chans}

    @torch.no_grad()
    def colours_of(self, images: Tensor) -> Tensor:
        """The colours (B, N, C) float32 of the patches of images (B, C, H, W)."""
        with without_autocast(images.device):
            return F.avg_pool2d(images.float(), self.stride).flatten(2).mT

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Ids (B, h, w) int64 of images (B, C, H, W); of equally near colours the first one."""
        grid = (images.shape[2] // self.stride[0], images.shape[3] // self.stride[1])
        return nearest(self.colours_of(images), self.colours.float()).unflatten(1, grid)


@final
class FrozenTokenizer(nn.Module):
    """Images to ids: an encoder and its quantizer, for images in the normalisation `given` (its own is `own`)."""

    factor: Tensor
    offset: Tensor

    def __init__(self, encoder: Backbone, quantizer: Quantizer, own: Scale, given: Scale) -> None:
        super().__init__()
        self.encoder, self.quantizer = encoder, quantizer
        factor, offset = renormalisation(own, given)
        self.register_buffer("factor", factor, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self._same = _plain(own) == _plain(given)
        self.stride, self.in_chans, self.codes = encoder.stride, encoder.in_chans, quantizer.size
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Ids (B, h, w) int64 of images (B, C, H, W); of several scales those of the finest one."""
        with without_autocast(images.device):
            seen = self._seen(images)
            return self.quantizer.ids(seen.patches, seen.grid)

    @torch.no_grad()
    def levels(self, images: Tensor) -> tuple[Levels, tuple[int, int]]:
        """The ids of all scales of images (B, C, H, W), and the grid of the finest one."""
        with without_autocast(images.device):
            seen = self._seen(images)
            return self.quantizer.levels(seen.patches, seen.grid), seen.grid

    def _seen(self, images: Tensor) -> Features:
        if not self._same:
            like = images.device, images.dtype
            offset, factor = (each.to(*like, non_blocking=True) for each in (self.offset, self.factor))
            images = torch.addcmul(offset, images, factor)
        found: Features = self.encoder(images)
        return found


def renormalisation(own: Scale, given: Scale) -> tuple[Tensor, Tensor]:
    """Factor and offset (C, 1, 1) float32 that turn images of the mean and std `given` into those of `own`: (x * std_given
    + mean_given - mean_own) / std_own."""
    (mean, std), (given_mean, given_std) = (
        tuple(torch.tensor(v, dtype=torch.float64)[:, None, None] for v in pair) for pair in (own, given)
    )
    return (given_std / std).float(), ((given_mean - mean) / std).float()


def _plain(scale: Scale) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(each) for each in scale)


def _tokenizer(described: Mapping[str, Any]) -> FrozenTokenizer | Palette:
    """A tokenizer of this description, whose weights are buffers."""
    if "palette" in described:
        _check_size(described["palette"]["codes"], described["palette"]["in_chans"])
        return Palette(**described["palette"])
    inner, wanted = described["backbone"], described["quantizer"]
    if prefix(inner["name"]) not in (None, "timm"):
        raise UserError(
            f"the stem is a tokenizer on the encoder {inner['name']!r}, and nothing is imported because a file names it"
        )
    height, width = inner["image_size"]
    encoder = build(inner["name"], image_size=(height, width), in_chans=inner["in_chans"], **inner["options"])
    _check_size(wanted["size"], wanted["width"])
    try:
        scales = read_scales(wanted)
    except ValueError as problem:
        raise UserError(f"the tokenizer is not described: {problem}") from None
    quantizer = Quantizer(encoder.dim, wanted["size"], wanted["width"], unit=wanted["unit"], scales=scales)
    made = FrozenTokenizer(encoder, quantizer, described["own"], described["given"])
    for part in made.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            del part._parameters[name]
            part.register_buffer(name, parameter.detach())
    return made


def _check_size(codes: int, width: int) -> None:
    """Raise UserError for a codebook that nobody has."""
    if not 0 < codes * width <= MOST:
        raise UserError(f"the tokenizer has {codes} codes of {width} channels: that is too much")
