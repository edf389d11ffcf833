"""Stochastic depth (Huang et al., "Deep Networks with Stochastic Depth", 2016): in training a residual branch is left out,
for each sample apart; by factors of 0, or by computing the branch for the samples that keep it and no others.

Shapes: B samples, L tokens of each, D width, T tokens of several batches in one row (`Packed`), n branches, K samples
kept, T' their tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention import Packed
from .positions import Offsets

ROWS_ABOVE = 0.1  # DINOv2's release computes fewer samples beyond this rate; below, taking them out costs what it saves
GROUP = 32  # samples that are drawn among at once


def given(drop: Tensor | None, depth: int) -> Tensor:
    """The noise `drop` (B, 2 * depth) that a forward was given. Raises RuntimeError where it was not."""
    if drop is None:
        raise RuntimeError(
            f"drop path needs noise in training: pass drop=step.rand({2 * depth}), the Step.rand of the "
            f"method's step, so that every rank and a continued run draw the same"
        )
    return drop


def drop_factors(noise: Tensor, rates: Tensor) -> Tensor:
    """What multiplies each sample's branches, (B, n), of uniform noise (B, n) and each branch's rate (n,): 0 with that
    probability, else 1 / (1 - rate)."""
    return (noise >= rates) / (1 - rates)


@dataclass(frozen=True)
class Kept:
    """The samples that a branch is computed for, of tokens (B, L, D), or of a row (1, T, D) of packed batches."""

    rows: Tensor  # (K,) int64 of the samples, or (T',) of the row's tokens
    scale: Tensor  # (), or (1, T', 1) of a row: what makes up for the samples that are left out
    packed: Packed | None  # how a row's kept tokens are made up

    def of(self, x: Tensor) -> Tensor:
        """The kept ones of such tokens: (K, L, D) or (1, T', D)."""
        return x.index_select(0 if self.packed is None else 1, self.rows)

    def added(self, x: Tensor, branch: Tensor) -> Tensor:
        """x with what the branch gave for the kept ones, scaled."""
        return x.index_add(0 if self.packed is None else 1, self.rows, (branch * self.scale).to(x.dtype))

    def of_mask(self, mask: Tensor | None) -> Tensor | None:
        """A mask (B or 1, heads or 1, L, L) for the kept ones."""
        return mask if mask is None or len(mask) == 1 else mask.index_select(0, self.rows)

    def of_rope(self, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines, each (B or 1, 1, L, d / 2) or (1, 1, T, d / 2), for the kept ones."""
        if rope is None or (self.packed is None and len(rope[0]) == 1):
            return rope
        cosines, sines = (each.index_select(0 if self.packed is None else 2, self.rows) for each in rope)
        return cosines, sines

    def of_offsets(self, offsets: Offsets | None) -> Offsets | None:
        """Relative positions, their rows (B or 1, L, L), for the kept ones."""
        if offsets is None or len(offsets.rows) == 1:
            return offsets
        return replace(offsets, rows=offsets.rows.index_select(0, self.rows))


def kept_samples(noise: Tensor, rates: Sequence[float]) -> list[Kept]:
    """Which samples each of n branches is computed for, of uniform noise (B, n) and the branches' rates: those of the most
    noise, as many as there are left at that rate, and at least one (DINOv2: Oquab et al., 2024, section 4, in the form
    of its release).

    Drawn among groups of `GROUP` neighbours where B is a multiple of it, or else among all: so that processes which
    share a batch draw what one would. Their number is known beforehand, and nothing waits for the device.
    """
    order, count = _order(noise), len(noise)
    found = []
    for branch, share in enumerate(_shares(count, rates)):
        rows = order[branch, :, : share[0]].flatten()
        found.append(Kept(rows, torch.full((), share[1] / share[0], device=noise.device), None))
    return found


def kept_tokens(noises: Sequence[Tensor], packed: Packed, rates: Sequence[float]) -> list[Kept]:
    """`kept_samples` of each of the packed batches of images, whose noises are (B, n), as tokens of the one row."""
    device, begin = noises[0].device, 0
    tokens = []  # of each batch: (n, groups, samples in the order in which they are kept, L)
    for noise, (count, length) in zip(noises, packed.batches, strict=True):
        tokens.append(_order(noise)[..., None] * length + torch.arange(begin, begin + length, device=device))
        begin += count * length
    shares = [_shares(count, rates) for count, _ in packed.batches]
    remade: dict[tuple[tuple[int, int], ...], tuple[Tensor, Packed]] = {}
    found = []
    for branch, each in enumerate(zip(*shares, strict=True)):
        left = [some * (len(noise) // group) for noise, (some, group) in zip(noises, each, strict=True)]
        batches = tuple((some, length) for some, (_, length) in zip(left, packed.batches, strict=True))
        if batches not in remade:
            scales = [
                torch.full((1, some * length, 1), group / few, device=device)
                for (some, length), (few, group) in zip(batches, each, strict=True)
            ]
            remade[batches] = torch.cat(scales, dim=1), packed.like(batches)
        rows = torch.cat([of[branch, :, :few].flatten() for of, (few, _) in zip(tokens, each, strict=True)])
        found.append(Kept(rows, *remade[batches]))
    return found


def _order(noise: Tensor) -> Tensor:
    """Of noise (B, n) the samples of each group, those of most noise first: (n, groups, samples of a group) int64."""
    group = _group(len(noise))
    order = noise.unflatten(0, (-1, group)).argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(0, len(noise), group, device=noise.device)
    return (order + starts[:, None, None]).permute(2, 0, 1)


def _group(count: int) -> int:
    return count if count % GROUP else GROUP


def _shares(count: int, rates: Sequence[float]) -> list[tuple[int, int]]:
    """For each rate, how many of how many samples of a group are kept."""
    group = _group(count)
    return [(max(round(group * (1 - rate)), 1), group) for rate in rates]
