"""The Swin Transformer V2 in published files: the authors' names (also of SimMIM), timm's and transformers', in ours.

Weights do not depend on the side of the windows. The authors' files have tables of offsets beside the weights, from which
it is read; timm and transformers state it. Shapes: S stages, W positions a side of a window.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backbones
from ..backbones.swin import FAR, NORM_EPS
from ..errors import UserError

SCALE = re.compile(r"(encoder\.)?layers\.(\d+)\.blocks\.(\d+)\.(attn|attention\.self)\.logit_scale$")
# Tables that follow from the sizes, and what belongs to pretraining or to a classifier.
BESIDE = re.compile(
    r"(.*\.(relative_coords_table|relative_position_index|attn_mask|k_bias)$|mask_token$|embeddings\.mask_token$|head\.|"
    r"classifier\.|decoder\.)"
)
RENAMED = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layers\.", "layers."),
    (r"\.attention\.self\.continuous_position_bias_mlp\.", ".attn.cpb_mlp."),
    (r"\.attention\.self\.query\.bias$", ".attn.q_bias"),
    (r"\.attention\.self\.value\.bias$", ".attn.v_bias"),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.rpe_mlp\.", ".cpb_mlp."),  # older files
)


@dataclass(frozen=True)
class Found:
    """What a file says."""

    weights: dict[str, Tensor]  # under our names, float32
    options: dict[str, Any]  # of `backbones.build`, and `in_chans`
    size: tuple[int, int]  # of the images (height, width) that it was trained on
    left_out: list[str]  # names in the file

    @property
    def name(self) -> str:
        """The size in swin.py with that width and depth, else any, because all options are given."""
        known = [name for name in backbones.own() if name.startswith("swin_")]
        same = [n for n in known if all(backbones.defaults(n)[k] == self.options[k] for k in ("dim", "depths"))]
        return same[0] if same else "swin_base"


def is_swin(names: Iterable[str]) -> bool:
    """Whether an encoder's weights are those of a Swin Transformer V2."""
    return any(SCALE.match(name) for name in names)


def timm_facts(module: Any) -> dict[str, Any]:
    """What a model of timm says of itself, under transformers' names."""
    first = [stage.blocks[0] for stage in module.layers]
    return {
        "window_size": max(max(block.window_size) for block in first),
        "pretrained_window_sizes": [block.attn.pretrained_window_size[0] for block in first],
        "image_size": list(module.patch_embed.img_size),
        "layer_norm_eps": module.norm.eps,
    }


def read(inside: Mapping[str, Tensor], facts: Mapping[str, Any], file: Path) -> Found:
    """The weights, options and image size of an encoder's part of a file. facts: what transformers' config.json says of
    it, or the same of another library; empty for the authors' files.

    Raises UserError for a file that does not show the windows, and for norms with another epsilon than 1e-5.
    """
    left_out = [name for name in inside if BESIDE.match(name)]
    weights = _renamed({name: value for name, value in inside.items() if name not in left_out})
    heads: dict[int, int] = {}
    depths: dict[int, int] = {}
    for name, value in weights.items():
        if (found := SCALE.match(name)) is not None:
            stage = int(found[2])
            heads[stage], depths[stage] = value.numel(), max(depths.get(stage, 0), int(found[3]) + 1)
    stages = sorted(depths)
    weight = weights["patch_embed.proj.weight"]
    patch = weight.shape[2]
    if not math.isclose(facts.get("layer_norm_eps", NORM_EPS), NORM_EPS):
        raise UserError(f"{file} has norms with epsilon {facts['layer_norm_eps']:g}, and our Swin has {NORM_EPS:g}")
    if "window_size" in facts:
        side = facts.get("image_size", 224)
        size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[-1]))
        window = int(facts["window_size"])
        stated = facts.get("pretrained_window_sizes") or (0,) * len(stages)
        trained = [
            int(given) or max(2, min(window, max(size) // (patch * 2**stage)))
            for stage, given in zip(stages, stated, strict=True)
        ]
    else:
        window, trained, size = _of_tables(inside, stages, patch, file)
    options = {
        "in_chans": weight.shape[1],
        "dim": len(weight),
        "depths": tuple(depths[stage] for stage in stages),
        "heads": tuple(heads[stage] for stage in stages),
        "window": window,
        "pretrained_windows": tuple(trained),
        "patch_size": patch,
    }
    return Found(weights, options, size, left_out)


def _renamed(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names, float32."""
    weights = {}
    for name, value in given.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        weights[name] = value.float()
    merging = sorted({int(name.split(".")[1]) for name in weights if re.match(r"layers\.\d+\.downsample\.", name)})
    if merging and merging[0] == 1:  # timm: before a stage, not after one
        weights = {
            re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name): value
            for name, value in weights.items()
        }
    for scale in [name for name in weights if SCALE.match(name)]:
        attn = scale.removesuffix("logit_scale")
        parts = [f"{attn}{word}.weight" for word in ("query", "key", "value")]
        if all(part in weights for part in parts):
            weights[f"{attn}qkv.weight"] = torch.cat([weights.pop(part) for part in parts])
        if f"{attn}q_bias" not in weights and f"{attn}v_bias" not in weights and f"{attn}qkv.weight" in weights:
            width = weights[f"{attn}qkv.weight"].shape[1]  # without biases
            weights |= {f"{attn}{letter}_bias": torch.zeros(width) for letter in "qv"}
    return weights


def _of_tables(
    inside: Mapping[str, Tensor], stages: list[int], patch: int, file: Path
) -> tuple[int, list[int], tuple[int, int]]:
    """The side of the windows, those of training by stage, and the image size, from the tables in the authors' files:
    log-spaced offsets (1, 2 W - 1, 2 W - 1, 2), and the mask of shifted windows (number of windows, W * W, W * W)."""
    sides, trained = [], []
    for stage in stages:
        table = inside.get(f"layers.{stage}.blocks.0.attn.relative_coords_table")
        if table is None:
            raise UserError(
                f"{file} does not show the side of its windows: read it as a model of timm "
                f"(timm:NAME,checkpoint={file}), or as a folder of transformers, which state it"
            )
        side = (table.shape[1] + 1) // 2
        largest = 2 ** (float(table.max()) * math.log2(FAR)) - 1
        sides.append(side)
        trained.append(max(2, round(FAR * (side - 1) / largest) + 1) if largest > 0 else 2)
    mask = inside.get("layers.0.blocks.1.attn_mask")
    across = 1 if mask is None else math.isqrt(len(mask))
    pixels = across * sides[0] * patch
    return max(sides), trained, (pixels, pixels)
