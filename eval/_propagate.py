"""Propagates the labels of a video's first frame to the other frames by the similarity of frozen patch features, and
scores them. Nothing is trained (Jabri et al., "Space-Time Correspondence as a Contrastive Random Walk", NeurIPS 2020,
section 3.2; settings of DINO: Caron et al., ICCV 2021, section 4.2.2).

Shapes: H x W pixels of a mask, (h, w) grid of patches, D channels, C labels, T context frames.
"""

import contextlib
import dataclasses
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Bad

from . import _overlap
from ._dense import Reader, batches, enlarged, masked, patches_of, shares_of
from ._task import UNKNOWN, Task

LEAST_FRAMES = 3  # of a video: the first frame's labels are given, and the last frame is not scored


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Settings of the label propagation."""

    frames: int  # number of preceding context frames, besides the first frame
    top: int  # number of patches of all context frames from which a patch takes its label
    radius: int  # largest distance in patches, on each axis, between a patch and those that it takes its label from
    temperature: float  # T of a patch's weight, exp(cosine / T)


def propagate(features: Iterable[Tensor], first: Tensor, walk: Walk) -> Iterator[Tensor]:
    """Labels (h, w, C) float32 of every frame after the first.

    features: of each frame including the first, (h, w, D); first: the first frame's labels (h, w, C), as shares of each
    patch. A patch's label is the mean of the labels of the `top` most similar patches, weighted by exp(cosine / T).
    They are selected among the patches at most `radius` away on both axes, in the first frame and the `frames` before.
    """
    frames = iter(features)
    start = normalize(next(frames), dim=2), first
    before: deque[tuple[Tensor, Tensor]] = deque(maxlen=walk.frames)
    for raw in frames:
        now = normalize(raw, dim=2)
        labels = _carry(now, [start, *before], walk)
        before.append((now, labels))
        yield labels


def _carry(now: Tensor, context: list[tuple[Tensor, Tensor]], walk: Walk) -> Tensor:
    """Labels (h, w, C) of unit features (h, w, D), from the features and labels of T context frames. It works row by
    row, because only a band of 2 * radius + 1 rows of the context frames is within the radius."""
    h, w, _ = now.shape
    features = torch.stack([unit for unit, _ in context])  # (T, h, w, D)
    labels = torch.stack([known for _, known in context])
    column = torch.arange(w, device=now.device)
    far = (column[:, None] - column).abs() > walk.radius  # (w, w)
    rows = []
    for y in range(h):
        band = slice(max(0, y - walk.radius), y + walk.radius + 1)
        similarity = now[y] @ features[:, band].flatten(0, 2).T
        similarity.view(w, -1, w).masked_fill_(far[:, None], -torch.inf)
        # If fewer patches are near enough, the others have the weight exp(-inf) = 0.
        best, index = similarity.topk(min(walk.top, similarity.shape[1]), dim=1)
        weight = (best / walk.temperature).softmax(1)
        rows.append((weight[:, :, None] * labels[:, band].flatten(0, 2)[index]).sum(1))
    return torch.stack(rows)


# ---- Scored against masks.


def follow(
    task: Task, walk: Walk, ignore_label: Sequence[int], *, size: tuple[int, int], bad: list[Bad]
) -> tuple[_overlap.Scores, dict[str, Any]]:
    """J and F of each object of the first mask of each video; and the settings for the protocol.

    They are means over a video's frames except the first and the last (as in DAVIS), then over all objects. size: of
    the images; bad: unreadable images are added to it. Raises UserError if there is no object to follow."""
    source, reader = masked(task.data.test), Reader.of_objects(masked(task.data.test), ignore_label)
    videos = {name: rows for name, rows in source.folders().items() if len(rows) >= LEAST_FRAMES}
    per_video: dict[str, dict[str, float]] = {}
    sums: list[tuple[float, float, int]] = []
    empty, frames = [], 0
    for number, (name, rows) in enumerate(videos.items()):
        scores = _video(task, reader, rows, walk, size=size, bad=bad)
        task.report("videos", number + 1, len(videos))
        if not len(scores):
            empty.append(name)
            continue
        objects = scores.mean(0)  # (objects, 2)
        per_video[name] = dict(zip(("j", "f"), (100 * objects.mean(0)).tolist(), strict=True))
        sums.append((*objects.sum(0).tolist(), len(objects)))
        frames += len(scores)
    if not sums:
        raise UserError(
            f"{task.data.name} has no video to follow an object in: each folder is one, of at least {LEAST_FRAMES} frames "
            f"with masks, whose first mask has an object (a value above 0); found {len(source.folders())} folder(s), "
            f"{len(empty)} of them without an object or with too few frames that can be read"
        )
    j, f, size_of = np.array(sums).T
    metrics: dict[str, Any] = {"per_sequence": per_video, "sequences": len(per_video), "n": frames}
    for key, part in (("jf", (j + f) / 2), ("j", j), ("f", f)):
        metrics[key], metrics[f"{key}_interval"] = _overlap.mean(part, size_of, task.seed)
    facts = {
        **dataclasses.asdict(walk),
        "first frame": "its mask, as shares of each patch",
        "scored": "frames but the first and the last; the mean over frames, then over objects",
        "contour_tolerance": _overlap.TOLERANCE,
        "left_out": empty,
    }
    return [(f"{walk.frames} frames back, top {walk.top}, radius {walk.radius}", metrics)], facts


def _video(
    task: Task, reader: Reader, rows: list[int], walk: Walk, *, size: tuple[int, int], bad: list[Bad]
) -> np.ndarray:
    """J and F of the frames except the first and the last, (frames, objects, 2); empty if the first mask has no object
    or too few frames can be read."""
    source = masked(task.data.test)
    order: list[int] = []

    def features() -> Generator[Tensor, None, None]:
        for index, pixels in batches(task, task.data.test, rows, size, bad, "frames"):
            for i, patches in zip(index, patches_of(task, pixels), strict=True):
                order.append(i)
                yield patches

    with contextlib.closing(features()) as given:
        start = next(given, None)
        if start is None:
            return np.empty(0)
        mask = reader.read(source, order[0])
        objects = np.unique(mask[mask > 0])
        if not len(objects):
            return np.empty(0)
        table = np.zeros(len(reader.table), np.int64)
        table[objects] = np.arange(1, len(objects) + 1)
        first = shares_of(np.where(mask >= 0, table[mask], UNKNOWN), (start.shape[0], start.shape[1]), len(objects) + 1)
        labels = torch.from_numpy(first).to(task.device).unflatten(0, start.shape[:2])
        scores = []
        for number, carried in enumerate(propagate(_chain(start, given), labels, walk), start=1):
            true = reader.read(source, order[number])
            found = _stretched(enlarged(carried, true.shape)).argmax(0)
            known = true != UNKNOWN
            scores.append(
                [_agreement((found == o) & known, true == value) for o, value in enumerate(objects.tolist(), start=1)]
            )
    return np.array(scores[:-1]).reshape(-1, len(objects), 2) if len(scores) > 1 else np.empty(0)


def _chain(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def _stretched(scores: np.ndarray) -> np.ndarray:
    """Each label's scores (C, H, W), scaled to 0 ... 1 as in DINO's protocol: scores decrease with the number of
    frames, faster for small objects. A label whose scores are all 0 stays at 0."""
    low = scores.min((1, 2), keepdims=True)
    high = scores.max((1, 2), keepdims=True)
    return np.where(high > 0, (scores - low) / np.maximum(high - low, 1e-12), 0.0)


def _agreement(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    return _overlap.region_similarity(found, true), _overlap.contour_accuracy(found, true)
