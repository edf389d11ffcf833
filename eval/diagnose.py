"""Diagnosis of an encoder's features without labels, block by block: number of directions they fill, decay of their
spectrum, distance of two views of an image; and sentences that name problems.

Shapes: n images, F floats a feature, V views of each of M images. Measures (on the features as they are, except where
unit vectors are named):

- `rankme`: exp of the entropy of the singular values of the (n, F) matrix (Garrido et al., ICML 2023, eq. 1-2).
- `effective_rank`: the same for the centred matrix (Roy & Vetterli, 2007).
- `utilised_rank`: number of directions that contain 99 % of the variance.
- `alpha`: the covariance's eigenvalues fall as rank^-alpha (alpha-ReQ, Agrawal et al., NeurIPS 2022); best near 1.
- `spread`: standard deviation of the unit vectors * sqrt(F): 1 if they fill the sphere (SimSiam, section 4.1).
- `uniformity`: log of the mean of exp(-2 |u - v|^2) over pairs of unit vectors (Wang & Isola, ICML 2020); lower values
  mean a more uniform distribution.
- `alignment`: mean |u - v|^2 of unit vectors of two views of an image (the same paper); lower values mean closer views.
- `lidar`: rank, as in `rankme`, of the images' means in units of the views' scatter (LiDAR, Thilak et al., ICLR 2024).
- `views_found`: percent of views whose nearest other vector is a view of the same image.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pretrain.data.loader import Share, batches, to_batch
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.data.views import Jitter, ViewSpec
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import NotFinite, Pixels, Tap, blocks, poolings, vectors
from ssl_pretrain.features.neighbours import nearest, vote
from ssl_pretrain.features.products import tf32
from ssl_pretrain.loop.monitor import feature_statistics
from ssl_pretrain.randomness import key, numpy_generator

from ._results import Outcome
from ._task import UNKNOWN, Side, Task

IMAGES = "test"
BASELINES = ("random",)
SHARED = True
PAIRS = 4096  # number of images whose pairs uniformity averages over
DELTA = 1e-4  # weight of the identity that LiDAR adds to the scatter of views
VARIANCE = 0.99
K, TEMPERATURE = 20, 0.07  # of the leave-one-out kNN of each block, if there are labels


@dataclass(frozen=True, kw_only=True)
class Config:
    """Diagnosis."""

    features: tuple[str, ...] | None = None
    """Features to diagnose: pooled, cls, mean, or of earlier blocks cls@-4, mean@-4; the first one gives the headline
    numbers (default: pooled, then every block's cls, or mean if there is no CLS token)."""
    images: int = 10_000
    """Largest number of images to use; they are drawn by the seed."""
    view_images: int = 500
    """Largest number of images from which views are made (0: no views, so no alignment and no LiDAR)."""
    views: int = 10
    """Views of each image: random crops of 0.2 to 1 of the area, flips, colour jitter (LiDAR's paper: 50)."""


def evaluate(task: Task, config: Config) -> Outcome:
    """Measure the features, and describe problems in sentences.

    Raises UserError for options out of range and for fewer than two images, and as `Task.single`.
    """
    if config.images < 2 or config.view_images < 0 or config.views < 2:
        raise UserError(
            f"--images is {config.images}, --view-images {config.view_images} and --views {config.views}; they must be at "
            f"least 2, 0 and 2"
        )
    names = _features(task, config)
    side = task.single(names)
    n = len(side.index)
    if n < 2:
        raise UserError(f"{task.data.name} has one image that can be read: features have no spread in a single one")
    rows = np.sort(numpy_generator(task.seed, "diagnose").permutation(n)[: config.images])
    looked = {name: torch.from_numpy(side.features[name][rows]).to(task.device) for name in names}
    of_views = _views(task, config, side, names) if config.view_images >= 2 else {}

    entries: list[dict[str, Any]] = []
    for number, (name, features) in enumerate(looked.items()):
        entry = {"feature": name, **measures(features)}
        if of_views:
            entry |= of_pairs(of_views[name])
        entry |= _knn(features, side.labels[rows])
        entries.append(entry)
        task.report("measures", number + 1, len(names))
    headline = dict(entries[0])
    name = headline.pop("feature")
    count, width = looked[name].shape
    return Outcome(
        {**headline, "findings": findings(entries, looked[name]), "n": count, "width": width},
        {
            "headline": f"feature {name}, {width} wide, {count:,} images",
            "features": list(names),
            "images": count,
            "views": {"images": min(config.view_images, n), "each": config.views} if of_views else None,
            "knn": f"leave-one-out, k {K}, temperature {TEMPERATURE}" if "knn" in entries[0] else None,
            "all_scored_on": "the images themselves",
            **task.protocol(None, side),
        },
        entries,
    )


def _features(task: Task, config: Config) -> tuple[str, ...]:
    if isinstance(task.encoder.backbone, Pixels):
        return ("pooled",)
    if config.features:
        return tuple(dict.fromkeys(str(Tap.parse(name)) for name in config.features))
    kind = "cls" if "cls" in poolings(task.encoder, task.device) else "mean"
    return ("pooled", *(str(Tap(kind, -block)) for block in range(blocks(task.encoder), 0, -1)))


# ---- The measures.


def _rank(values: Tensor) -> float:
    """exp of the entropy of values >= 0, as shares of their sum; 0 if all are 0."""
    total = values.sum()
    if not total > 0:
        return 0.0
    share = values / total
    return float(torch.special.entr(share).sum().exp())


def measures(features: Tensor) -> dict[str, Any]:
    """The measures that need no views, of features (n >= 2, F)."""
    x = features.double()
    n = len(x)
    # the eigenvalues of the smaller of x'x and xx' are the squared singular values
    singular = _eigenvalues(x).sqrt()
    variances = _eigenvalues(x - x.mean(0)) / n
    total = variances.sum()
    utilised = int((variances.cumsum(0) < VARIANCE * total).sum()) + 1 if total > 0 else 0
    unit = normalize(x, dim=1)[:PAIRS]
    return {
        "rankme": _rank(singular),
        "effective_rank": _rank(variances.sqrt()),
        "utilised_rank": utilised,
        "alpha": _alpha(variances),
        "spread": feature_statistics(features)["feature_std"] if n > 1 else 0.0,
        "uniformity": _uniformity(unit),
    }


def _eigenvalues(x: Tensor) -> Tensor:
    """The eigenvalues of x'x in descending order; values that are only rounding errors are set to 0."""
    values = torch.linalg.eigvalsh(x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T).flip(0)
    return torch.where(values > values[0] * 1e-13, values, 0.0).clamp_min_(0)


def _alpha(variances: Tensor) -> float | None:
    """Minus the slope of log variance over log rank, by least squares over the ranks with non-zero variance; None if
    there are fewer than three."""
    positive = variances[variances > 0]
    if len(positive) < 3:
        return None
    x = torch.arange(1, len(positive) + 1, dtype=torch.float64, device=positive.device).log()
    y = positive.log()
    x = x - x.mean()
    return -float((x * (y - y.mean())).sum() / x.square().sum())


def _uniformity(unit: Tensor) -> float:
    n = len(unit)
    total = torch.zeros((), dtype=torch.float64, device=unit.device)
    for part in unit.split(1024):
        total += torch.exp(4 * (part @ unit.T) - 4).sum()  # |u - v|^2 = 2 - 2 u.v
    return float(((total - n) / (n * (n - 1))).log())


def of_pairs(views: Tensor) -> dict[str, Any]:
    """The measures of views (M, V, F) of M >= 2 images."""
    m, v, width = views.shape
    unit = normalize(views.double(), dim=2)
    # the mean cosine over the pairs of an image, from the squared length of the sum of its views
    cosine = (unit.sum(1).square().sum(1) - v) / (v * (v - 1))
    flat = views.reshape(m * v, width).float()
    found = nearest(flat, flat, 1, exclude_self=True)[1][:, 0] // v
    own = torch.arange(m, device=views.device).repeat_interleave(v)
    return {
        "alignment": float((2 - 2 * cosine).mean()),
        "lidar": _lidar(views.double()),
        "views_found": 100 * float((found == own).double().mean()),
    }


def _lidar(views: Tensor) -> float:
    """LiDAR, section 3: with S_b the covariance of the images' means and S_w the mean over images of the covariance of
    its views, plus delta I, the rank of S_w^-1/2 S_b S_w^-1/2."""
    m, v, width = views.shape
    means = views.mean(1)
    around = (views - means[:, None]).reshape(m * v, width)
    centred = means - means.mean(0)
    within = around.T @ around / (m * (v - 1)) + DELTA * torch.eye(width, dtype=views.dtype, device=views.device)
    # the singular values of the whitened means are the square roots of the eigenvalues
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(within), centred.T, upper=False)
    return _rank(torch.linalg.svdvals(white).square())


def _knn(features: Tensor, labels: np.ndarray) -> dict[str, Any]:
    """Leave-one-out kNN top-1 in percent of the labelled images; {} if fewer than two classes are known."""
    known = np.flatnonzero(labels != UNKNOWN)
    if len(np.unique(labels[known])) < 2:
        return {}
    rows, given = features[torch.from_numpy(known).to(features.device)], torch.from_numpy(labels[known])
    similarity, index = nearest(rows, rows, K, exclude_self=True)
    scores = vote(similarity.cpu(), index.cpu(), given, int(given.max()) + 1, TEMPERATURE)
    return {"knn": 100 * float((scores.argmax(1) == given).double().mean())}


@torch.inference_mode()
def _views(task: Task, config: Config, side: Side, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Features (M, V, F) of V random views of M images, for each tap."""
    how = task.encoder.preprocessing
    jitter = Jitter() if how.channels == 3 else None
    spec = ViewSpec(name="view", size=how.crop, scale=(0.2, 1.0), interpolation=how.interpolation, jitter=jitter)
    m = min(config.view_images, len(side.index))
    chosen = np.sort(numpy_generator(task.seed, "views").permutation(side.index)[:m])
    batch = next(size for size in range(min(task.batch_size, m), 0, -1) if m % size == 0)
    taps = [Tap.parse(name) for name in names]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    order = []
    loader = batches(
        Subset(task.data.test.source, chosen), (spec,), Share(batch), seed=key(task.seed, "views"),
        channels=how.channels, start_step=0, stop_step=config.views * (m // batch), workers=task.workers,
        policy="replace",
    )  # fmt: skip
    with contextlib.closing(loader):
        for step, raw in enumerate(loader):
            given = to_batch(raw, (spec,), how.mean, how.std, task.device)
            with tf32(task.device), torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
                for name, vector in vectors(task.encoder, given.views["view"], taps).items():
                    found[name].append(vector)
            order.append(given.index)
            task.report("views", step + 1, config.views * (m // batch))
    # each epoch contains every image once, in another order
    place = torch.cat(order).argsort(stable=True)
    result = {}
    for name, parts in found.items():
        result[name] = torch.cat(parts)[place].view(m, config.views, -1)
        if not result[name].isfinite().all():
            raise NotFinite(f"the encoder gives NaN or infinity for views of the images (feature {name})")
    return result


# ---- Findings.


def findings(entries: list[dict[str, Any]], features: Tensor) -> list[str]:
    """Problems of the headline's features (n, F) and of the blocks, one sentence each, or one sentence that there are
    none. The thresholds are rules of thumb: they show what to check and prove nothing."""
    head = entries[0]
    n, width = features.shape
    most = min(n - 1, width)
    sentences = []
    if head["spread"] < 0.01:
        sentences.append(
            f"collapsed: all images get nearly the same vector (spread {head['spread']:.4f} of 1); nothing can be learned "
            f"from these features"
        )
    elif head["effective_rank"] < 0.1 * most:
        sentences.append(
            f"dimensional collapse: the features fill about {head['effective_rank']:.0f} of {most} directions (99 % of "
            f"the variance in {head['utilised_rank']})"
        )
    norms = features.double().norm(dim=1)
    dead = int((features.std(0) <= 1e-6 * features.abs().max().clamp_min(1e-30)).sum())
    if head["spread"] >= 0.01:
        if dead:
            sentences.append(f"{dead} of {width} floats are the same for every image")
        cosine = float(normalize(features.double(), dim=1).mean(0).square().sum())
        if cosine > 0.9:
            sentences.append(
                f"a common direction outweighs the rest: two images have a mean cosine of {cosine:.2f}; subtract the "
                f"mean before comparing by cosine"
            )
        largest = float((features.double().square().mean(0) / features.double().square().mean(0).sum()).max())
        if largest > 0.5 and width > 2:
            sentences.append(
                f"one float of {width} holds {100 * largest:.0f} % of the squared length (a massive activation)"
            )
        if float(norms.max()) > 10 * float(norms.median()):
            sentences.append(
                f"outliers: the longest feature is {float(norms.max() / norms.median()):.0f} times the median in length"
            )
    if head["alpha"] is not None and head["alpha"] > 3 and head["spread"] >= 0.01:
        sentences.append(
            f"the spectrum falls steeply (alpha {head['alpha']:.1f}): few directions carry nearly everything"
        )
    if "views_found" in head:
        if head["views_found"] < 20 and head["spread"] >= 0.01:
            sentences.append(
                f"views of an image are not near each other: the nearest vector is one of the same image for "
                f"{head['views_found']:.0f} % (alignment {head['alignment']:.2f})"
            )
        elif head["alignment"] < 0.01 and head["spread"] < 0.1:
            sentences.append("views of an image are alike, but so are different images")
    better = [entry for entry in entries[1:] if "knn" in entry and entry["knn"] > head["knn"] + 2]
    if better:
        best = max(better, key=lambda entry: entry["knn"])
        sentences.append(
            f"an earlier feature is better: {best['feature']} has kNN top-1 {best['knn']:.1f} %, {head['feature']} "
            f"{head['knn']:.1f} %"
        )
    elif "knn" not in head:
        wider = max(entries, key=lambda entry: entry["effective_rank"])
        if wider["effective_rank"] > 1.5 * head["effective_rank"]:
            sentences.append(
                f"an earlier feature fills more directions: {wider['feature']} {wider['effective_rank']:.0f}, "
                f"{head['feature']} {head['effective_rank']:.0f}; compare them by knn or linear"
            )
    if n <= width:
        sentences.append(
            f"only {n} images for {width} floats: ranks cannot exceed {n}, so compare them at equal numbers only"
        )
    return sentences or ["nothing looks wrong"]
