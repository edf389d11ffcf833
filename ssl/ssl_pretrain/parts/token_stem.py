"""An encoder that reads a frozen tokenizer's ids, while it is trained and as it is exported.

In training the encoder is the ViT alone, and the tokenizer is a `Frozen`: in no checkpoint, optimiser or gradient bucket.
The export holds both (`backbones.token_stem`), so that it takes images.
"""

import json
from typing import Any

from ..backbones.backbone import Backbone, UnsupportedByBackbone
from ..backbones.quantizer import Quantizer
from ..backbones.scale_stem import read_scales_of
from ..backbones.token_stem import FrozenTokenizer, Palette, TokenStem, read_ids
from ..backbones.vit import ViT
from ..errors import UserError
from ..frozen import Frozen


def vit_of(encoder: Backbone, method: str) -> ViT:
    """The encoder, which must be a ViT. method: for the message. Raises UnsupportedByBackbone for another, and UserError
    for one with another stem than a linear layer, which ids do not pass."""
    if not isinstance(encoder, ViT):
        raise UnsupportedByBackbone(
            f"{method} needs an encoder that supports ids in the place of patches, and {type(encoder).__name__} does not: "
            f"use a ViT (--encoder vit_small)"
        )
    if encoder.config.stem != "linear":
        raise UserError(f"--stem {encoder.config.stem}: {method} reads ids in the place of patches; leave --stem out")
    return encoder


def begin_with(encoder: Backbone, tokenizer: Frozen | Palette, method: str, *, by_scale: bool = False) -> ViT:
    """The encoder, which from now on takes maps (B, 1, h, w) of the tokenizer's ids (`backbones.token_stem.read_ids`), or
    the sums of all its scales (`backbones.scale_stem.read_scales_of`). Raises UserError for one that is no ViT, for a
    tokenizer that no export may name, and with `by_scale` for one of one scale."""
    vit = vit_of(encoder, method)
    if isinstance(tokenizer, Palette):
        read_ids(vit, tokenizer.codes)
        return vit
    assert tokenizer.quantizer is not None
    if tokenizer.backbone.name.startswith("module:"):
        raise UserError(
            f"--tokenizer {tokenizer.spec} is made by your own code ({tokenizer.backbone.name}), which the export of "
            f"{method} would have to import: use a tokenizer with an encoder of this package"
        )
    if by_scale:
        quantizer = tokenizer.quantizer
        if not isinstance(quantizer, Quantizer) or quantizer.scales is None:
            raise UserError(
                f"--order scale: --tokenizer {tokenizer.spec} has one scale; train one of several with --method vqtok "
                f"--scales"
            )
        read_scales_of(vit, quantizer.scales.sides, quantizer.width)
    else:
        read_ids(vit, tokenizer.quantizer.size)
    return vit


def with_tokenizer(vit: ViT, tokenizer: Frozen | Palette, **options: Any) -> TokenStem:
    """What a method exports: the tokenizer and the ViT after it, both as they are now. options: of `TokenStem.Config`."""
    without = {"drop_path": 0.0, "drop_path_uniform": False, "drop_rows": False}  # of training only
    described = {"palette": tokenizer.describe()} if isinstance(tokenizer, Palette) else _described(tokenizer)
    # Plain data, as config.json will have it.
    plain = json.loads(json.dumps({"options": vit.describe() | without, "tokenizer": described}))
    config = TokenStem.Config(encoder=vit.name, **plain, **options)
    frozen: FrozenTokenizer | Palette
    if isinstance(tokenizer, Palette):
        frozen = tokenizer
    else:
        assert isinstance(tokenizer.quantizer, Quantizer)  # a view without `reads` has no stored ids
        frozen = FrozenTokenizer(tokenizer.backbone, tokenizer.quantizer, tokenizer.own, tokenizer.run)
    rows, columns = (side * step for side, step in zip(vit.grid, frozen.stride, strict=True))
    return TokenStem((rows, columns), frozen.in_chans, config, vit=vit, tokenizer=frozen)


def _described(tokenizer: Frozen) -> dict[str, Any]:
    """A tokenizer as `TokenStem.Config.tokenizer`."""
    inner, quantizer = tokenizer.backbone, tokenizer.quantizer
    assert isinstance(quantizer, Quantizer)
    backbone = {"name": inner.name, "image_size": inner.image_size, "in_chans": inner.in_chans}
    return {
        "backbone": {**backbone, "options": inner.describe()},
        "quantizer": quantizer.describe(),
        "own": tokenizer.own,
        "given": tokenizer.run,
    }
