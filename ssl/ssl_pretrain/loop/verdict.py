"""What a run achieved, in words: is its encoder clearly better than an untrained one and raw pixels, and what to try."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ..config import Run
from ..data.source import Source
from ..data.subset import Subset
from ..data.training import open_training
from ..encoder import Encoder, random_like
from ..errors import UserError
from ..features import extract, pixel_encoder
from ..randomness import numpy_generator
from .monitor import CollapseMonitor, feature_statistics
from .networks import open_teacher, teachers_of
from .score import NEIGHBOURS, KnnScore, share

CHANCE = 0.01  # a difference that chance makes less often than this is clear
IMAGES = 1000  # whose features are looked at where there are no labels
UNTRAINED, PIXELS = "the untrained encoder", "raw pixels"


@final
class Comparison:
    """Two encoders on the same test images, by the images that only one of them has right (McNemar's exact test)."""

    def __init__(self, ours: np.ndarray, other: np.ndarray) -> None:
        """ours, other: (n,) bool, is image i right?"""
        self.won, self.lost = int((ours & ~other).sum()), int((~ours & other).sum())
        self.difference = 100 * (self.won - self.lost) / len(ours)
        # 95 %, by the normal approximation for a difference of paired shares
        variance = self.won + self.lost - (self.won - self.lost) ** 2 / len(ours)
        self.margin = 100 * 1.96 * math.sqrt(max(variance, 1.0)) / len(ours)

    @property
    def chance(self) -> float:
        """The probability of a difference at least as large if both were equally good: of so many images that only one
        has right, each is as likely to be the other's."""
        decided, fewer = self.won + self.lost, min(self.won, self.lost)
        return min(1.0, 2 * sum(math.comb(decided, k) for k in range(fewer + 1)) / 2**decided)

    @property
    def clear(self) -> int:
        """1: ours is clearly better, -1: clearly worse, 0: neither."""
        return 0 if self.chance > CHANCE else 1 if self.won > self.lost else -1


def of_labelled(run: Run, out: Path, trained: Encoder, score: KnnScore) -> list[str]:
    """The score of an encoder beside an untrained one and raw pixels, the share of its teachers' scores, the verdict, and
    what to try."""
    channels = trained.preprocessing.channels
    others = {
        UNTRAINED: random_like(trained, seed=run.seed),
        PIXELS: pixel_encoder(trained.backbone.image_size, channels),
    }
    ours = score.right(trained)
    right = {name: score.right(other) for name, other in others.items()}
    lines = [
        f"kNN top-1 ({NEIGHBOURS} neighbours, {len(score.queries):,} images against {len(score.bank):,}): "
        f"{100 * ours.mean():.1f} %, untrained encoder {100 * right[UNTRAINED].mean():.1f} %, raw pixels "
        f"{100 * right[PIXELS].mean():.1f} %"
    ]
    lines += of_teacher(run, out, 100 * float(ours.mean()), score)
    found = {name: Comparison(ours, other) for name, other in right.items()}
    lines.append(f"verdict: {sentence(found)}")
    if any(each.clear <= 0 for each in found.values()):
        lines += ["to try:", *(f"  {line}" for line in remedies(run, out, found))]
    return lines


def of_teacher(run: Run, out: Path, top1: float, score: KnnScore) -> list[str]:
    """The share of each teacher's score that an encoder with this score (percent) reaches; no line without a teacher."""
    lines = []
    for name, spec in teachers_of(run, out).items():
        what = "the teacher" if name == "teacher" else f"{name}, {spec},"
        try:
            reference = score(open_teacher(run, out, name))
        except UserError as problem:  # the run itself is done
            lines.append(f"{what} could not be scored: {problem}")
            continue
        lines.append(
            f"kNN top-1 of {what} on the same images: {reference:.1f} %; the encoder reaches "
            f"{100 * share(top1, reference):.0f} % of it"
        )
    return lines


def sentence(found: Mapping[str, Comparison]) -> str:
    """One sentence on all comparisons, by the name of the other encoder."""
    words = {1: "clearly better than", 0: "not clearly better than", -1: "clearly worse than"}
    parts = []
    for kind, text in words.items():
        of_kind = [
            f"{name} ({each.difference:+.1f} ± {each.margin:.1f})" for name, each in found.items() if each.clear == kind
        ]
        if of_kind:
            parts.append(f"{text} {(' and ' if kind else ' or ').join(of_kind)}")
    return f"{', '.join(parts)}, in percent of the test images, with 95 % intervals"


def remedies(run: Run, out: Path, found: Mapping[str, Comparison]) -> list[str]:
    """What to do about an encoder that is not clearly better than the others; one line each."""
    lines = []
    if all(each.clear >= 0 and each.difference > 0 for each in found.values()):
        lines.append("more labelled images for the score: the encoder is ahead, but by no more than chance may make")
    if run.steps or run.images:
        length = f"--steps {2 * run.steps}" if run.steps else f"--images {2 * (run.images or 1)}"
    else:
        length = f"--epochs {2 * (run.epochs or 100):g}"
    return [
        *lines,
        f"train longer: the same command with {length} --extend",
        f"look at the loss: ssl-report {out}; if it stood still or rose, take a lower --lr in another --out",
        "another --method: simclr and dino make features for kNN, mae and its like for ssl-eval finetune",
    ]


def of_unlabelled(run: Run, trained: Encoder) -> list[str]:
    """What can be said of an encoder without labels: whether its features collapsed."""
    source = open_training(run.data, run.train_split)
    few = Subset(source, numpy_generator(run.seed, "score").permutation(len(source))[:IMAGES])
    pooled = [_pooled(each, few, run) for each in (trained, random_like(trained, seed=run.seed))]
    ours, before = [feature_statistics(each) for each in pooled]
    images, dim = pooled[0].shape
    faults = CollapseMonitor({}).features(ours, images)
    if images < CollapseMonitor.FEWEST:
        verdict = f"none: {images} images are too few"
    else:
        verdict = faults[0] if faults else "no collapse; how good the features are, only labelled images can tell"
    return [
        f"features of {images:,} images without labels: effective rank {ours['feature_rank']:.1f} of {dim}, untrained "
        f"encoder {before['feature_rank']:.1f}",
        f"verdict: {verdict}",
    ]


def _pooled(encoder: Encoder, images: Source, run: Run) -> Tensor:
    how: dict[str, Any] = {"batch_size": 256, "workers": run.workers or 0, "cache": False}
    return torch.as_tensor(np.asarray(extract(encoder, images, ("pooled",), **how).features["pooled"]))
