"""Self-distillation: the cross-entropy between soft assignments of different views to prototypes.

Shapes: B images, S student views, T teacher views (the first T of the student's), K prototypes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import memory
from ..backbones.backbone import Features
from ..errors import UserError


def cross_entropy_of_pairs(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each image averaged over the pairs of a teacher's view t and a student's view s != t, (B,), and the
    mean entropy of the teacher's distributions, () detached (DINO: Caron et al., 2021, eq. 3).

    student: logits (S, B, K), which this function divides by `temperature`; teacher: probabilities (T, B, K) without
    gradient. Computed in float32 (or wider). The backward pass overwrites the stored tensors, so it can run only once.
    """
    logits = to_float32(student)
    teacher = teacher.detach().to(logits.dtype)
    s, t = len(student), len(teacher)
    entropy = logits.new_zeros(())
    for images in _image_chunks(teacher):
        q = teacher[:, images]
        entropy -= q.clamp_min(1e-30).log_().mul_(q).sum()
    each = _CrossEntropy.apply(logits, teacher, temperature, True) / (s * t - t)
    return each, entropy / teacher.shape[:2].numel()


def cross_entropy_of_patches(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of each crop averaged over its masked patches, (R,); 0 for a crop without masked patches (iBOT:
    Zhou et al., 2022, eq. 2). R crops, M patches.

    student: logits (R, M, K), which this function divides by `temperature`; teacher: probabilities (R, M, K) without
    gradient; counted: bool (R, M), True for masked patches, False for padding. Computed in float32 (or wider). The
    backward pass can run only once.
    """
    logits = to_float32(student).flatten(0, 1)[None]
    teacher = teacher.to(logits.dtype).flatten(0, 1)[None]
    each = _CrossEntropy.apply(logits, teacher, temperature, False).view(counted.shape)
    return (each * counted).sum(1) / counted.sum(1).clamp_min(1)


class _CrossEntropy(torch.autograd.Function):
    """Sums over pairs of views of each image's cross-entropy (B,): of the teacher's view t and the student's view s =
    t, or, with `crossed`, every s except t.

    -sum_k q_k log p_k = log sum_k exp(l_k) - <q, l>, because q sums to one. So the teacher's views are summed before
    the product with the student's, and the student's probabilities p are computed once: for the loss, and then as the
    gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, temperature: float, crossed: bool) -> Tensor:
        probabilities = memory.empty(*logits.shape, dtype=logits.dtype, device=logits.device)
        each = logits.new_zeros(logits.shape[1])
        for images in _image_chunks(logits):
            for views, teacher_sum, count in _teacher_sums(teacher[:, images], logits, crossed):
                scaled, p = logits[views, images] / temperature, probabilities[views, images]
                torch.softmax(scaled, -1, out=p)
                partition = scaled.amax(-1) - p.amax(-1).log_()
                each[images].add_(partition.sum(0), alpha=count).sub_(scaled.mul_(teacher_sum).sum((0, -1)))
        ctx.save_for_backward(probabilities, teacher)
        ctx.temperature, ctx.crossed = temperature, crossed
        return each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_each: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities, teacher = ctx.saved_tensors
        weights = by_each[:, None] / ctx.temperature
        for images in _image_chunks(probabilities):
            weight = weights[images]
            for views, teacher_sum, count in _teacher_sums(teacher[:, images] * -weight, probabilities, ctx.crossed):
                p = probabilities[views, images]
                torch.addcmul(teacher_sum, p, weight, value=count, out=p)
        return probabilities, None, None, None


def _teacher_sums(teacher: Tensor, table: Tensor, crossed: bool) -> Iterator[tuple[slice, Tensor, int]]:
    """Views of the student's table (S, B, K), with the sum (B, K) of the teacher's views (T, B, K) that they are
    compared with; B is the number of images processed together."""
    (t, b, k), s = teacher.shape, len(table)
    total = teacher.sum(0) if crossed else None
    for view in range(t):
        yield slice(view, view + 1), teacher[view] if total is None else total - teacher[view], t - 1 if crossed else 1
    if total is None:
        return
    chunk = max(1, memory.CACHED // (b * k)) if table.device.type == "cpu" else s
    for first in range(t, s, chunk):
        yield slice(first, min(first + chunk, s)), total, t


def _image_chunks(table: Tensor) -> list[slice]:
    """Slices of the images of a table (S, B, K), a few at a time."""
    return memory.in_cache(table.shape[1], table.shape[2], table.device)


def warmed_up(start: float, end: float, share: float, progress: float) -> float:
    """A value that changes linearly from `start` to `end` in the first `share` of the run, and then stays constant."""
    return end if progress >= share else start + (end - start) * progress / share


@torch.no_grad()
def update_centering_(centre: Tensor, mean: Tensor, momentum: float, ok: Tensor) -> None:
    """Centering of a teacher's outputs (DINO: Caron et al., 2021, eq. 4): where `ok` (bool ()) is true, centre (K,) becomes
    momentum * centre + (1 - momentum) * mean, with the mean (K,) over all processes."""
    centre.copy_(torch.where(ok, centre.lerp(mean, 1 - momentum), centre))


def class_token(features: Features, method: str) -> Tensor:
    """The class token (B, D) of each image. Raises UserError if the encoder has none."""
    if features.cls is None:
        raise UserError(f"{method} compares class tokens, and the encoder has none: add one with --cls --pool cls")
    return features.cls


def to_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if its type is wider: the precision of losses, independent of autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
