"""k-nearest-neighbour classification of frozen features (Wu et al., "Unsupervised Feature Learning via Non-Parametric
Instance Discrimination", CVPR 2018, section 3.4; the form of DINO, ICCV 2021): nothing is trained.

Shapes: n training and m test images, C classes, K neighbours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Pixels, Tap, poolings
from ssl_pretrain.neighbours import nearest, vote

from ._results import Outcome, classification
from ._task import Side, Task

BASELINES = ("random", "pixels")
CHUNK = 4096  # images whose votes (CHUNK, C) are counted at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    """k nearest neighbours."""

    k: tuple[int, ...] = (20, 5, 10, 100)
    """Neighbours that vote; the first is the headline's, all are reported."""
    temperature: float = 0.07
    """T of a neighbour's weight, exp(cosine / T)."""
    features: tuple[str, ...] | None = None
    """Features to compare: pooled, cls, mean, or of earlier blocks cls@-4, mean@-4; the first is the headline's
    (default: those the encoder has)."""
    select: Literal["fixed", "train"] = "fixed"
    """The headline's k and feature: the first of each, or the best by leave-one-out on the training images."""


def evaluate(task: Task, config: Config) -> Outcome:
    """Classify each test image by its nearest training images.

    Nothing is chosen by looking at test labels: the headline is the first k and the first feature, or with `select` the
    pair that is best where each training image is classified by the others. Raises UserError for knobs out of range,
    and as `Task.features`.
    """
    if not config.k or min(config.k) < 1:
        raise UserError(f"--k is {' '.join(map(str, config.k))}; it must be at least 1")
    if not config.temperature > 0:
        raise UserError(f"--temperature is {config.temperature}; it must be above 0")
    names = tuple(dict.fromkeys(str(Tap.parse(name)) for name in config.features or ()))
    if isinstance(task.encoder.backbone, Pixels):
        names = ("pooled",)  # also where the pixels are the baseline of an encoder that has more to choose from
    elif not names:
        names = poolings(task.encoder, task.device)
    train, test = task.features(names)
    most = len(train.labels) - (config.select == "train")  # with leave-one-out, one fewer to choose from
    ks = tuple(dict.fromkeys(min(k, most) for k in config.k))

    ranked: dict[tuple[str, int], np.ndarray] = {}
    searched: list[str] = []
    for number, name in enumerate(names):
        twin = next((other for other in searched if np.array_equal(test.features[other], test.features[name])), None)
        if twin is not None:  # pooled is often just the CLS token or the mean
            ranked |= {(name, k): ranked[twin, k] for k in ks}
            continue
        ranked |= {(name, k): found for k, found in _classify(task, config, train, test, name=name, ks=ks)}
        searched.append(name)
        task.report("neighbours", number + 1, len(names))
    scores = {setting: classification(found, test.labels, task.data.classes) for setting, found in ranked.items()}

    best = names[0], ks[0]
    protocol: dict[str, Any] = {}
    if config.select == "train":
        held = {
            (name, k): 100 * float((found[:, 0] == train.labels).mean())
            for name in searched
            for k, found in _classify(task, config, train, None, name=name, ks=ks)
        }
        best = max(held, key=held.__getitem__)
        protocol["leave_one_out"] = [{"feature": name, "k": k, "top1": top1} for (name, k), top1 in held.items()]
    return Outcome(
        scores[best],
        {
            "headline": f"feature {best[0]}, k {best[1]}",
            "features": list(names),
            "k": list(ks),
            "temperature": config.temperature,
            "similarity": "cosine, float32",
            "selection": "fixed in advance: the first feature and k"
            if config.select == "fixed"
            else "the best feature and k by leave-one-out on the training images; test labels were not looked at",
            "all_scored_on": "test",
            **protocol,
            **task.protocol(train, test),
        },
        [
            {"feature": name, "k": k, "top1": found["top1"], "top5": found["top5"]}
            for (name, k), found in scores.items()
        ],
    )


def _classify(
    task: Task, config: Config, train: Side, test: Side | None, *, name: str, ks: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray]]:
    """For each k the classes (m, min(5, C)) int64 of the test images, likeliest first; test None: of the training
    images, each by the others. One search serves every k."""
    queries = (test or train).features[name]
    similarity, index = nearest(queries, train.features[name], max(ks), exclude_self=test is None, device=task.device)
    labels = torch.from_numpy(train.labels)
    for k in ks:
        parts = [
            _rank(vote(s.cpu(), i.cpu(), labels, len(task.data.classes), config.temperature, k))
            for s, i in zip(similarity.split(CHUNK), index.split(CHUNK), strict=True)
        ]
        yield k, torch.cat(parts).numpy()


def _rank(scores: Tensor) -> Tensor:
    """The five highest of (m, C), best first; of equal ones the lower class first."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :5]
