"""Reads published checkpoints of ConvNeXt, ConvNeXt V2 and ResNet into our backbones: the names of their authors (with
the encoders of SparK and FCMAE), of timm and torchvision, and of transformers.

As in `published`, the layout is detected from names, and the rest is renaming, which is strict.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backbones
from ..backbones.forms import FROM_CONVNEXT
from ..encoder import Encoder, Preprocessing
from ..errors import UserError
from .weights import difference

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std that all of them were trained with
SIZE = (224, 224)


@dataclass(frozen=True)
class Layout:
    """Names of one source."""

    stem: str  # the weight of the first convolution
    block: str  # another weight, which tells the architecture
    rules: tuple[tuple[str, str], ...]  # patterns and replacements that make the names ours


LAYOUTS = {
    "convnext": Layout(
        "downsample_layers.0.0.weight",
        "stages.0.0.dwconv.weight",
        (
            (r"^downsample_layers\.0\.", "stem."),
            (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
            (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.dwconv\.", ".conv_dw."),
            (r"\.pwconv", ".mlp.fc"),
            (r"\.grn\.gamma$", ".mlp.grn.weight"),
            (r"\.grn\.beta$", ".mlp.grn.bias"),
        ),
    ),
    "timm": Layout("stem.0.weight", "stages.0.blocks.0.conv_dw.weight", ((r"^head\.norm\.", "norm."),)),
    "transformers": Layout(
        "embeddings.patch_embeddings.weight", "encoder.stages.0.layers.0.dwconv.weight", FROM_CONVNEXT
    ),
    "resnet": Layout("conv1.weight", "layer1.0.conv1.weight", ()),
}
# Beside the encoder in the same part of a file: classifiers, and FCMAE's decoder.
BESIDE = re.compile(
    r"(fc|head\.(fc\.)?)\.?(weight|bias)$|classifier\.|(proj|pred)\.(weight|bias)$|decoder\.|mask_token$"
)


def find(everything: Mapping[str, Tensor], part: str | None) -> tuple[str, str] | None:
    """The layout of the convnet in a file, by its weights' names, and the prefix of its names; None without one, or where
    it is not in the part that is asked for."""
    for kind, layout in LAYOUTS.items():
        for name in everything:
            prefix = name.removesuffix(layout.stem)
            if prefix == name or (prefix and not prefix.endswith(".")) or prefix + layout.block not in everything:
                continue
            if part is None or part in (*prefix.split("."), prefix.rstrip(".")):
                return kind, prefix
    return None


def read(
    everything: Mapping[str, Tensor],
    found: tuple[str, str],
    file: Path,
    *,
    image_size: tuple[int, int] | None = None,
    stated: Preprocessing | None = None,
    partial: bool = False,
) -> Encoder:
    """The convnet that `find` found, in eval mode. image_size, partial: as in `published.read`. stated: the preprocessing
    that the file's folder states; ImageNet's without it.

    A file of pretraining may lack the final norm of a ConvNeXt. It is then at its start (1 and 0), and
    `lineage["missing"]` says so. Raises UserError for weights that do not fit name for name, with the difference.
    """
    kind, prefix = found
    inside = {name.removeprefix(prefix): value for name, value in everything.items() if name.startswith(prefix)}
    extra = sorted(name for name in inside if BESIDE.match(name))
    weights = {_renamed(name, kind): value for name, value in inside.items() if name not in extra}
    name, options = _resnet(weights, file) if kind == "resnet" else _convnext(weights)
    size = image_size or (stated.crop if stated is not None else SIZE)
    channels = inside[LAYOUTS[kind].stem].shape[1]
    with torch.random.fork_rng(devices=[]):
        backbone = backbones.build(name, image_size=size, in_chans=channels, **options)
    own = backbone.state_dict()
    lacking = {n: v for n, v in own.items() if n.startswith("norm.") or n.endswith(".num_batches_tracked")}
    weights = {n: _fitted(v, own.get(n)) for n, v in weights.items()}
    missing = sorted(n for n in lacking if n not in weights and n.startswith("norm."))
    weights = {**lacking, **weights}
    problem = difference(own, weights)
    if problem and not partial:
        raise UserError(f"{file} does not fit a {type(backbone).__name__} ({name}): {problem}")
    fitting = {n: value for n, value in weights.items() if n in own and value.shape == own[n].shape}
    backbone.load_state_dict(own | fitting)
    lineage: dict[str, Any] = {
        "method": kind,
        "weights": str(file),
        "part": prefix.rstrip(".") or "all",
        "left_out": sorted({re.sub(r"\.\d+\.", ".*.", n) for n in extra}),
        "left_out_of_other_parts": len(everything) - len(inside),
    }
    missing += sorted(own.keys() - fitting.keys()) if problem else []
    lineage |= {"unfit": problem} if problem else {}
    lineage |= {"missing": missing} if missing else {}
    lineage |= {"preprocessing": "as transformers' preprocessor_config.json states"} if stated is not None else {}
    channel_scales = IMAGENET if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    return Encoder(backbone, name, stated or Preprocessing.for_size(size, *channel_scales), lineage).eval()


def _renamed(name: str, kind: str) -> str:
    for pattern, replacement in LAYOUTS[kind].rules:
        name = re.sub(pattern, replacement, name)
    return name


def _fitted(value: Tensor, own: Tensor | None) -> Tensor:
    """Weights in the shape of ours, where only sides of 1 differ: linear layers as 1x1 convolutions (timm), vectors as
    (1, 1, 1, c)."""
    same = own is not None and [n for n in value.shape if n != 1] == [n for n in own.shape if n != 1]
    return value.reshape(own.shape).float() if same and own is not None and value.is_floating_point() else value


def _convnext(weights: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The name of a size and its options, from weights under our names."""
    stem = weights["stem.0.weight"]
    dims = [stem.shape[0], *(len(weights.get(f"stages.{i}.downsample.1.weight", ())) for i in (1, 2, 3))]
    grn = "stages.0.blocks.0.mlp.grn.weight" in weights
    options = {
        "dims": tuple(dims),
        "depths": _depths(weights, r"stages\.{}\.blocks\.(\d+)\.", range(4)),
        "stem_patch": stem.shape[2],
        "grn": grn,
        "layer_scale": 1e-6 if "stages.0.blocks.0.gamma" in weights else None,
    }
    return _name(options, "convnext", "convnextv2_tiny" if grn else "convnext_tiny"), options


def _resnet(weights: Mapping[str, Tensor], file: Path) -> tuple[str, dict[str, Any]]:
    """The name of a size and its options."""
    stem = weights["conv1.weight"]
    if stem.ndim != 4 or stem.shape[2] not in (3, 7):
        raise UserError(f"{file} has a stem of shape {tuple(stem.shape)}, and our ResNet's are 7x7 or 3x3 convolutions")
    options = {
        "bottleneck": "layer1.0.conv3.weight" in weights,
        "depths": _depths(weights, r"layer{}\.(\d+)\.", range(1, 5)),
        "width": stem.shape[0],
        "stem": "imagenet" if stem.shape[2] == 7 else "small",
    }
    return _name(options, "resnet", "resnet50" if options["bottleneck"] else "resnet18"), options


def _depths(weights: Mapping[str, Tensor], pattern: str, stages: range) -> tuple[int, ...]:
    """The number of blocks of each stage; at least 1, so that a stage without weights is named as missing."""
    matches = [[int(m[1]) for n in weights if (m := re.match(pattern.format(i), n))] for i in stages]
    return tuple(1 + max(numbers, default=0) for numbers in matches)


def _name(options: Mapping[str, Any], family: str, other: str) -> str:
    """The size of a family that has these options, else any, because all options are given."""
    for name in backbones.own():
        config: Any = backbones.config_class(name)
        fields = config.__dataclass_fields__ if name.startswith(family) else {}
        if fields and all(backbones.defaults(name).get(n, fields[n].default) == v for n, v in options.items()):
            return name
    return other
