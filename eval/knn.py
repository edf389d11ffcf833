"""k-nearest-neighbour classification of frozen features (Wu et al., "Unsupervised Feature Learning via Non-Parametric
Instance Discrimination", CVPR 2018, section 3.4; the form of DINO, ICCV 2021): nothing is trained.

Shapes: n training and m test images, C classes, K neighbours.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Pixels, Tap, blocks, poolings
from ssl_pretrain.features.neighbours import Vote, nearest, vote

from ._results import NO_CLASS, Outcome, classification
from ._task import Side, Task

BASELINES = ("random", "pixels")
SHARED = True
# Wu et al. (2018), section 4; the released evaluations of DINO and iBOT, and of DINOv2, whose softmax over 200 neighbours
# ranks the classes alike. DINO's number is that of k = 20.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "npid": {"k": (200,), "features": ("pooled",)},
    "dino": {"k": (20, 10, 100, 200), "features": ("cls",)},
    "dinov2": {"k": (20, 10, 100, 200), "features": ("cls",)},
}
CHUNK = 4096  # images whose votes (CHUNK, C) are counted at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    """k nearest neighbours."""

    k: tuple[int, ...] = (20, 5, 10, 100)
    """Neighbours that vote; the first is the headline's, all are reported."""
    temperature: float = 0.07
    """T of a neighbour's weight, exp(cosine / T), in a softmax vote."""
    votes: tuple[Vote, ...] = ("softmax",)
    """How neighbours vote: softmax (weighing exp(cosine / T)), cosine (weighing their cosine) or uniform (one each); the
    first is the headline's."""
    features: tuple[str, ...] | None = None
    """Features to compare: pooled, cls, mean, or of earlier blocks cls@-4, mean@-4; the first is the headline's
    (default: those the encoder has)."""
    last_blocks: int = 1
    """Also look at cls and mean of so many of the last blocks."""
    select: Literal["fixed", "train"] = "fixed"
    """The headline's k, vote and feature: the first of each, or the best by leave-one-out on the training images."""


def evaluate(task: Task, config: Config) -> Outcome:
    """Classify each test image by its nearest training images.

    Nothing is chosen by looking at test labels: the headline is the first feature, k and vote, or with `select` those
    that are best where each training image is classified by the others. Raises UserError for knobs out of range,
    and as `Task.features`.
    """
    if not config.k or min(config.k) < 1:
        raise UserError(f"--k is {' '.join(map(str, config.k))}; it must be at least 1")
    if not config.votes:
        raise UserError("--votes: at least one of softmax, cosine, uniform")
    if not config.temperature > 0:
        raise UserError(f"--temperature is {config.temperature}; it must be above 0")
    names = tuple(dict.fromkeys(str(Tap.parse(name)) for name in config.features or ()))
    if isinstance(task.encoder.backbone, Pixels):
        names = ("pooled",)  # also where the pixels are the baseline of an encoder that has more to choose from
    else:
        names = names or poolings(task.encoder, task.device)
        names = tuple(dict.fromkeys((*names, *_of_blocks(task, config.last_blocks))))
    train, test = task.features(names)
    most = len(train.labels) - (config.select == "train")  # with leave-one-out, one fewer to choose from
    ks = tuple(dict.fromkeys(min(k, most) for k in config.k))

    ways = list(itertools.product(ks, dict.fromkeys(config.votes)))
    ranked: dict[tuple[str, int, Vote], np.ndarray] = {}
    searched: list[str] = []
    for number, name in enumerate(names):
        twin = next((other for other in searched if np.array_equal(test.features[other], test.features[name])), None)
        if twin is not None:  # pooled is often just the CLS token or the mean
            ranked |= {(name, *way): ranked[twin, *way] for way in ways}
            continue
        ranked |= {(name, *way): found for way, found in _classify(task, config, train, test, name=name, ways=ways)}
        searched.append(name)
        task.report("neighbours", number + 1, len(names))
    scores = {setting: classification(found, test.labels, task.data.classes) for setting, found in ranked.items()}

    best = names[0], *ways[0]
    protocol: dict[str, Any] = {}
    if config.select == "train":
        accuracies = {
            (name, *way): 100 * float((found[:, 0] == train.labels).mean())
            for name in searched
            for way, found in _classify(task, config, train, None, name=name, ways=ways)
        }
        best = max(accuracies, key=accuracies.__getitem__)
        protocol["leave_one_out"] = [
            {"feature": name, "k": k, "vote": kind, "top1": top1} for (name, k, kind), top1 in accuracies.items()
        ]
    return Outcome(
        scores[best],
        {
            "headline": f"feature {best[0]}, k {best[1]}" + ("" if best[2] == "softmax" else f", {best[2]} vote"),
            "features": list(names),
            "k": list(ks),
            "votes": list(dict.fromkeys(config.votes)),
            "temperature": config.temperature,
            "similarity": "cosine, float32",
            "selection": "fixed in advance: the first feature, k and vote"
            if config.select == "fixed"
            else "the best feature, k and vote by leave-one-out on the training images; test labels were not looked at",
            "all_scored_on": "test",
            **protocol,
            **task.protocol(train, test),
        },
        [
            {"feature": name, "k": k, "vote": kind, "top1": found["top1"], "top5": found["top5"]}
            for (name, k, kind), found in scores.items()
        ],
    )


def _classify(
    task: Task, config: Config, train: Side, test: Side | None, *, name: str, ways: list[tuple[int, Vote]]
) -> Iterator[tuple[tuple[int, Vote], np.ndarray]]:
    """For each k and vote the classes (m, min(5, C)) int64 of the test images, likeliest first, NO_CLASS where fewer have
    a vote; test None: of the training images, each by the others. One search serves all."""
    most = max(k for k, _ in ways)
    queries = (test or train).features[name]
    similarity, index = nearest(queries, train.features[name], most, exclude_self=test is None, device=task.device)
    labels = torch.from_numpy(train.labels)
    for k, kind in ways:
        parts = [
            _rank(vote(s.cpu(), i.cpu(), labels, len(task.data.classes), config.temperature, k, kind))
            for s, i in zip(similarity.split(CHUNK), index.split(CHUNK), strict=True)
        ]
        yield (k, kind), torch.cat(parts).numpy()


def _of_blocks(task: Task, count: int) -> list[str]:
    """The features, cls where there is one and mean, of each of the last `count` blocks but the last. Raises UserError
    where the encoder does not give so many."""
    most = blocks(task.encoder)
    if not 1 <= count <= most:
        raise UserError(f"--last-blocks is {count}; this encoder gives features of its last {most} block(s)")
    kinds = [kind for kind in poolings(task.encoder, task.device) if kind != "pooled"]
    return [str(Tap(kind, -block)) for block in range(2, count + 1) for kind in kinds]


def _rank(scores: Tensor) -> Tensor:
    """The five classes with the highest votes (m, C), best first; of equal ones the lower class first. -1 stands where
    fewer than five have a vote: which of the others would follow is only a matter of their numbers."""
    votes, classes = scores.sort(dim=1, descending=True, stable=True)
    return classes.masked_fill(votes <= 0, NO_CLASS)[:, :5]
