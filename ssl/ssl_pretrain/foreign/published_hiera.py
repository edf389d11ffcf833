"""Reads Hiera's checkpoints, as its authors released them and in timm's names, into our Hiera.

Weights show the widths, the number of blocks and the image size. They do not show the number of heads, which is that of the
released model of this width, and of poolings: 2 in a file with MAE's decoder, else 3.
"""

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backbones
from ..backbones.backbone import Backbone
from ..errors import UserError
from .weights import difference

HEADS = {96: 1, 112: 2, 144: 2, 256: 4}  # of the first stage, by its width
STRIDE = 4  # of the stem
# Heads, and what only pretraining uses: a decoder, and a fusion of the stages whose norm (encoder_norm) fits nothing else.
BESIDE = re.compile(r"(head\.(fc|projection)\.|decoder|mask_token$|encoder_norm\.|multi_scale_fusion_heads\.)")


def fits(inside: Mapping[str, Tensor]) -> bool:
    """Whether these are a Hiera's: some blocks have a linear layer as shortcut."""
    return any(re.fullmatch(r"blocks\.\d+\.proj\.weight", name) for name in inside)


def read(
    inside: Mapping[str, Tensor], heads: int | None, image_size: tuple[int, int] | None, file: Path
) -> tuple[Backbone, str, dict[str, Any]]:
    """The encoder of weights without the prefix of the file's part: the backbone, its name and entries of `lineage`.

    heads, image_size: as `published.read` takes them. A pretraining file has no norm of the last stage, and gets one as at
    the start of fine-tuning. Raises UserError for a Hiera of another form, and for names and shapes that do not fit.
    """
    extra = [name for name in inside if BESIDE.match(name)]
    weights = {re.sub(r"^head\.norm\.", "norm.", n): v.float() for n, v in inside.items() if n not in extra}
    patch, table = weights["patch_embed.proj.weight"], weights.get("pos_embed")
    if patch.ndim != 4 or patch.shape[2:] != (2 * STRIDE - 1, 2 * STRIDE - 1):
        raise UserError(
            f"{file} has a patch embedding of shape {tuple(patch.shape)}; that of a Hiera for images is 7 x 7"
        )
    side = 0 if table is None or table.ndim != 3 else math.isqrt(table.shape[1])
    if table is None or side * side != table.shape[1]:
        raise UserError(f"{file} has no learned positions of a square grid (pos_embed), as a Hiera for images has")
    dim = len(patch)
    if (heads := heads or HEADS.get(dim)) is None:
        raise UserError(f"{file} is no released Hiera: give the number of heads of its first stage: torch:FILE,heads=N")
    pretrained = any(name.startswith("decoder") for name in extra)
    options: dict[str, Any] = {
        "embed_dim": dim,
        "heads": heads,
        "depths": _depths(weights),
        "q_pool": 2 if pretrained else 3,
    }
    name = _name(options)
    native = (side * STRIDE, side * STRIDE)
    with torch.random.fork_rng(devices=[]):
        backbone = backbones.build(name, image_size=image_size or native, **options)
    lineage: dict[str, Any] = {
        "method": "mae" if pretrained else "hiera",
        "left_out": sorted({re.sub(r"\.\d+\.", ".*.", each) for each in extra}),
    }
    if pretrained and "norm.weight" not in weights:
        weights |= {"norm.weight": torch.ones(backbone.dim), "norm.bias": torch.zeros(backbone.dim)}
        lineage["new"] = ["norm.weight", "norm.bias"]
    weights = backbone.adapt(weights, native)
    if problem := difference(backbone.state_dict(), weights):
        raise UserError(f"{file} does not fit a Hiera (width {dim}, blocks {options['depths']}): {problem}")
    backbone.load_state_dict(weights)
    return backbone, name, lineage


def _depths(weights: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The number of blocks of each stage; a stage begins where a block changes the width."""
    blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    starts = [i for i in range(blocks) if f"blocks.{i}.proj.weight" in weights]
    return tuple(after - before for before, after in itertools.pairwise([0, *starts, blocks]))


def _name(options: Mapping[str, Any]) -> str:
    """The size with these widths and blocks, else any size, because all options are given."""
    sizes = [name for name in backbones.own() if name.startswith("hiera_") and name != "hiera_micro"]
    same = [n for n in sizes if all(backbones.defaults(n)[k] == options[k] for k in ("embed_dim", "depths"))]
    return same[0] if same else "hiera_base"
