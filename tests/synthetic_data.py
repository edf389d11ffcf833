"""Data sources of made-up images: in memory, and as numbered files."""

from pathlib import Path

import numpy as np
from conftest import picture

from ssl_pretrain.data.source import Source
from ssl_pretrain.data.views import Jitter, ViewSpec

BIG_VIEW = ViewSpec(name="big", size=(24, 20), scale=(0.2, 1.0), jitter=Jitter(), blur=0.5)


class ArraySource(Source):
    """Images in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, classes: tuple[str, ...] | None = None) -> None:
        self.images, self.labels, self.classes = images, labels, classes
        self.fingerprint, self.description = "arrays", "arrays"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]

    def name(self, index: int) -> str:
        return str(index)


class NumberedFiles(Source):
    """A folder's files by number, `0.jpg`, `1.jpg`, ..."""

    def __init__(self, folder: Path, count: int, labelled: bool = True) -> None:
        self.folder, self.count = folder, count
        self.labels = np.arange(count, dtype=np.int64) * 10 if labelled else None
        self.classes, self.fingerprint, self.description = None, "", ""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return (self.folder / f"{index}.jpg").read_bytes()

    def name(self, index: int) -> str:
        return f"{index}.jpg"


def noisy_classes(count: int, seed: int, classes: int = 7, noise: float = 300.0) -> ArraySource:
    """Images 8 x 8 of classes that overlap."""
    centres = np.stack([np.asarray(picture(1000 + c, (8, 8))) for c in range(classes)]).astype(np.float64)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    images = centres[labels] + noise * rng.standard_normal((count, 8, 8, 3))
    return ArraySource(images.clip(0, 255).astype(np.uint8), labels.astype(np.int64))
