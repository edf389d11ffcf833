"""Regularisers that spread the vectors of a batch over the sphere. Shapes: B vectors of this process, W * B of all
processes, D channels."""

import math

import torch
from torch import Tensor

from ..distributed import gather, rank
from ..errors import UserError
from .heads import l2_normalize

DUPLICATES = 1e-8  # how far apart two equal vectors count as


def koleo(x: Tensor) -> Tensor:
    """Kozachenko-Leonenko estimate of the negative differential entropy but for constants: minus the mean over vectors
    of the log distance to the nearest other one, () float32 (Sablayrolles et al., "Spreading vectors for similarity
    search", 2019, eq. 2; DINOv2, section 4).

    x: (B, D) of any length, taken to length 1; neighbours are looked for among all processes' vectors, and gradients
    go to both. A vector that is there twice counts as `DUPLICATES` apart, with no gradient. Raises UserError where
    there are fewer than two vectors.
    """
    mine, everyone, itself = _sphere(x)
    with torch.no_grad():
        nearest = _cosines(mine, everyone).masked_fill(itself, -torch.inf).argmax(1)
    return -(torch.linalg.vector_norm(mine - everyone[nearest], dim=1) + DUPLICATES).log().mean()


def kde(x: Tensor, concentration: float) -> Tensor:
    """Kernel-density estimate of the same, smooth in all pairs: the mean over vectors of the log density that the others
    have there, () float32, with the von Mises-Fisher kernel exp(concentration * cosine) without its constant (Virchow 2:
    Zimmermann et al., 2024; the estimator is that of Wang & Isola, "Understanding Contrastive Representation Learning
    through Alignment and Uniformity on the Hypersphere", 2020, section 4).

    x: (B, D) as for `koleo`; all processes' vectors count. It is `concentration` where all are one vector. Raises
    UserError where there are fewer than two vectors.
    """
    mine, everyone, itself = _sphere(x)
    scores = (concentration * _cosines(mine, everyone)).masked_fill(itself, -torch.inf)
    return torch.logsumexp(scores, dim=1).mean() - math.log(len(everyone) - 1)


def _cosines(mine: Tensor, everyone: Tensor) -> Tensor:
    with torch.autocast(mine.device.type, enabled=False):  # which would multiply in bfloat16
        return mine @ everyone.T


def _sphere(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This process's unit vectors (B, D), everyone's (W * B, D), and where one meets itself: bool (B, W * B)."""
    mine = l2_normalize(x)
    everyone = gather(mine)
    if len(everyone) < 2:
        raise UserError(
            "the regulariser spreads the vectors of different images, and the batch has one image: take a --batch-size "
            "of at least 2, or --regulariser-weight 0"
        )
    own = torch.arange(len(mine), device=x.device) + rank() * len(mine)
    return mine, everyone, own[:, None] == torch.arange(len(everyone), device=x.device)
