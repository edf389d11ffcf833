"""Parts of a source, by indices: any part, and those of --subset."""

import hashlib
from pathlib import Path
from typing import final

import numpy as np

from ..errors import UserError
from ..randomness import key
from .sampler import permute
from .source import Source


@final
class Subset(Source):
    """The samples `indices` (int64) of another source, in that order."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.labels = None if source.labels is None else source.labels[indices]
        self.classes = source.classes
        self.labels_from, self.left_out = source.labels_from, source.left_out
        self.fingerprint = source.fingerprint
        self.description = f"{len(indices):,} of {source.description}"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        """The name of the sample in the whole source."""
        return self.source.name(int(self.indices[index]))


def choose(source: Source, asked: float | str, seed: int, without: np.ndarray) -> Subset:
    """The part of the source that --subset asks for, in the source's order, without the samples `without` (int64 indices).

    asked: a share in (0, 1] or a number of samples above 1, drawn by `seed`; or a file of indices. The drawn samples are
    the first ones of a permutation of all indices, so of two parts with one seed the smaller is contained in the larger,
    whatever is left out. The fingerprint depends on which samples they are. Raises UserError for more samples than there
    are and for a file that cannot be used.
    """
    free = np.ones(len(source), bool)
    free[without] = False
    most = int(free.sum())
    if isinstance(asked, str):
        indices = _listed(asked, len(source))
        indices = indices[free[indices]]
        if not len(indices):
            raise UserError(f"--subset {asked}: all of its images are held out for validation; give --val-images fewer")
    else:
        count = max(1, round(asked * most)) if asked <= 1 else int(asked)
        if count > most:
            raise UserError(f"--subset {asked:g}: there are {most:,} images to train on")
        order = permute(np.arange(len(source)), len(source), key(seed, "subset"))
        indices = np.sort(order[free[order]][:count])
    part = Subset(source, indices)
    chosen = indices.astype("<i8").tobytes()
    part.fingerprint = hashlib.blake2b(source.fingerprint.encode() + chosen, digest_size=16).hexdigest()
    flag = f"--subset {asked}" if isinstance(asked, str) else f"--subset {asked:g}"
    part.description = f"{len(part):,} of {most:,} images: {flag} ({source.description})"
    return part


def _listed(file: str, size: int) -> np.ndarray:
    """The indices in a file, sorted, int64: a .npy with one axis, or whole numbers in text. Raises UserError unless each is
    one of `size` samples and none is there twice."""
    try:
        if Path(file).suffix == ".npy":
            found = np.load(file, allow_pickle=False)
        else:
            found = np.array(Path(file).read_text("ascii").split(), np.int64)
    except OSError as problem:
        raise UserError(
            f"--subset {file}: {problem.strerror or problem}; give a share (0.1), a number of images (2000), or a file "
            f"with their indices"
        ) from None
    except (ValueError, OverflowError, EOFError):
        raise UserError(
            f"--subset {file} holds no list of indices: give a .npy of whole numbers, or a text file with one a line"
        ) from None
    if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found):
        raise UserError(
            f"--subset {file} holds {found.dtype} {found.shape}: it must be a list of whole numbers, with one axis"
        )
    indices = np.sort(found.astype(np.int64))
    if indices[0] < 0 or indices[-1] >= size:
        worst = indices[0] if indices[0] < 0 else indices[-1]
        raise UserError(f"--subset {file} names image {worst}: the {size:,} images have the indices 0 to {size - 1}")
    twice = indices[1:][indices[1:] == indices[:-1]]
    if len(twice):
        raise UserError(f"--subset {file} names image {twice[0]} twice: each may be there once")
    return indices
