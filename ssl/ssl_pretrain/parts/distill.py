"""Self-distillation: soft assignments to prototypes, and the cross-entropy between those of different views.

Shapes: B images, S student views, T teacher views (the first T of the student's), K prototypes.
"""

import torch
from torch import Tensor

from ..backbones.backbone import Features
from ..errors import UserError


def cross_entropy_of_pairs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each image averaged over the pairs of a teacher's view t and a student's view s != t, (B,), and the
    mean entropy of the teacher's distributions, () detached (DINO: Caron et al., 2021, eq. 3).

    student: logits (S, B, K), divided here by `temperature`; teacher: probabilities (T, B, K) without gradient.
    Computed in float32 (or wider).
    """
    s, t = len(student), len(teacher)
    logits = wide(student) / temperature
    teacher = teacher.to(logits.dtype)
    # -sum_k q_k log p_k = logsumexp(l) - <q, l>, for q sums to one: no table of log-probabilities is made, and the
    # teacher's views are summed before they meet the student's.
    total = (t * torch.logsumexp(logits, -1)).sum(0) - torch.logsumexp(logits[:t], -1).sum(0)
    with torch.autocast(logits.device.type, enabled=False):  # which would multiply in bfloat16
        everywhere = torch.einsum("bk,sbk->b", teacher.sum(0), logits)
        same = torch.einsum("tbk,tbk->b", teacher, logits[:t])
    total = total - everywhere + same
    entropy = -(teacher * teacher.clamp_min(1e-30).log()).sum(-1).mean()
    return total / (s * t - t), entropy.detach()


def warmed_up(start: float, end: float, share: float, progress: float) -> float:
    """A value that goes linearly from `start` to `end` in the first `share` of the run, and stays there."""
    return end if progress >= share else start + (end - start) * progress / share


def cross_entropy_of_patches(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each crop averaged over its masked patches, (R,); 0 for a crop without any (iBOT: Zhou et al.,
    2022, eq. 2). R crops, M patches.

    student: logits (R, M, K), divided here by `temperature`; teacher: probabilities (R, M, K) without gradient; counted:
    bool (R, M), True for masked patches, False for padding. Computed in float32 (or wider).
    """
    logits = wide(student) / temperature
    with torch.autocast(logits.device.type, enabled=False):  # which would multiply in bfloat16
        expected = torch.einsum("rmk,rmk->rm", teacher, logits)
    each = torch.logsumexp(logits, -1) - expected
    return (each * counted).sum(1) / counted.sum(1).clamp_min(1)


def class_token(features: Features, method: str) -> Tensor:
    """The class token (B, D) of each image. Raises UserError where the encoder has none."""
    if features.cls is None:
        raise UserError(f"{method} compares class tokens, and the encoder has none: give it one (--cls --pool cls)")
    return features.cls


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is where that is wider: what losses compute in, whatever the autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
