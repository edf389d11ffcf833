"""Segmentation with frozen patch features: kNN and a linear layer (mIoU), the object without labels (J), and label
propagation in videos (J and F).

Shapes: B images, n of a split, H x W pixels of an image and its mask, (h, w) grid of patches, N = h * w, D channels of a
patch, M stored patches of the training images, C classes, G linear layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Bad
from ssl_pretrain.features.neighbours import nearest
from ssl_pretrain.optim import schedules
from ssl_pretrain.randomness import numpy_generator

from . import _foreground, _overlap
from ._dense import Reader, batches, enlarged, grid_of, ignored, masked, none_read, patches_of, shares_of, whole_patches
from ._masks import Found, class_names, find
from ._propagate import Walk, follow
from ._results import Outcome
from ._task import UNKNOWN, Data, Images, Side, Task

IMAGES = "masks"
BASELINES = ("random",)
CHUNK = 4096  # patches whose votes are counted at a time
BATCH_NORM_EPS = 1e-6
WEIGHT_DECAY = 1e-4
MAX_LR = 1e30  # above it a step exceeds the range of float32

TaskName = Literal["knn", "linear", "foreground", "propagate"]
TRAINED = ("knn", "linear")
Scorer = Callable[[Tensor], Tensor]  # features (B, h, w, D) to scores of the classes (B, h, w, C)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Segmentation."""

    task: tuple[TaskName, ...] = ("knn", "linear")
    """Tasks: knn or linear (learn from the masks of the training images), foreground (one object, without labels),
    propagate (each folder is a video; the labels of its first mask are propagated). The first one gives the headline
    number."""
    image_size: tuple[int, ...] | None = None
    """Side, or height and width, to which every whole image is resized (default: the encoder's training size)."""
    ignore_label: tuple[int, ...] = (255,)
    """Mask values of unknown pixels (CamVid: 11)."""
    bank: int = 65536
    """Number of patches of the training images to learn from, drawn by the seed, equally from each image."""
    k: tuple[int, ...] = (30,)
    """knn: number of neighbours that vote; the first one gives the headline number."""
    temperature: float = 0.02
    """knn: T of a neighbour's weight, exp(cosine / T)."""
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
    """linear: peak learning rates of AdamW to try."""
    steps: int = 1000
    """linear: number of training steps, each with 4096 patches."""
    held_out: float = 0.1
    """linear: share of the training images that is held out to select the learning rate."""
    maps: tuple[_foreground.Map, ...] | None = None
    """foreground: score of a patch: pca (first principal component of the image's patches) or attention (of the CLS
    token); the first one gives the headline number (default: all that the encoder has)."""
    frames: int = 7
    """propagate: number of preceding context frames, in addition to the first frame (DINO: 7)."""
    top: int = 5
    """propagate: number of context patches that determine a patch's label (DINO: 5)."""
    radius: int = 12
    """propagate: largest distance, in patches, that a label may move on each axis (DINO: 12)."""
    affinity_temperature: float = 0.1
    """propagate: T of a patch's weight, exp(cosine / T) (DINO: 0.1)."""


def open_data(name: str, train_split: str | None, test_split: str | None, config: Config) -> Data:
    """Images with masks for training and test, or a single set of images if no task is trained. The classes are the
    values of the training masks. Raises UserError if there are no masks, splits or classes, or if test masks have
    values that no training mask has."""
    found = find(name)
    if not set(config.task) & set(TRAINED):
        if train_split:
            raise UserError(
                f"{' and '.join(config.task)} train nothing and take a single set of images: name it with --test-split "
                f"{train_split}"
            )
        images = _images(found, test_split or _test_split(found))
        return Data(name, images, images, ())
    if train_split is None or test_split is None:
        train_split, test_split = _both_splits(found, train_split, test_split)
    if train_split == test_split:
        raise UserError(
            f"--train-split and --test-split are both {train_split!r}: a test on training images is not meaningful"
        )
    train, test = _images(found, train_split), _images(found, test_split)
    known, in_test = masked(train).values, masked(test).values
    unknown = ignored(config.ignore_label, masked(train), masked(test))
    values = sorted(known.keys() - unknown)
    if len(values) < 2:
        kind = f"of one class, {values[0]}" if values else "unknown"
        raise UserError(
            f"{name}: all pixels of the training masks are {kind} (--ignore-label "
            f"{' '.join(map(str, config.ignore_label))}): at least two classes are needed"
        )
    if missing := sorted(in_test.keys() - known.keys() - unknown):
        listed = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{name}: masks of split {test_split!r} hold {len(missing)} class(es) that no mask of split "
            f"{train_split!r} has: {listed} (the first in {in_test[missing[0]]} of them); if they mean 'unknown', give "
            f"--ignore-label "
            f"{' '.join(map(str, [*config.ignore_label, *missing[:5]]))}"
        )
    by_value = class_names(name)
    return Data(name, train, test, tuple(by_value.get(value, str(value)) for value in values))


def example(data: Path) -> list[str]:
    """Flags of a run of seconds, for the conformance check."""
    return ["--task", "knn", "linear", "--steps", "5", "--image-size", "32"]


def evaluate(task: Task, config: Config) -> Outcome:
    """Run the tasks in `config.task`. kNN and the linear layer learn only from the training images; no setting is
    selected with the test masks.

    Raises UserError for options out of range, an encoder without a grid of patches, an image size that it does not
    accept, data without videos (propagate), and if no image can be read.
    """
    _check(config)
    size = whole_patches(task, config.image_size)
    bad: dict[str, list[Bad]] = {"train": [], "test": []}
    results: dict[str, _overlap.Scores] = {}
    facts: dict[str, Any] = {}
    order = list(dict.fromkeys(config.task))
    if wanted := [name for name in order if name in TRAINED]:
        results, facts = _learned(task, config, wanted, size=size, bad=bad)
    if "foreground" in order:
        results["foreground"], facts["foreground"] = _foreground.objects(
            task, config.maps, config.ignore_label, size=size, bad=bad["test"]
        )
    if "propagate" in order:
        walk = Walk(frames=config.frames, top=config.top, radius=config.radius, temperature=config.affinity_temperature)
        results["propagate"], facts["propagate"] = follow(task, walk, config.ignore_label, size=size, bad=bad["test"])
    setting, metrics = results[order[0]][0]
    metrics = dict(metrics)
    for name in order[1:]:
        metrics |= {f"{name}_{key}": value for key, value in results[name][0][1].items()}
    metrics["findings"] = _findings(task, facts)
    columns = [key for key in ("miou", "pixel_accuracy", "j", "f", "jf") if _has(results, key)]
    cells = grid_of(task, size)
    return Outcome(
        metrics,
        {
            "headline": f"{order[0]}, {setting}, patches {cells[0]} x {cells[1]}",
            "features": ["patches of the last block, after the final norm"],
            "selection": "fixed in advance",
            "all_scored_on": "test images",
            "image_size": list(size),
            "resize": "the whole image, whatever its shape; scores go back to the mask's size bilinearly",
            "grid": list(cells),
            "ignore_label": sorted(ignored(config.ignore_label, *{masked(task.data.train), masked(task.data.test)})),
            **facts,
            **task.protocol(
                _side(task.data.train, bad["train"]) if wanted else None, _side(task.data.test, bad["test"])
            ),
        },
        [
            {"task": name, "setting": way, **{key: scores.get(key) for key in columns}}
            for name in order
            for way, scores in results[name]
        ],
    )


def _check(config: Config) -> None:
    if not config.task:
        raise UserError("--task: give at least one of knn, linear, foreground, propagate")
    if config.maps is not None and not config.maps:
        raise UserError("--maps: give at least one of pca, attention")
    if not config.k or min(config.k) < 1:
        raise UserError(f"--k is {' '.join(map(str, config.k))}; it must be at least 1")
    for flag in ("bank", "steps", "frames", "top", "radius"):
        if getattr(config, flag) < 1:
            raise UserError(f"--{flag} is {getattr(config, flag)}; it must be at least 1")
    for flag in ("temperature", "affinity_temperature"):
        if not getattr(config, flag) > 0:
            raise UserError(f"--{flag.replace('_', '-')} is {getattr(config, flag)}; it must be above 0")
    if not config.lrs or not all(0 < lr < MAX_LR for lr in config.lrs):
        raise UserError(f"--lrs {' '.join(map(str, config.lrs))}: learning rates must be above 0 and below {MAX_LR:g}")
    if not 0 < config.held_out < 1:
        raise UserError(f"--held-out is {config.held_out}; it must lie between 0 and 1")


# ---- The images and their masks.


def _images(found: Found, split: str | None) -> Images:
    source, without = found.open(split)
    return Images(split or "all images", source, np.full(len(source), UNKNOWN), without)


def _test_split(found: Found) -> str | None:
    """The test split; None (all images) for data that is not split."""
    known = found.splits
    if len(known) < 2:
        return known[0] if known else None
    return next((word for word in ("test", "val", "validation", "valid") if word in known), None)


def _both_splits(found: Found, train: str | None, test: str | None) -> tuple[str, str]:
    """The splits for training and test; splits that are not given are detected by their names."""
    known = found.splits
    train = train or ("train" if "train" in known else None)
    test = test or next((word for word in ("test", "val", "validation", "valid") if word in known), None)
    if train is None or test is None:
        raise UserError(
            f"{found.data} is not split into training and test images (splits with masks: "
            f"{', '.join(known) or 'none'}): put them into folders train/ and val/, or name two with --train-split and "
            f"--test-split; --task foreground and propagate need no training images"
        )
    return train, test


def _side(images: Images, bad: list[Bad]) -> Side:
    """The images that could be read."""
    index = np.setdiff1d(np.arange(len(images.labels)), [one.index for one in bad])
    return Side({}, images.labels[index], index, sorted(set(bad), key=lambda one: one.index))


# ---- Learned from masks: kNN and linear.


@dataclass(frozen=True)
class _Bank:
    """Stored patches of the training images."""

    patches: Tensor  # (M, D) float32
    shares: Tensor  # (M, C) float32: share of the patch that each class covers
    image: np.ndarray  # (M,) int64: index of the training image

    def of(self, images: np.ndarray) -> "_Bank":
        """Only the patches of the given images."""
        rows = np.isin(self.image, images)
        chosen = torch.from_numpy(np.flatnonzero(rows)).to(self.patches.device)
        return _Bank(self.patches[chosen], self.shares[chosen], self.image[rows])


def _learned(
    task: Task,
    config: Config,
    wanted: list[TaskName],
    *,
    size: tuple[int, int],
    bad: dict[str, list[Bad]],
) -> tuple[dict[str, _overlap.Scores], dict[str, Any]]:
    """The scores of each task; and the settings for the protocol."""
    reader = Reader.of_classes(masked(task.data.train), masked(task.data.test), config.ignore_label)
    bank = _gather(task, config, reader, size, bad["train"])
    facts: dict[str, Any] = {"bank": len(bank.patches)}
    scorers: dict[tuple[str, str], Scorer] = {}
    if "knn" in wanted:
        for k in dict.fromkeys(min(k, len(bank.patches)) for k in config.k):
            scorers["knn", f"k {k}"] = _neighbours(bank, k, config.temperature)
        facts["temperature"] = config.temperature
    if "linear" in wanted:
        lr, layer, selection = _selected(task, config, reader, bank, size)
        facts |= selection
        edge = len(config.lrs) > 1 and lr in (min(config.lrs), max(config.lrs))
        scorers["linear", f"lr {lr:g}" + (" (at the edge of the grid)" if edge else "")] = layer
    tables = _score(task, reader, task.data.test, range(len(task.data.test.source)), scorers, size, bad["test"])
    found: dict[str, _overlap.Scores] = {name: [] for name in wanted}
    for (name, setting), table in tables.items():
        if not table[:, _overlap.TRUE].any():
            raise UserError(f"{task.data.name}: no pixel of the masks of split {task.data.test.split!r} is known")
        found[name].append((setting, _overlap.segmentation(table, task.data.classes, task.seed)))
    return found, facts


def _gather(task: Task, config: Config, reader: Reader, size: tuple[int, int], bad: list[Bad]) -> _Bank:
    """Patches with at least one known pixel, at most an equal number from each training image."""
    train = task.data.train
    source = masked(train)
    each = max(1, config.bank // len(source))
    rows = np.sort(numpy_generator(task.seed, "bank images").permutation(len(source))[: config.bank]).tolist()
    patches, shares, owners = [], [], []
    for index, images in batches(task, train, rows, size, bad, f"patches of {train.split}"):
        for i, of_image in zip(index, patches_of(task, images), strict=True):
            share = shares_of(reader.read(source, i), (of_image.shape[0], of_image.shape[1]), len(task.data.classes))
            known = np.flatnonzero(share.any(1))
            chosen = np.sort(numpy_generator(task.seed, "bank", i).permutation(known)[:each])
            patches.append(of_image.flatten(0, 1)[torch.from_numpy(chosen).to(task.device)])
            shares.append(torch.from_numpy(share[chosen]).to(task.device))
            owners.append(np.full(len(chosen), i))
    if not owners:
        raise none_read(train, bad)
    if not sum(map(len, owners)):
        raise UserError(
            f"{task.data.name}: no pixel of the masks of split {train.split!r} is known where images can be read"
        )
    return _Bank(torch.cat(patches), torch.cat(shares), np.concatenate(owners))


def _neighbours(bank: _Bank, k: int, temperature: float) -> Scorer:
    """Scores of a patch's classes from its k most similar patches of the bank. They vote with their shares of each
    class, weighted by exp(cosine / T) (similar to Balažević et al., "Towards In-Context Scene Understanding", NeurIPS
    2023)."""

    def score(patches: Tensor) -> Tensor:
        similarity, index = nearest(patches.flatten(0, 2), bank.patches, k)
        parts = [
            ((near / temperature).softmax(1)[:, :, None] * bank.shares[rows]).sum(1)
            for near, rows in zip(similarity.split(CHUNK), index.split(CHUNK), strict=True)
        ]
        return torch.cat(parts).unflatten(0, patches.shape[:3])

    return score


def _selected(
    task: Task, config: Config, reader: Reader, bank: _Bank, size: tuple[int, int]
) -> tuple[float, Scorer, dict[str, Any]]:
    """The learning rate with the highest mIoU on held-out training images, the layer trained with it on all training
    images, and the selection for the protocol."""
    images = np.unique(bank.image)
    if len(images) < 2:
        raise UserError(
            "there is one training image, so no learning rate can be selected without the test images; use --task knn"
        )
    held_out = np.sort(numpy_generator(task.seed, "held out").permutation(images)[: _held_out(config, len(images))])
    lrs = list(dict.fromkeys(config.lrs))
    layers = _train(task, config, bank.of(np.setdiff1d(images, held_out)), lrs, "linear layers")
    tables = _score(
        task,
        reader,
        task.data.train,
        held_out.tolist(),
        dict(zip(lrs, layers, strict=True)),
        size,
        [],
        "held-out images",
    )
    scores = {
        lr: _overlap.segmentation(table, task.data.classes, task.seed)["miou"] if is_finite else None
        for (lr, table), is_finite in zip(tables.items(), (layer.finite for layer in layers), strict=True)
    }
    finite = {lr: miou for lr, miou in scores.items() if miou is not None}
    if not finite:
        raise UserError(f"every layer diverged at --lrs {' '.join(map(str, config.lrs))}: give lower ones")
    best = max(finite, key=lambda lr: finite[lr])
    layer = _train(task, config, bank, [best], "the best linear layer")[0]
    selection = (
        f"linear: highest mIoU on {len(held_out)} held-out training images; the selected layer was trained again on all "
        f"training images and tested once"
    )
    sweep = {
        "lrs": lrs,
        "held_out_miou": list(scores.values()),
        "selected": best,
        "optimizer": f"AdamW, weight decay {WEIGHT_DECAY:g}, cosine to 0",
        "steps": config.steps,
        "batch_size": min(CHUNK, len(bank.patches)),
        "batch_norm": "statistics over the patches trained on, no affine",
    }
    return best, layer, {"selection": selection, "sweep": sweep}


def _held_out(config: Config, images: int) -> int:
    return min(max(1, round(config.held_out * images)), images - 1)


@final
class _Layer:
    """Batch norm without affine in evaluation mode, and a linear layer to the classes."""

    def __init__(self, center: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.center, self.scale, self.weight, self.bias = center, scale, weight, bias
        self.finite = bool(weight.isfinite().all() and bias.isfinite().all())

    def __call__(self, patches: Tensor) -> Tensor:
        """Logits (..., C) of features (..., D)."""
        return ((patches - self.center) * self.scale) @ self.weight + self.bias


def _train(task: Task, config: Config, bank: _Bank, lrs: Sequence[float], what: str) -> list[_Layer]:
    """A layer for each learning rate: AdamW on the cross-entropy of patches with the classes of their pixels."""
    center, scale = bank.patches.mean(0), (bank.patches.var(0, correction=0) + BATCH_NORM_EPS).rsqrt()
    (dim, classes), batch = (bank.patches.shape[1], bank.shares.shape[1]), min(CHUNK, len(bank.patches))
    zeros = [(torch.zeros(dim, classes), torch.zeros(classes)) for _ in lrs]
    layers = [tuple(part.to(task.device).requires_grad_() for part in pair) for pair in zeros]
    groups = [{"params": list(pair), "lr": lr, "peak": lr} for pair, lr in zip(layers, lrs, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    generator = numpy_generator(task.seed, "patches")
    for step in range(config.steps):
        chosen = torch.from_numpy(generator.integers(0, len(bank.patches), batch)).to(task.device)
        x, shares = (bank.patches[chosen] - center) * scale, bank.shares[chosen]
        for weight, bias in layers:
            loss = -(shares * (x @ weight + bias).log_softmax(1)).sum() / shares.sum()
            loss.backward()  # one at a time: layers are independent, also if one diverges
        share = schedules.learning_rate(step, steps=config.steps, peak=1.0, final=0.0, warmup=0, kind="cosine")
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49 or step + 1 == config.steps:
            task.report(what, step + 1, config.steps)
    return [_Layer(center, scale, weight.detach(), bias.detach()) for weight, bias in layers]


@torch.no_grad()
def _score(
    task: Task,
    reader: Reader,
    images: Images,
    rows: Sequence[int],
    scorers: Mapping[Any, Scorer],
    size: tuple[int, int],
    bad: list[Bad],
    what: str = "masks of the test",
) -> dict[Any, np.ndarray]:
    """The pixel counts (n, 3, C) of the readable images, for each scorer."""
    source, classes = masked(images), len(task.data.classes)
    tables: dict[Any, list[np.ndarray]] = {name: [] for name in scorers}
    for index, pixels in batches(task, images, rows, size, bad, what):
        patches = patches_of(task, pixels)
        true = [reader.read(source, i) for i in index]
        for name, scorer in scorers.items():
            for mask, scores in zip(true, scorer(patches), strict=True):
                found = enlarged(scores, mask.shape).argmax(0)
                tables[name].append(_overlap.counts(found, mask, classes))
    if not all(tables.values()):
        raise none_read(images, bad)
    return {name: np.stack(table) for name, table in tables.items()}


def _has(results: dict[str, _overlap.Scores], key: str) -> bool:
    return any(key in scores for some in results.values() for _, scores in some)


def _findings(task: Task, facts: dict[str, Any]) -> list[str]:
    sides = {images.split: images for images in (task.data.train, task.data.test)}
    found = [
        f"images of {split} without a mask, left out: {images.unlabelled}"
        for split, images in sides.items()
        if images.unlabelled
    ]
    if left := facts.get("propagate", {}).get("left_out"):
        found.append(
            f"videos without an object in their first mask, or with fewer than 3 frames that can be read, left out: "
            f"{', '.join(left[:5])}{', ...' if len(left) > 5 else ''}"
        )
    return found
