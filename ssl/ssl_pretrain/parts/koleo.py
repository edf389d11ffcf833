"""Regularisers that spread the vectors of a batch over the sphere. Shapes: B vectors of this process, W * B of all
processes, D channels."""

import math

import torch
from torch import Tensor

from ..distributed import gather, rank
from ..errors import UserError
from .heads import l2_normalize

DUPLICATES = 1e-8  # the distance used for two equal vectors


def koleo(x: Tensor) -> Tensor:
    """Kozachenko-Leonenko estimate of the negative differential entropy, without constants: minus the mean over vectors
    of the log distance to the nearest other vector, () float32 (Sablayrolles et al., "Spreading vectors for similarity
    search", 2019, eq. 2; DINOv2, section 4).

    x: (B, D) of any norm, normalised to length 1. Neighbours are searched among all processes' vectors, and gradients
    go to both vectors of a pair. Equal vectors have the distance `DUPLICATES`, without gradient. Raises UserError if
    there are fewer than two vectors.
    """
    mine, everyone, itself = _sphere(x)
    with torch.no_grad():
        nearest = _cosines(mine, everyone).masked_fill(itself, -torch.inf).argmax(1)
    return -(torch.linalg.vector_norm(mine - everyone[nearest], dim=1) + DUPLICATES).log().mean()


def kde(x: Tensor, concentration: float) -> Tensor:
    """Kernel density estimate of the same quantity, smooth in all pairs: the mean over vectors of the log density of
    the other vectors at that point, () float32, with the von Mises-Fisher kernel exp(concentration * cosine) without
    its constant (Virchow 2: Zimmermann et al., 2024; the estimator is that of Wang & Isola, "Understanding Contrastive
    Representation Learning through Alignment and Uniformity on the Hypersphere", 2020, section 4).

    x: (B, D) as for `koleo`; all processes' vectors are used. The value is `concentration` if all vectors are equal.
    Raises UserError if there are fewer than two vectors.
    """
    mine, everyone, itself = _sphere(x)
    scores = (concentration * _cosines(mine, everyone)).masked_fill(itself, -torch.inf)
    return torch.logsumexp(scores, dim=1).mean() - math.log(len(everyone) - 1)


def _cosines(mine: Tensor, everyone: Tensor) -> Tensor:
    with torch.autocast(mine.device.type, enabled=False):  # autocast would use bfloat16 products
        return mine @ everyone.T


def _sphere(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This process's unit vectors (B, D), those of all processes (W * B, D), and bool (B, W * B), True where both are
    the same vector."""
    mine = l2_normalize(x)
    everyone = gather(mine)
    if len(everyone) < 2:
        raise UserError(
            "the regulariser spreads the vectors of different images, and the batch has one image: use a --batch-size "
            "of at least 2, or --regulariser-weight 0"
        )
    own = torch.arange(len(mine), device=x.device) + rank() * len(mine)
    return mine, everyone, own[:, None] == torch.arange(len(everyone), device=x.device)
