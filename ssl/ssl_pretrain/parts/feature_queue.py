"""A queue of the newest unit vectors for nearest-neighbour search. Shapes: M entries, B vectors, K channels."""

from typing import final

import torch
from torch import Tensor, nn

from .heads import l2_normalize


@final
class Queue(nn.Module):
    """The newest M unit vectors of width K, first in, first out; random vectors at the start. Its state is saved in
    checkpoints."""

    rows: Tensor  # (M, K)
    oldest: Tensor  # () int64: the entry that is written next

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", l2_normalize(torch.randn(length, dim)))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """For each unit vector (B, K) the row with the largest inner product (B, K); no gradient."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self.rows[(vectors.to(self.rows.dtype) @ self.rows.T).argmax(1)]

    @torch.no_grad()
    def put_(self, vectors: Tensor, ok: Tensor) -> None:
        """Replace the oldest rows by unit vectors (B, K), the same on every process, if `ok` (bool ()) is true. If B is
        above M, only the last M vectors are stored."""
        length = len(self.rows)
        places = ((self.oldest + torch.arange(len(vectors), device=vectors.device)) % length)[-length:]
        self.rows[places] = torch.where(ok, vectors[-length:].to(self.rows.dtype), self.rows[places])
        self.oldest.copy_(torch.where(ok, (self.oldest + len(vectors)) % length, self.oldest))
