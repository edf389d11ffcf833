"""Images of coloured boxes with their masks, for the evaluators of segmentation."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = np.array([[90, 90, 90], [220, 40, 40], [40, 60, 220]])  # of the classes 0, 1, 2


def scene(seed: int, shape: tuple[int, int] = (32, 48)) -> tuple[np.ndarray, np.ndarray]:
    """A noisy grey image with a red and a blue box, and its mask."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint8)
    for value in (1, 2):
        top, left = rng.integers(0, shape[0] // 2), rng.integers(0, shape[1] // 2)
        mask[top : top + shape[0] // 2, left : left + shape[1] // 2] = value
    pixels = COLOURS[mask] + rng.integers(-25, 25, (*shape, 3))
    return pixels.clip(0, 255).astype(np.uint8), mask


def write(folder: Path, name: str, mask_name: str, seed: int, **options: Any) -> None:
    """A scene and its mask as files of `folder`."""
    pixels, mask = scene(seed, **options)
    for path, array in ((folder / name, pixels), (folder / mask_name, mask)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
