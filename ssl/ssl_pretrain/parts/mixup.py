"""Mixup of images without labels (Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018), for methods whose
teacher sees the same mixed image as the student.

Shapes: B images of a micro-batch.
"""

import torch
from torch import Tensor

from ..errors import UserError
from ..pretext import Step


def mixed(images: Tensor, share: Tensor) -> Tensor:
    """`share` times each image plus the rest of its neighbour's: images (B, ...) and share (1,) in [0, 1].

    Images 0 and 1 are neighbours, 2 and 3, and so on; without a neighbour an image stays as it is. Batches are in random
    order, so the pairs are random. They lie within a micro-batch however the batch is divided (`check_pairs`), while a
    permutation of the whole batch would need the images of other processes.
    """
    places = torch.arange(len(images), device=images.device)
    others = images.index_select(0, (places ^ 1).clamp_(max=len(images) - 1))
    return torch.lerp(others, images, share.to(images.dtype))


def check_pairs(step: Step) -> None:
    """Raise UserError where a pair of neighbours is not in one micro-batch."""
    rows = step.rows
    if isinstance(rows, slice) and (rows.start % 2 or (rows.stop % 2 and rows.stop != step.batch_size)):
        raise UserError(
            f"--mixup mixes neighbouring images, and {rows.stop - rows.start} images a process and micro-batch cannot be "
            f"divided into pairs: choose another --batch-size, or --no-mixup"
        )
