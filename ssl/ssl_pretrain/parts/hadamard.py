"""Hadamard matrices: rotations in which every output is made of all inputs in equal shares.

Shapes: n rows and columns.
"""

import torch
from torch import Tensor

from ..randomness import key


def hadamard(n: int) -> Tensor:
    """An orthogonal matrix (n, n), float64, whose entries are all +- 1 / sqrt(n): by the constructions of Sylvester and
    Paley (for prime numbers). For an n that these do not give (1, 2 and multiples of 4 can be Hadamard, and of the usual
    widths of networks all are found): random signs made orthogonal, whose entries are only about as large."""
    doublings = 0
    while True:
        found = _paley(n >> doublings)
        if found is not None:
            for _ in range(doublings):
                found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
            return found / n**0.5
        if (n >> doublings) % 2:
            break
        doublings += 1
    generator = torch.Generator().manual_seed(key("hadamard", n))
    signs = torch.randint(0, 2, (n, n), generator=generator, dtype=torch.int64).double() * 2 - 1
    return torch.linalg.qr(signs)[0]


def _paley(n: int) -> Tensor | None:
    """A Hadamard matrix of order n with entries +- 1: 1, 2, q + 1 for a prime q = 3 mod 4, or 2 (q + 1) for a prime q = 1
    mod 4; else None."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if n % 4 == 0 and _is_prime(n - 1):
        border = torch.ones(1, n - 1, dtype=torch.float64)
        skew = torch.cat([torch.cat([torch.zeros(1, 1), border], 1), torch.cat([-border.T, _residues(n - 1)], 1)])
        return skew + torch.eye(n, dtype=torch.float64)
    q = n // 2 - 1
    if n % 4 == 0 and q % 4 == 1 and _is_prime(q):
        border = torch.ones(1, q, dtype=torch.float64)
        conference = torch.cat([torch.cat([torch.zeros(1, 1), border], 1), torch.cat([border.T, _residues(q)], 1)])
        eye = torch.eye(n // 2, dtype=torch.float64)
        on, off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        return torch.kron(eye, on.double()) + torch.kron(conference, off.double())
    return None


def _residues(q: int) -> Tensor:
    """The Jacobsthal matrix (q, q) of a prime: +1 where i - j is a square modulo q, -1 where it is none, 0 for i = j."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    steps = torch.arange(q)
    return character[(steps[:, None] - steps) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
