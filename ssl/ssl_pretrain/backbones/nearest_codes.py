"""The nearest codes of vectors. Shapes: K codes of d channels."""

import contextlib
from typing import Any

import torch
from torch import Tensor

CHUNK = 2048  # vectors whose distances to all codes are in memory at a time


@torch.no_grad()
def nearest(vectors: Tensor, codes: Tensor) -> Tensor:
    """Ids of the nearest codes (K, d) by Euclidean distance: (..., d) to (...) int64. Of equal distances the first one."""
    with without_autocast(vectors.device):
        half = -0.5 * codes.square().sum(1)
        rows = vectors.reshape(-1, codes.shape[1])
        # The number of chunks would fix the number of images in a program that is made of this.
        chunks = [rows] if torch.compiler.is_exporting() else rows.split(CHUNK)
        found = [torch.addmm(half, each, codes.T).argmax(1) for each in chunks]
    return torch.cat(found).reshape(vectors.shape[:-1])


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it, products have the precision of their factors. Nothing in a program that is being exported, which has one
    precision and could not be read with such a part in it."""
    if torch.compiler.is_exporting():
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
