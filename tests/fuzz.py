"""Damaged files for the fuzz tests: `mutants` makes them, `damage` tries a reader on them.

    python tests/fuzz.py KIND 2000     run one kind's fuzz test on more mutants than the suite does

KIND is a word in the names of the tests (pytest's -k), e.g. parquet. SSL_PRETRAIN_FUZZ sets the number of mutants.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from ssl_pretrain.errors import UserError

COUNT = int(os.environ.get("SSL_PRETRAIN_FUZZ", "200"))


def mutants(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """`count` damaged copies of `data`, the same for the same seed; each differs from `data`.

    Each has one to four damages: flipped bits, bytes overwritten with extreme values, a cut end, a slice cut out,
    inserted bytes, a slice doubled, a run of zeros, two slices swapped.
    """
    made = 0
    rng = np.random.default_rng([seed, len(data)])
    while made < count:
        mutant = bytearray(data)
        for _ in range(int(rng.integers(1, 5))):
            _harm(mutant, rng)
        if bytes(mutant) != data:
            made += 1
            yield bytes(mutant)


def _harm(data: bytearray, rng: np.random.Generator) -> None:
    """One damage, in place."""
    size = len(data)
    if size == 0:
        data += rng.bytes(int(rng.integers(1, 9)))
        return
    # Half of the damage lies in the first or last 256 bytes, where headers and footers are.
    window = [(0, size), (0, size), (0, min(256, size)), (max(0, size - 256), size)][int(rng.integers(4))]
    at = int(rng.integers(*window))
    length = int(min(rng.integers(1, 1 + max(1, min(size, 2000))), size - at))
    match int(rng.integers(8)):
        case 0:
            data[at] ^= 1 << int(rng.integers(8))
        case 1:
            extreme = [b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\0"]
            value = extreme[int(rng.integers(len(extreme)))]
            data[at : at + len(value)] = value
        case 2:
            del data[at:]
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = rng.bytes(min(length, 64))
        case 5:
            data[at:at] = data[at : at + length]
        case 6:
            data[at : at + length] = bytes(length)
        case _:
            other = int(rng.integers(0, size))
            one, two = data[at : at + 16], data[other : other + 16]
            data[at : at + len(one)] = two[: len(one)]
            data[other : other + len(two)] = one[: len(two)]


def damage(
    data: bytes,
    seed: int,
    read: Callable[[bytes], str],
    count: int = COUNT,
    allowed: tuple[type[Exception], ...] = (UserError,),
) -> Counter[str]:
    """Try `read` on `count` mutants of `data`. Returns how many ended how: the words that `read` returned, "error" for
    an `allowed` exception with a message of one line. Raises AssertionError with the mutant's number for any other
    exception, for an empty message, and for one of several lines."""
    ends: Counter[str] = Counter()
    for number, mutant in enumerate(mutants(data, seed, count)):
        try:
            ends[read(mutant)] += 1
        except allowed as problem:
            text = str(problem)
            assert text.strip(), f"mutant {number} of seed {seed}: no message"
            assert "\n" not in text.strip(), f"mutant {number} of seed {seed}: more than one line: {text!r}"
            ends["error"] += 1
        except Exception as problem:
            raise AssertionError(f"mutant {number} of seed {seed} ({len(mutant)} bytes): {problem!r}") from problem
    return ends


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdecimal():
        sys.exit(__doc__)
    kind, number = sys.argv[1:]
    environment = {**os.environ, "SSL_PRETRAIN_FUZZ": number}
    here = os.path.dirname(os.path.abspath(__file__))
    argv = ["-m", "pytest", "-q", "-s", "-n", "0", "-k", f"fuzz and {kind}", "--timeout=3600", here]
    os.execve(sys.executable, [sys.executable, *argv], environment)
