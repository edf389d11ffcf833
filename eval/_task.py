"""The input of an evaluator: an encoder, labelled images for training and test, or a single set of images, and
functions that extract their features.

Shapes: N images of a split, n of them readable, F floats a feature, C classes.
"""

import dataclasses
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_pretrain.data.loader import RawBatch, Share, batches
from ssl_pretrain.data.source import Source, evaluation_splits, open_source, splits
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.data.views import ViewSpec
from ssl_pretrain.encoder import Encoder
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Bad, Precision, extract
from ssl_pretrain.randomness import key

UNKNOWN = -1  # the label of an image that has none


class Helped(Exception):
    """Raised in a helping process once the features are extracted: it has nothing more to do."""


@dataclass(frozen=True)
class Images:
    """The labelled images of one split; or all images of a single set, with the label UNKNOWN for unlabelled ones."""

    split: str
    source: Source
    labels: np.ndarray  # (N,) int64 in [0, C): the task's numbering of the classes, not the source's
    unlabelled: int  # number of unlabelled images of the split; they are left out, or UNKNOWN in a single set


@dataclass(frozen=True)
class Data:
    """Images for training and test of an evaluator, and the classes of both. For a single set of images the two are
    the same."""

    name: str  # as the user wrote it
    train: Images
    test: Images
    classes: tuple[str, ...]  # () if there are no labels

    @classmethod
    def open(cls, name: str, train_split: str | None = None, test_split: str | None = None) -> "Data":
        """The data of that name; splits that are not given are detected by their names. Raises UserError if the data or
        a split does not exist, without labels, with fewer than two classes, or if a test class has no training
        image."""
        if train_split is None or test_split is None:
            found = evaluation_splits(name)
            train_split, test_split = train_split or found[0], test_split or found[1]
        if train_split == test_split:
            raise UserError(
                f"--train-split and --test-split are both {train_split!r}: a test on training images is not meaningful"
            )
        (train, of_train), (test, of_test) = _labelled(name, train_split), _labelled(name, test_split)
        classes, known, test_labels = _agree(train, test)
        present = np.unique(known)
        if len(present) < 2:
            raise UserError(
                f"all training images of {name} are of one class, {classes[present[0]]}: at least two are needed"
            )
        strange = np.setdiff1d(test_labels, present)
        if len(strange):
            names = ", ".join(classes[label] for label in strange[:5]) + (", ..." if len(strange) > 5 else "")
            raise UserError(
                f"{name}: {np.isin(test_labels, strange).sum()} images of split {test_split!r} are of {len(strange)} "
                f"class(es) that no image of split {train_split!r} has: {names}"
            )
        return cls(
            name,
            Images(train_split, train, known, len(of_train) - len(train)),
            Images(test_split, test, test_labels, len(of_test) - len(test)),
            classes,
        )

    @classmethod
    def single(cls, name: str, split: str | None, *, everything: bool = False) -> "Data":
        """A single set of images, labelled or not: `split`; if it is None, all images (with `everything`, or if the
        data has no splits), else the test split. Raises UserError if the data or the split does not exist, or if it is
        not clear which split is the test split."""
        if split is None and not everything:
            known = splits(name)
            split = evaluation_splits(name)[1] if len(known) > 1 else next(iter(known), None)
        source = open_source(name, split)
        labels = np.full(len(source), UNKNOWN) if source.labels is None else np.asarray(source.labels)
        classes = source.classes or tuple(map(str, range(int(labels.max()) + 1)))
        images = Images(split or "all images", source, labels, int((labels == UNKNOWN).sum()))
        return cls(name, images, images, classes)

    @classmethod
    def pair(cls, name: str, train_split: str | None = None, test_split: str | None = None) -> "Data":
        """Images for training and test that need no labels. If the data has no splits, both are all images, as from
        `single`. Raises UserError if the data or a split does not exist."""
        if train_split is None and test_split is None and len(splits(name)) < 2:
            return cls.single(name, None, everything=True)
        sides = []
        found = None if train_split and test_split else evaluation_splits(name)
        for split in (train_split or (found or ("",))[0], test_split or (found or ("", ""))[1]):
            source = open_source(name, split)
            sides.append(Images(split, source, np.full(len(source), UNKNOWN), len(source)))
        if sides[0].split == sides[1].split:
            raise UserError(
                f"--train-split and --test-split are both {train_split!r}: a test on training images is not meaningful"
            )
        return cls(name, sides[0], sides[1], ())

    def majority(self, protocol: dict[str, Any]) -> dict[str, Any]:
        """The score of predicting the most frequent training class for every test image. Images that `Task.protocol`
        lists as unreadable do not count."""
        train, test = (
            np.delete(images.labels, [bad["index"] for bad in protocol[side]["bad"]])
            for side, images in (("train", self.train), ("test", self.test))
        )
        label = int(np.bincount(train).argmax())
        return {"top1": 100 * float((test == label).mean()), "class": self.classes[label]}


@dataclass(frozen=True)
class Side:
    """Features of the readable images of one split."""

    features: dict[str, np.ndarray]  # by tap: (n, F) float32, perhaps memory-mapped
    labels: np.ndarray  # (n,) int64 in [0, C), or UNKNOWN
    index: np.ndarray  # (n,) int64: which image of the split's source a row is of
    bad: list[Bad]  # the images that could not be read


@dataclass(frozen=True, kw_only=True)
class Task:
    """An encoder to evaluate on data."""

    encoder: Encoder
    data: Data
    device: torch.device
    seed: int = 0
    batch_size: int = 256  # images a pass through the encoder
    workers: int = 0  # processes that decode images
    precision: Precision = "fp32"
    cache: bool = True  # keep features on the disk
    code: str | None = None  # name of the code that the command allows an export to import
    progress: Callable[[str, int, int], None] | None = None  # name of the stage, units done, units in total
    out: Path | None = None  # folder for files beside results.json; None: write no files (baselines)
    helps: bool = False  # this process only helps another one to extract features

    def features(self, taps: Sequence[str]) -> tuple[Side, Side]:
        """The encoder's features of the training and of the test images. Raises as `ssl_pretrain.features.extract`."""
        train, test = (self._extract(images, taps) for images in (self.data.train, self.data.test))
        if self.helps:
            raise Helped
        return train, test

    def single(self, taps: Sequence[str]) -> Side:
        """The encoder's features of a single set of images. Raises as `ssl_pretrain.features.extract`."""
        side = self._extract(self.data.test, taps)
        if self.helps:
            raise Helped
        return side

    def protocol(self, train: Side | None, test: Side) -> dict[str, Any]:
        """What the results of every evaluator depend on: the images (train None: a single set of images), their
        preprocessing, and the encoder."""
        return {
            "data": self.data.name,
            **({"train": _facts(self.data.train, train)} if train else {}),
            "test": _facts(self.data.test, test),
            "classes": len(self.data.classes),
            "preprocessing": dataclasses.asdict(self.encoder.preprocessing),
            "encoder_fingerprint": self.encoder.fingerprint,
            "precision": self.precision,
            "seed": self.seed,
        }

    def crops(
        self, source: Source, specs: Sequence[ViewSpec], share: Share, steps: int
    ) -> Generator[RawBatch, None, None]:
        """`steps` steps of random views of `source`, for training on random crops instead of one fixed crop per
        image."""
        return batches(
            source,
            specs,
            share,
            seed=key(self.seed, "crops"),
            channels=self.encoder.preprocessing.channels,
            start_step=0,
            stop_step=steps,
            workers=self.workers,
            policy="replace",
            pin=self.device.type == "cuda",
        )

    def report(self, what: str, done: int, total: int) -> None:
        """Report the progress, if `progress` is set."""
        if self.progress:
            self.progress(what, done, total)

    def _extract(self, images: Images, taps: Sequence[str]) -> Side:
        found = extract(
            self.encoder,
            images.source,
            taps,
            batch_size=self.batch_size,
            workers=self.workers,
            device=self.device,
            precision=self.precision,
            cache=self.cache,
            progress=lambda done, total: self.report(f"features of {images.split}", done, total),
        )
        return Side(found.features, images.labels[found.index], found.index, found.bad)


def _facts(images: Images, side: Side) -> dict[str, Any]:
    return {
        "split": images.split,
        "fingerprint": images.source.fingerprint,
        "images": len(side.labels),
        "unlabelled": images.unlabelled,
        "bad": [dataclasses.asdict(item) for item in side.bad],
    }


def _labelled(name: str, split: str) -> tuple[Source, Source]:
    """The labelled images of a split, and the whole split."""
    whole = open_source(name, split)
    if whole.labels is None and (only := _only_folder(whole, name, split)) is not None:
        raise UserError(f"all images of split {split!r} of {name} are of one class, {only}: nothing to tell apart")
    if whole.labels is None or not (whole.labels != UNKNOWN).any():
        if (classes := _classes_of_another(name, split)) is not None:
            raise UserError(
                f"{name}: the images of split {split!r} lie in no class folders, those of split {classes[0]!r} do: sort "
                f"them into folders of the same names (Tiny-ImageNet: val/val_annotations.txt has the class of each "
                f"image, ImageNet: LOC_val_solution.csv), or name another split with --train-split and --test-split"
            )
        raise UserError(
            f"{name}: the images of split {split!r} have no labels, and this evaluator needs them: sort them into a "
            f"folder for each class, or give shards with labels"
        )
    known = np.flatnonzero(whole.labels != UNKNOWN)
    return (whole if len(known) == len(whole) else Subset(whole, known)), whole


def _classes_of_another(name: str, split: str) -> tuple[str, tuple[str, ...]] | None:
    """A split of the data whose class folders give the labels, and the classes; None where there is none."""
    for other in splits(name):
        if other != split:
            source = open_source(name, other)
            if source.classes and source.labels_from and source.labels_from.startswith("the names of the folders"):
                return other, source.classes
    return None


def _only_folder(source: Source, name: str, split: str) -> str | None:
    """The folder below the split that holds all its images; None where it is another one or none."""
    folders = {os.path.dirname(source.name(i)) for i in range(0, len(source), max(1, len(source) // 1000))}
    top = {os.path.basename(os.path.abspath(name)), split.lower()}
    only = os.path.basename(next(iter(folders)))
    return only if len(folders) == 1 and only and only.lower() not in top else None


def _agree(train: Source, test: Source) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Class names in a common numbering, and the labels of both sides in it. Classes are matched by name if both sides
    have names, else by number. A class that only the test side has comes last."""
    known, test_labels = np.asarray(train.labels), np.asarray(test.labels)
    if train.classes is None or test.classes is None:
        return tuple(map(str, range(max(known.max(), test_labels.max()) + 1))), known, test_labels
    names = list(train.classes) + [name for name in test.classes if name not in train.classes]
    return tuple(names), known, np.array([names.index(name) for name in test.classes])[test_labels]
