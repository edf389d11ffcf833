"""Small encoders of every kind, with noise as weights, for the tests of what other programs open."""

from typing import Any

import torch
from torch import Tensor

from ssl_pretrain import backbones
from ssl_pretrain.encoder import Encoder, Preprocessing

SIZE = (32, 48)
TINY = {"dim": 64, "depth": 2, "heads": 4, "patch_size": 8}
SMALL_CONVNEXT = {"dims": (16, 24, 32, 48), "depths": (1, 1, 2, 1)}
# Options that are expressible, by name of the encoder.
VITS: dict[str, dict[str, Any]] = {
    "plain": {},
    "class token": {"pool": "cls"},
    "no class token": {"cls": False},
    "registers": {"registers": 3},
    "registers, no class token": {"registers": 2, "cls": False},
    "sine-cosine": {"positions": "sincos", "registers": 1},
    "layer scale": {"layer_scale": 0.1},
    "layer scale 0": {"layer_scale": 0.0, "pool": "cls"},
    "query-key norm": {"qk_norm": True},
    "no bias": {"qkv_bias": False},
    "narrow mlp": {"mlp_ratio": 2.5},
    "gated mlp": {"swiglu": True},
    "gated mlp, registers, layer scale": {"swiglu": True, "registers": 4, "layer_scale": 0.1, "mlp_ratio": 3.0},
    "epsilon": {"norm_eps": 1e-5},
    "norm of patches": {"norms": "patches", "qk_norm": True},
    "four channels": {"in_chans": 4},
    "rotary": {"positions": "rope"},
    "rotary, DINOv3": {
        "positions": "rope", "registers": 4, "layer_scale": 0.1, "norm_eps": 1e-5, "pool": "cls", "swiglu": True,
    },
    "rotary, no class token": {"positions": "rope", "cls": False, "qkv_bias": False},
    "parallel branches": {"parallel_branches": 2, "layer_scale": 0.1},
    "relative": {"positions": "relative", "pool": "cls", "qkv_bias": False, "image_size": (32, 32)},
    "relative, one table": {
        "positions": "relative", "pool": "cls", "qkv_bias": False, "shared_relative": True, "image_size": (32, 32),
    },
    "relative, layer scale": {
        "positions": "relative", "pool": "cls", "qkv_bias": False, "layer_scale": 0.1, "image_size": (32, 32),
    },
}  # fmt: skip
CONVNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "convnext": ("convnext_micro", {**SMALL_CONVNEXT, "stem_patch": 4}),
    "convnext, one channel": ("convnext_micro", {**SMALL_CONVNEXT, "stem_patch": 4, "in_chans": 1}),
    "convnext 2": ("convnextv2_micro", {**SMALL_CONVNEXT, "stem_patch": 4}),
    "convnext 2, layer scale": ("convnextv2_micro", {**SMALL_CONVNEXT, "stem_patch": 4, "layer_scale": 0.1}),
    "convnext, no layer scale": ("convnext_micro", {**SMALL_CONVNEXT, "stem_patch": 4, "layer_scale": None}),
    "resnet18": ("resnet18", {"depths": (1, 1, 2, 1)}),
    "resnet50": ("resnet50", {"depths": (1, 2, 1, 1)}),
    "hiera": ("hiera_micro", {}),
    "hiera, two poolings": (
        "hiera_tiny",
        {"embed_dim": 16, "heads": 2, "depths": (1, 1, 2, 1), "q_pool": 2, "in_chans": 1, "image_size": (32, 64)},
    ),
}


def made(name: str, **options: Any) -> Encoder:
    """An encoder in eval mode whose every weight is noise, so that none hides behind a 0 or a 1."""
    channels = options.pop("in_chans", 3)
    size = options.pop("image_size", SIZE)
    backbone = backbones.build(name, image_size=size, in_chans=channels, **options).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for n, parameter in backbone.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 + 0.2 * noise if parameter.ndim == 1 else 0.15 * noise)
            if n.endswith("conv1.weight") and parameter.ndim == 4:
                parameter.mul_(0.5)
        for n, buffer in backbone.named_buffers():
            if n.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            elif n.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    how = Preprocessing(36, size, "bicubic", (0.5,) * channels, (0.25,) * channels)
    return Encoder(backbone, name, how, {"method": "mae", "data": "photos", "step": 7})


def vit(**options: Any) -> Encoder:
    return made("vit_micro", **{**TINY, **options})


def images(of: Encoder, count: int = 2) -> Tensor:
    height, width = of.preprocessing.crop
    return torch.randn(count, of.backbone.in_chans, height, width, generator=torch.Generator().manual_seed(5))


def difference(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def case(name: str, **more: Any) -> Encoder:
    if name in VITS:
        return vit(**{**VITS[name], **more})
    kind, options = CONVNETS[name]
    return made(kind, **{**options, **more})


# What timm has not, and a part of the reason.
OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "RMS norms": ("vit_micro", {**TINY, "rms_norm": True}, "ssl-pretrain only"),
    "post norms": ("vit_micro", {**TINY, "norms": "post"}, "no norm after each branch"),
    "shortcut": ("vit_micro", {**TINY, "shortcut_decay": 0.7}, "no factor on the shortcut"),
    "other epsilon": ("vit_micro", {**TINY, "norm_eps": 1e-4}, "not 0.0001"),
    "rotary, query-key norm": ("vit_micro", {**TINY, "positions": "rope", "qk_norm": True}, "no norm of queries"),
    "relative, mean": ("vit_micro", {**TINY, "positions": "relative"}, "the norm after the mean"),
    "relative, bias": ("vit_micro", {**TINY, "positions": "relative", "pool": "cls", "image_size": (32, 32)}, "keys"),
    "relative, wide": ("vit_micro", {**TINY, "positions": "relative", "pool": "cls"}, "square grids"),
    "gated, epsilon": ("vit_micro", {**TINY, "swiglu": True, "norm_eps": 1e-5}, "epsilon 1e-6"),
    "norm of patches, rotary": ("vit_micro", {**TINY, "norms": "patches", "positions": "rope"}, "norm of the patch"),
    "hMLP stem": ("vit_micro", {**TINY, "stem": "hmlp"}, "no hMLP stem"),
    "three branches": ("vit_micro", {**TINY, "parallel_branches": 3}, "have two"),
    "branches, rotary": ("vit_micro", {**TINY, "parallel_branches": 2, "positions": "rope"}, "a table of positions"),
    "small stem": ("resnet18", {"stem": "small"}, "no 3x3 stem"),
    "narrow stem": ("resnet18", {"width": 16}, "a stem of 64 channels"),
    "convnext, stem of 2": ("convnext_micro", {}, "other strides"),
    "convnext, stem of 8": ("convnext_micro", {**SMALL_CONVNEXT, "stem_patch": 8, "image_size": (64, 64)}, "strides"),
}
