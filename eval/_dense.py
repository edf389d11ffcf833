"""Images and masks for segmentation: resized images, features of their patches, and the classes of a patch's pixels.

Shapes: B images, n of a split, H x W pixels of a mask, (h, w) grid of patches, N = h * w, D channels, C classes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_pretrain.backbones.backbone import Features
from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.source import Source
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Bad, NotFinite, crops_of
from ssl_pretrain.features.products import tf32

from ._masks import Masked
from ._task import UNKNOWN, Images, Task

BINARY = 255  # means 1 in masks whose only other value is 0


def masked(images: Images) -> Masked:
    """The source of a segmentation's images, with masks."""
    assert isinstance(images.source, Masked)  # guaranteed by segment.open_data
    return images.source


# ---- Masks.


def ignored(labels: Sequence[int], *sources: Masked) -> set[int]:
    """The values of `labels` that mean "unknown". Masks with only 0 and 255 are black and white: there 255 is a
    class."""
    values = set().union(*(source.values for source in sources))
    return set(labels) - ({BINARY} if values == {0, BINARY} else set())


@final
class Reader:
    """Reads masks and maps their values to the evaluation's class numbers."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = table  # (V,) int64: the class of each mask value, or UNKNOWN

    @classmethod
    def of_classes(cls, train: Masked, test: Masked, labels: Sequence[int]) -> "Reader":
        """A reader for the classes of the training masks, in the order of their values. labels: the values that mean
        "unknown"."""
        table = np.full(max([*train.values, *test.values]) + 1, UNKNOWN)
        values = sorted(train.values.keys() - ignored(labels, train, test))
        table[values] = np.arange(len(values))
        return cls(table)

    @classmethod
    def of_objects(cls, source: Masked, labels: Sequence[int]) -> "Reader":
        """A reader that keeps the values, for masks of objects."""
        table = np.arange(max(source.values) + 1)
        table[[value for value in ignored(labels, source) if 0 <= value < len(table)]] = UNKNOWN
        return cls(table)

    def read(self, source: Masked, index: int) -> np.ndarray:
        """The mask (H, W) int64 of an image, UNKNOWN for unknown pixels."""
        return self.table[source.mask(index)]


# ---- Images.


def whole_patches(task: Task, requested: tuple[int, ...] | None) -> tuple[int, int]:
    """The size (height, width) that every image is resized to: `requested` (one side or two), else the encoder's
    training size. Raises UserError for an invalid size."""
    if requested is None:
        size = task.encoder.preprocessing.crop
    elif len(requested) > 2 or min(requested, default=0) < 1:
        raise UserError(f"--image-size {' '.join(map(str, requested))}: one side, or height and width, in pixels")
    else:
        size = requested[0], requested[-1]
    stride = task.encoder.backbone.stride
    if any(side % step for side, step in zip(size, stride, strict=True)):
        fits = [max(step, round(side / step) * step) for side, step in zip(size, stride, strict=True)]
        raise UserError(
            f"--image-size {size[0]} {size[1]} does not divide into patches of {stride[0]} x {stride[1]} pixels; "
            f"{fits[0]} {fits[1]} does"
        )
    cells = grid_of(task, size)
    if min(cells) < 2:
        raise UserError(
            f"this encoder gives {cells[0]} x {cells[1]} patches of an image of {size[0]} x {size[1]} pixels, and a map "
            f"needs at least 2 x 2: choose a larger --image-size, or an encoder with patches"
        )
    return size


@torch.no_grad()
def grid_of(task: Task, size: tuple[int, int]) -> tuple[int, int]:
    """The grid (h, w) of patches that the encoder gives for images of that size. Raises UserError if it does not accept
    them."""
    blank = torch.zeros(1, task.encoder.preprocessing.channels, *size, device=task.device)
    try:
        return task.encoder.to(task.device).eval()(blank).grid
    except (RuntimeError, ValueError, TypeError, AssertionError) as problem:
        side = "x".join(map(str, size))
        raise UserError(
            f"the encoder does not take images of {side} pixels ({problem}): leave --image-size out, or load it for that "
            f"size (--encoder ...,image-size={side})"
        ) from None


@final
class Resized(Source):
    """The images `rows` of a source, resized as a whole to `size`, (H, W, channels) uint8."""

    def __init__(self, source: Source, rows: Sequence[int], size: tuple[int, int], task: Task) -> None:
        self.source, self.rows, self.size = source, rows, size
        self.how = task.encoder.preprocessing
        self.labels = self.classes = None
        self.fingerprint, self.description = source.fingerprint, source.description

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        pixels = torch.tensor(decode(self.source[self.rows[index]], self.how.channels)).permute(2, 0, 1)
        mode = self.how.interpolation
        return (
            F.interpolate(pixels[None], self.size, mode=mode, antialias=True)[0].permute(1, 2, 0).contiguous().numpy()
        )

    def name(self, index: int) -> str:
        """The name of the sample in the source."""
        return self.source.name(self.rows[index])


def batches(
    task: Task, images: Images, rows: Sequence[int], size: tuple[int, int], bad: list[Bad], what: str
) -> Iterator[tuple[list[int], Tensor]]:
    """Yields the readable images, normalised (B, channels, *size), with their indices in the source. Unreadable images
    are added to `bad`."""
    how = dataclasses.replace(task.encoder.preprocessing, resize=min(size), crop=size)
    source = Resized(images.source, rows, size, task)
    done = 0
    for pixels, failures in crops_of(how, source, task.batch_size, task.workers):
        failed = {one.index for one in failures}
        bad += [Bad(rows[one.index], one.name, one.reason) for one in failures if rows[one.index] not in _rows(bad)]
        index = [rows[i] for i in range(done, done + len(pixels) + len(failures)) if i not in failed]
        done += len(pixels) + len(failures)
        if len(pixels):
            yield index, task.encoder.normalise(torch.from_numpy(pixels).to(task.device))
        task.report(what, done, len(rows))


def none_read(images: Images, bad: list[Bad]) -> UserError:
    """The error to raise if no image can be read."""
    return UserError(f"no image of {images.source.description} can be read; {bad[-1].name}: {bad[-1].reason}")


def _rows(bad: list[Bad]) -> set[int]:
    return {one.index for one in bad}


@torch.no_grad()
def forward(task: Task, images: Tensor) -> Features:
    """Features of normalised images. Raises NotFinite if the patches are NaN or infinite."""
    with tf32(task.device), torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
        features = task.encoder(images)
    if not features.patches.isfinite().all():
        raise NotFinite("the encoder gives NaN or infinity: its training diverged, or --precision bf16 is too coarse")
    return features


def patches_of(task: Task, images: Tensor) -> Tensor:
    """Features of the patches (B, h, w, D) float32 of normalised images."""
    features = forward(task, images)
    return features.patches.float().unflatten(1, features.grid)


def enlarged(scores: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Scores (h, w, C), enlarged bilinearly to (C, H, W)."""
    return F.interpolate(scores.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)[0].cpu().numpy()


# ---- Patches and pixels.


def shares_of(mask: np.ndarray, grid: tuple[int, int], classes: int) -> np.ndarray:
    """The share of each patch's area that each class covers, (N, C) float32. Unknown pixels count for no class."""
    rows, columns = (
        np.minimum(np.arange(sides) * cells // sides, cells - 1) for sides, cells in zip(mask.shape, grid, strict=True)
    )
    cell = rows[:, None] * grid[1] + columns
    area = np.bincount(cell.ravel(), minlength=grid[0] * grid[1])
    known = mask >= 0
    inside = np.bincount(cell[known] * classes + mask[known], minlength=len(area) * classes)
    return (inside.reshape(-1, classes) / np.maximum(area, 1)[:, None]).astype(np.float32)
