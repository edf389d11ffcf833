"""Small untrained encoders, as an export holds them, for the tests of exports, features and evaluators."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_pretrain import backbones
from ssl_pretrain.encoder import Encoder, Preprocessing, random_like, save

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)

EXPORT_SIZE = (16, 24)
EXPORT_PREPROCESSING = Preprocessing(20, EXPORT_SIZE, "bicubic", (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
EXPORT_LINEAGE = {"method": "mae", "data": "photos", "step": 7}


def small_encoder(seed: int = 0, **options: Any) -> Encoder:
    """A ViT for images 16 x 16 with patches of 8. Its norms are not the identity, so that leaving one out shows.

    options: those of the ViT, and `in_chans`.
    """
    options = {"patch_size": 8, "dim": 32, "heads": 2, "depth": 3, **options}
    channels = options.pop("in_chans", 3)
    backbone = backbones.build("vit_micro", image_size=(16, 16), in_chans=channels, **options)
    mean, std = (MEAN, STD) if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    encoder = random_like(Encoder(backbone, "vit_micro", Preprocessing(16, (16, 16), "bicubic", mean, std), {}), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in (m for m in encoder.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.uniform_(-0.5, 0.5, generator=generator)
    return encoder


def small_export(
    seed: int = 0,
    *,
    preprocessing: Preprocessing = EXPORT_PREPROCESSING,
    size: tuple[int, int] = EXPORT_SIZE,
    lineage: dict[str, Any] = EXPORT_LINEAGE,
    **options: Any,
) -> Encoder:
    """An encoder of images that are not square, with a lineage, as a pretraining run exports it."""
    torch.manual_seed(seed)
    options = {"patch_size": 8, "depth": 2, **options}
    backbone = backbones.build("vit_micro", image_size=size, in_chans=preprocessing.channels, **options)
    return Encoder(backbone, "vit_micro", preprocessing, lineage).eval()


class ImageCounter:
    """Counts the images that come through an encoder."""

    def __init__(self, encoder: Encoder) -> None:
        self.images = 0
        encoder.backbone.register_forward_pre_hook(self)

    def __call__(self, _: nn.Module, inputs: tuple) -> None:
        self.images += len(inputs[0])


def export(path: Path, *, seed: int = 1, patch: int = 8, size: int = 32, mean=(0.5,) * 3, std=(0.25,) * 3, **options):
    """An export with random weights in the folder `path`, which is returned."""
    torch.manual_seed(seed)
    backbone = backbones.build("vit_micro", image_size=(size, size), patch_size=patch, **{"depth": 2, **options})
    save(path, Encoder(backbone, "vit_micro", Preprocessing.for_size((size, size), mean, std), {}))
    return path
