"""Small instances of SparK on small convnets, and images for them, for tests/test_spark.py and its processes."""

from typing import Any

import torch
from ssl_pretrain.methods.spark import SparK
from torch import Tensor

from ssl_pretrain import backbones
from ssl_pretrain.pretext import Batch, Step

SIZE = (32, 48)  # 4 x 6 units of 8 x 8 pixels
ENCODERS: dict[str, dict[str, Any]] = {
    "convnextv2_micro": {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "stem_patch": 1},
    "resnet_micro": {"width": 8},
}


def build(encoder: str = "convnextv2_micro", size: tuple[int, int] = SIZE, **knobs: Any) -> SparK:
    torch.manual_seed(0)
    backbone = backbones.build(encoder, image_size=size, **ENCODERS[encoder])
    return SparK(backbone, SparK.Config(**{"decoder_dim": 32, **knobs})).double()


def step(batch: int = 4, noise: int = 1, rows: slice | None = None) -> Step:
    rows = slice(0, batch) if rows is None else rows
    return Step(step=0, total=10, noise=noise, rows=rows, batch_size=batch, device=torch.device("cpu"))


def images(batch: int = 4, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_batch(x: Tensor) -> Batch:
    return Batch(views={"image": x}, index=torch.arange(len(x)))
