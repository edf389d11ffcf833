"""Evaluators' tasks on images whose pixels are the features, so that an oracle can compute the features itself."""

import numpy as np
import torch
from ssl_pretrain.eval._task import Data, Images, Task
from synthetic_data import ArraySource

from ssl_pretrain.features import extract, pixel_encoder


def split_task(train: ArraySource, test: ArraySource, classes: int = 7, **options: object) -> Task:
    """With a train and a test split of images 8 x 8. options: those of `Task`."""
    names = tuple(f"class {c}" for c in range(classes))
    data = Data("arrays", Images("train", train, train.labels, 0), Images("test", test, test.labels, 0), names)
    encoder = pixel_encoder((8, 8), 3)
    return Task(encoder=encoder, data=data, device=torch.device("cpu"), cache=False, **options)  # type: ignore[arg-type]


def whole_task(images: ArraySource, classes: int = 7) -> Task:
    """With one set of images 8 x 8 as both splits; an image without a label has -1."""
    labels = np.full(len(images), -1) if images.labels is None else images.labels
    both = Images("test", images, labels, int((labels < 0).sum()))
    data = Data("arrays", both, both, tuple(f"class {c}" for c in range(classes)))
    return Task(encoder=pixel_encoder((8, 8), 3), data=data, device=torch.device("cpu"), cache=False)


def pooled_features(task: Task) -> list[np.ndarray]:
    """Of the train images and of the test images, each (n, D)."""
    sides = (task.data.train.source, task.data.test.source)
    return [extract(task.encoder, side, ["pooled"], cache=False).features["pooled"] for side in sides]


def unit_features(task: Task) -> np.ndarray:
    """Of the test images, (n, D), each of length one."""
    rows = pooled_features(task)[1]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
