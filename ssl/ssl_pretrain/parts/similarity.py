"""Similarities as distributions: how far a student's softmax is from a teacher's, over the rows of a queue or the tokens
of an image.

Shapes: B images, N tokens, T channels, M entries of a queue.
"""

import math
from typing import final

import torch
from torch import Tensor, nn

from .heads import l2_normalize

EMPTY = -1e30  # a logit whose probability is 0; finite, so that 0 times it is 0


def divergences(target: Tensor, own: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """KL(softmax(target) || softmax(own)) of logits (..., M), and what it would be if all of `own` were equal: both (...).

    known: (M,) bool, the entries that count; None: all.
    """
    if known is None:
        count: float | Tensor = math.log(target.shape[-1])
    else:
        target, own = (each.masked_fill(~known, EMPTY) for each in (target, own))
        count = known.sum().to(target.dtype).log()
    log_p, log_q = target.log_softmax(-1), own.log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), count + (p * log_p).sum(-1)


def relations(target: Tensor, own: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`divergences` of the rows of the matrices of cosine similarities between the tokens of an image, (B, N, T) and
    (B, N, K): (B,) each, means over the N rows."""
    with torch.autocast(own.device.type, enabled=False):
        theirs, mine = (x @ x.mT / temperature for x in (l2_normalize(target), l2_normalize(own)))
        each, uniform = divergences(theirs, mine)
    return each.mean(1), uniform.mean(1)


@final
class FilledQueue(nn.Module):
    """The newest M unit vectors of width T, first in, first out, and how many there are. Empty at the start. Its state is
    saved in checkpoints."""

    rows: Tensor  # (M, T)
    taken: Tensor  # () int64: all vectors that ever came; the next one's place is this modulo M

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(length, dim))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    def with_batch(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, and below them `vectors` (B, T): (M + B, T), and which of them are vectors: bool (M + B,)."""
        places = torch.arange(len(self.rows) + len(vectors), device=vectors.device)
        known = (places < self.taken) | (places >= len(self.rows))
        return torch.cat([self.rows.to(vectors.dtype), vectors]), known

    @torch.no_grad()
    def put_(self, vectors: Tensor, ok: Tensor) -> None:
        """Replace the oldest rows by `vectors` (B, T), the same on every process, if `ok` (bool ()) is true. If B is above
        M, only the last M vectors are stored."""
        length = len(self.rows)
        places = ((self.taken + torch.arange(len(vectors), device=vectors.device)) % length)[-length:]
        self.rows[places] = torch.where(ok, vectors[-length:].to(self.rows.dtype), self.rows[places])
        self.taken.copy_(torch.where(ok, self.taken + len(vectors), self.taken))
