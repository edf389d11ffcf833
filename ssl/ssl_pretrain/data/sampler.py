"""Sampling: an endless stream of epochs, each a shuffled pass over the data, in which a position is one integer.

The order of an epoch is a keyed bijection of [0, size) evaluated where it is needed: a generalised Feistel network on
Z_a x Z_b with a b just above `size`, walked along its cycles until it is back inside (Black and Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002, sections 3 and 4). No array of the data's size exists anywhere.
"""

import math

import numpy as np

from ..randomness import key

# Four rounds make a pseudorandom permutation of a large domain (Luby and Rackoff, 1988); a domain of six needs twelve
# before pairs of positions look independent
_ROUNDS = 12
# Odd constants of SplitMix64 (Steele, Lea and Flood, 2014): the increment and the finaliser's two multipliers
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MULTIPLY_1, _MULTIPLY_2, _HALF = np.uint64(_MIX_1), np.uint64(_MIX_2), np.uint64(32)
_MASK = (1 << 64) - 1


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where a keyed permutation of [0, size) sends `positions`.

    positions: any shape, integers in [0, size). Returns int64 of the same shape. For a fixed size and key it is a
    bijection; over keys every position goes everywhere alike. Raises ValueError for a size outside 1..2**62 or a
    position out of range.
    """
    positions = np.asarray(positions)
    if not 1 <= size <= 1 << 62:
        raise ValueError(f"a permutation of {size} items")
    if positions.size and not (positions.min() >= 0 and positions.max() < size):
        raise ValueError(f"positions must lie in [0, {size})")
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    keys = [np.uint64(_scramble(key + i * _GOLDEN)) for i in range(1, _ROUNDS + 1)]
    values = _network(positions.ravel().astype(np.uint64), a, b, keys)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _network(values[outside], a, b, keys)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64).reshape(positions.shape)


def samples(position: int, count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The stream's samples at `position`, position + 1, ..., of a data set of `size`: epochs (count,) and the indices
    of the samples in the data set (count,), both int64. Every epoch holds each index once, in an order of its own."""
    epochs, within = np.divmod(np.arange(position, position + count, dtype=np.int64), size)
    index = np.empty(count, dtype=np.int64)
    start = 0
    while start < count:
        epoch = int(epochs[start])
        stop = min(count, (epoch + 1) * size - position)
        index[start:stop] = permute(within[start:stop], size, key(seed, "order", epoch))
        start = stop
    return epochs, index


def _network(values: np.ndarray, a: int, b: int, keys: list[np.uint64]) -> np.ndarray:
    """A keyed permutation of [0, a b). values: uint64 (N,)."""
    x, y = np.divmod(values, np.uint64(b))
    modulus, other = np.uint64(a), np.uint64(b)
    for round_key in keys:
        z = y + round_key
        z *= _MULTIPLY_1
        z ^= z >> _HALF
        z *= _MULTIPLY_2
        z >>= _HALF  # uniform in [0, 2**32), scaled to [0, modulus) without a division
        z *= modulus
        z >>= _HALF
        z += x
        np.subtract(z, modulus, out=z, where=z >= modulus)
        x, y, modulus, other = y, z, other, modulus
    return x * np.uint64(b) + y  # an even number of rounds: x is of Z_a again


def _scramble(z: int) -> int:
    """SplitMix64's finaliser: 64 bits to 64 well-mixed bits."""
    z &= _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)
