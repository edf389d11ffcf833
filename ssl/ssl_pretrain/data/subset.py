"""A part of a source, by indices."""

from typing import final

import numpy as np

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
