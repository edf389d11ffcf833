"""Randomness as a function of keys: no generator carries state from one step, sample or worker to the next.

Every random draw of a run uses a new generator whose key says what the draw is *for* (seed, epoch, sample; or seed,
step, draw). So an exact resume needs no saved state, and workers, ranks and machines agree by construction.
"""

import hashlib

import numpy as np

Part = int | str


def key(*parts: Part) -> int:
    """A 63-bit integer that depends on every part and on their order; the same on every machine and Python version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_generator(*parts: Part) -> np.random.Generator:
    """A NumPy generator keyed by `parts` (Philox: counter-based, cheap to create, the same stream on every
    platform)."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))
