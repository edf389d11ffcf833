"""Drop path, or stochastic depth (Huang et al., "Deep Networks with Stochastic Depth", 2016): in training, residual
branches are left out for each sample independently, by factors of 0 or by computing a branch only for the kept samples.

Shapes: B samples, L tokens of each, D width, T tokens of several batches in one sequence (`Packed`), n branches, K kept
samples, T' their tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention import Packed
from .positions import Offsets

ROWS_ABOVE = 0.1  # DINOv2's release computes fewer samples above this rate; below it selecting them costs what it saves
GROUP = 32  # number of samples among which the kept ones are drawn


def given(drop: Tensor | None, depth: int) -> Tensor:
    """The noise `drop` (B, 2 * depth) of a forward pass. Raises RuntimeError if it is missing."""
    if drop is None:
        raise RuntimeError(
            f"drop path needs noise in training: pass drop=step.rand({2 * depth}), the Step.rand of the "
            f"method's step, so that every rank and a continued run draw the same"
        )
    return drop


def drop_factors(noise: Tensor, rates: Tensor) -> Tensor:
    """Factors on each sample's branches, (B, n), from uniform noise (B, n) and each branch's rate (n,): 0 with that
    probability, else 1 / (1 - rate)."""
    return (noise >= rates) / (1 - rates)


def rising_factors(drop: Tensor | None, depth: int, rate: float, *, training: bool) -> Tensor | None:
    """`drop_factors` (B, 2 * depth) of blocks with two branches each, from the noise `drop` (B, 2 * depth) of a forward
    pass. The rate rises linearly from 0 in the first block to `rate` in the last. None where nothing is dropped: not in
    training, or at a rate of 0. Raises RuntimeError if the noise is missing."""
    if not training or rate == 0:
        return None
    noise = given(drop, depth)
    rates = torch.linspace(0, rate, depth, device=noise.device).repeat_interleave(2)
    return drop_factors(noise, rates)


@dataclass(frozen=True)
class Kept:
    """The samples that a branch is computed for, of tokens (B, L, D), or of a row (1, T, D) of packed batches."""

    rows: Tensor  # (K,) int64 indices of samples, or (T',) of packed tokens
    scale: Tensor  # (), or (1, T', 1) if packed: compensates for the samples that are left out
    packed: Packed | None  # layout of the kept packed tokens

    def of(self, x: Tensor) -> Tensor:
        """The kept tokens: (K, L, D) or (1, T', D)."""
        return x.index_select(0 if self.packed is None else 1, self.rows)

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        """x plus the scaled output of the branch for the kept samples."""
        return x.index_add(0 if self.packed is None else 1, self.rows, (branch * self.scale).to(x.dtype))

    def of_mask(self, mask: Tensor | None) -> Tensor | None:
        """A mask (B or 1, heads or 1, L, L) for the kept samples."""
        return mask if mask is None or len(mask) == 1 else mask.index_select(0, self.rows)

    def of_rope(self, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines, each (B or 1, 1, L, d / 2) or (1, 1, T, d / 2), for the kept samples."""
        if rope is None or (self.packed is None and len(rope[0]) == 1):
            return rope
        cosines, sines = (each.index_select(0 if self.packed is None else 2, self.rows) for each in rope)
        return cosines, sines

    def of_offsets(self, offsets: Offsets | Tensor | None) -> Offsets | Tensor | None:
        """Relative positions, their rows (B or 1, L, L) or scores (B or 1, heads, L, L), for the kept samples."""
        if isinstance(offsets, Tensor):
            return self.of_mask(offsets)
        if offsets is None or len(offsets.rows) == 1:
            return offsets
        return replace(offsets, rows=offsets.rows.index_select(0, self.rows))


def kept_samples(noise: Tensor, rates: Sequence[float]) -> list[Kept]:
    """The samples for which each of n branches is computed, from uniform noise (B, n) and the branches' rates: those
    with the largest noise. Their number follows from the rate and is at least one (DINOv2: Oquab et al., 2024, section
    4, as released).

    They are drawn within groups of `GROUP` consecutive samples if B is a multiple of it, else among all. So processes
    that share a batch draw the same samples as one process. The numbers are static, so the host does not wait for the
    device.
    """
    order, count = _order(noise), len(noise)
    found = []
    for branch, share in enumerate(_shares(count, rates)):
        rows = order[branch, :, : share[0]].flatten()
        found.append(Kept(rows, torch.full((), share[1] / share[0], device=noise.device), None))
    return found


def kept_tokens(noises: Sequence[Tensor], packed: Packed, rates: Sequence[float]) -> list[Kept]:
    """`kept_samples` of each of the packed batches of images, with noise (B, n) each, as indices of packed tokens."""
    device, begin = noises[0].device, 0
    tokens = []  # for each batch: (n, groups, samples in the order in which they are kept, L)
    for noise, (count, length) in zip(noises, packed.batches, strict=True):
        tokens.append(_order(noise)[..., None] * length + torch.arange(begin, begin + length, device=device))
        begin += count * length
    shares = [_shares(count, rates) for count, _ in packed.batches]
    remade: dict[tuple[tuple[int, int], ...], tuple[Tensor, Packed]] = {}
    found = []
    for branch, each in enumerate(zip(*shares, strict=True)):
        counts = [kept * (len(noise) // group) for noise, (kept, group) in zip(noises, each, strict=True)]
        batches = tuple((count, length) for count, (_, length) in zip(counts, packed.batches, strict=True))
        if batches not in remade:
            scales = [
                torch.full((1, count * length, 1), group / kept, device=device)
                for (count, length), (kept, group) in zip(batches, each, strict=True)
            ]
            remade[batches] = torch.cat(scales, dim=1), packed.like(batches)
        rows = torch.cat([of[branch, :, :kept].flatten() for of, (kept, _) in zip(tokens, each, strict=True)])
        found.append(Kept(rows, *remade[batches]))
    return found


def _order(noise: Tensor) -> Tensor:
    """The samples of each group, those with the largest noise (B, n) first: (n, groups, samples of a group) int64."""
    group = _group(len(noise))
    order = noise.unflatten(0, (-1, group)).argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(0, len(noise), group, device=noise.device)
    return (order + starts[:, None, None]).permute(2, 0, 1)


def _group(count: int) -> int:
    return count if count % GROUP else GROUP


def _shares(count: int, rates: Sequence[float]) -> list[tuple[int, int]]:
    """For each rate, the number of kept samples of a group, and the size of the group."""
    group = _group(count)
    return [(max(round(group * (1 - rate)), 1), group) for rate in rates]
