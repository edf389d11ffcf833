"""A frozen teacher with prototype heads, and the student's heads beside them: how DINOv2 distils its own models (Oquab et
al., 2024, section 5; DINOv3's code for several students).

Shapes: B images, L places of each, K prototypes.
"""

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .heads import PrototypeHead
from .self_distillation import cross_entropy_of_patches, to_float32
from .sinkhorn import sinkhorn

STUDENT = 0.1  # temperature of the student's softmax


@runtime_checkable
class HasPrototypeHeads(Protocol):
    """A method whose heads compare vectors with prototypes, for `--teacher` of a method that reads them. The loop gives
    them the weights of the EMA teacher, whose parts have the same names."""

    def prototype_heads(self) -> tuple[PrototypeHead, PrototypeHead | None]:
        """The head of class tokens and that of patches; None without one."""


def head_like(head: PrototypeHead, dim: int) -> PrototypeHead:
    """A head of the same sizes with random weights, for vectors of `dim` channels."""
    layers = [part for part in head.mlp if isinstance(part, nn.Linear)]
    count, bottleneck = head.prototypes.weight.shape
    return PrototypeHead(dim, layers[0].out_features, bottleneck, count, gain=head.prototypes.gain is not None)


def divergence_of_heads(
    own: PrototypeHead, vectors: Tensor, theirs: PrototypeHead, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """KL of the student's distribution over the prototypes from the teacher's, the mean over the places of each image,
    (B,), and what it would be of a student that gives the uniform one, ().

    vectors, targets: (B, L, D) of student and teacher. The teacher's distributions are balanced over the global batch
    (Sinkhorn-Knopp with `temperature`).
    """
    with torch.no_grad():
        logits = to_float32(theirs(targets))
        wanted = sinkhorn(logits.flatten(0, 1), temperature).unflatten(0, logits.shape[:2])
        entropy = -torch.special.xlogy(wanted, wanted).sum(-1).mean(1)
        everywhere = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    each = cross_entropy_of_patches(own(vectors), wanted, everywhere, STUDENT) - entropy
    return each, math.log(logits.shape[-1]) - entropy.mean()
