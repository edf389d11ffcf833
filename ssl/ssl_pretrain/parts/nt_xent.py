"""Contrastive losses over the global batch. Shapes: B images of this process, N of all processes, D channels of the
embedding; two views of each image, so 2B rows here and 2N in all."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..distributed import gather, rank, size
from ..errors import UserError
from .heads import l2_normalize

ROWS = 256  # rows of the similarity table at a time
SMALL = 256  # images of all processes
COLDEST = 0.003  # below it the weight of a pair of opposite embeddings underflows in float64


def contrast(
    first: Tensor,
    second: Tensor,
    temperature: float,
    kind: Literal["infonce", "dcl", "dclw"] = "infonce",
    sigma: float = 0.5,
    *,
    detach_weights: bool = False,
) -> Tensor:
    """Contrastive losses of each embedding with its other view as the positive and both views of all other images as
    negatives: (2 * B,) for this process's rows, first views before second views. Raises UserError for a temperature
    below 0.003.

    first, second: (B, D) of the two views, of any norm. With s the cosine similarity divided by the temperature and p
    the positive of row i:
    - "infonce" (NT-Xent: Chen et al., "A Simple Framework for Contrastive Learning", 2020, eq. 1):
      -s_ip + log sum over k != i of exp(s_ik);
    - "dcl" (Yeh et al., "Decoupled Contrastive Learning", 2022, eq. 6): the sum leaves out k = p too;
    - "dclw" (there, eq. 7): as dcl with -w_i s_ip, w_i = 2 - exp(c_i / sigma) / mean exp(c / sigma), c the cosine
      similarities of all N positives. Gradients flow through w unless `detach_weights` makes it a constant.
    """
    if temperature < COLDEST:
        raise UserError(f"a temperature of {temperature} is too low for cosine similarities: at least {COLDEST}")
    kept = torch.promote_types(first.dtype, torch.float32)
    a, b = (
        l2_normalize(first.double()),
        l2_normalize(second.double()),
    )  # few numbers, whose small differences matter before training
    cosines = 1 - (a - b).square().sum(-1) / 2  # (B,)
    positive = cosines / temperature
    if kind == "dclw":
        everyone = gather(cosines.detach() if detach_weights else cosines)
        mine = slice(rank() * len(cosines), (rank() + 1) * len(cosines))
        positive = positive * (2 - len(everyone) * torch.softmax(everyone / sigma, dim=0)[mine])
    # In float32 weights below exp(-87) are 0, and opposite embeddings have exp(-2 / temperature). A small batch's table
    # is cheap in float64 too, and its gradients are sums of few numbers that nearly cancel.
    table = torch.float64 if 2 / temperature > 80 or len(a) * size() <= SMALL else kept
    negatives = _Negatives.apply(torch.cat([a, b]), temperature, kind != "infonce", table)
    return (negatives - positive.repeat(2)).to(kept)


class _Negatives(torch.autograd.Function):
    """log sum of exp(s_ik) over the rows k of all processes except i itself and, if `decoupled`, its positive; (2B,).

    The table e_ik = exp(s_ik - 1 / temperature), at most 1, is symmetric, so each pair within a process is computed
    once. A row's gradient, from its own loss and from the losses of the other rows k, is the sum over k of e_ik (g_i /
    n_i + g_k / n_k) (z_k - z_i) / temperature, with g the incoming gradient and n_i = sum over k of e_ik. Processes
    exchange 2B numbers for it. The table is computed a few rows at a time, and again in the backward pass instead of
    being stored. s is computed from the distances of unit vectors, |z_i - z_k|^2 = 2 - 2 cos, minus their mean: if
    vectors are nearly equal, as before training, the cosines themselves would differ only in their last bits."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, temperature: float, decoupled: bool, table: torch.dtype) -> Tensor:
        everyone = _starting_at_own_rank(gather(mine), len(mine))
        everyone = (everyone - everyone.mean(0)).to(table)
        total = everyone.new_zeros(len(mine))
        for i, j, e in _tiles(everyone, len(mine), temperature, decoupled):
            total[i:j] += e.sum(1)
            total[j:] += e[:, j - i : len(mine) - i].sum(0)
        ctx.save_for_backward(everyone, total)
        ctx.temperature, ctx.decoupled = temperature, decoupled
        return (total.log() + 1 / temperature).to(mine.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor) -> tuple[Tensor, None, None, None]:
        everyone, total = ctx.saved_tensors
        count = len(total)
        share = _starting_at_own_rank(gather((by_loss / ctx.temperature).to(total.dtype) / total), count)  # (2N,)
        out, sums = torch.zeros_like(everyone[:count]), torch.zeros_like(total)
        for i, j, e in _tiles(everyone, count, ctx.temperature, ctx.decoupled):
            e.mul_(share[i:j, None] + share[i:])
            out[i:j].addmm_(e, everyone[i:])
            sums[i:j] += e.sum(1)
            later = e[:, j - i : count - i].T
            out[j:].addmm_(later, everyone[i:j])
            sums[j:] += later.sum(1)
        out -= sums[:, None] * everyone[:count]
        return out.to(by_loss.dtype), None, None, None


def _starting_at_own_rank(rows: Tensor, count: int) -> Tensor:
    """All processes' rows, `count` of each, starting with this process and wrapping around."""
    return rows.roll(-rank() * count, 0)


def _tiles(everyone: Tensor, count: int, temperature: float, decoupled: bool) -> Iterator[tuple[int, int, Tensor]]:
    """Yields (i, j, e): rows i to j of the table e for the first `count` rows, against row i and all following rows;
    their pairs with rows before i were in earlier tiles. The next tile overwrites e."""
    radius = everyone.square().sum(1) / (2 * temperature)
    memory = everyone.new_empty(min(ROWS, count) * len(everyone))
    for i in range(0, count, ROWS):
        j = min(i + ROWS, count)
        e = memory[: (j - i) * (len(everyone) - i)].view(j - i, -1)
        torch.mm(everyone[i:j] / temperature, everyone[i:].T, out=e)  # autocast does not change operations with `out`
        e.sub_(radius[i:j, None]).sub_(radius[i:]).exp_()
        e.diagonal().zero_()
        if decoupled:
            e[: max(count // 2 - i, 0)].diagonal(count // 2).zero_()
            e.diagonal(-(count // 2)).zero_()
        yield i, j, e
