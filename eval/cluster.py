"""Clusters frozen features without labels and compares the clusters with the labels (k-means as in DeepCluster, ECCV
2018, and agglomerative clustering; matched accuracy as in SCAN, ECCV 2020). Without labels only the silhouette is
given.

Shapes: n images, F floats a feature, K clusters, C classes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import normalize

from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Pixels, Tap
from ssl_pretrain.features.kmeans import kmeans
from ssl_pretrain.randomness import numpy_generator

from ._agreement import agreement, silhouette
from ._results import Outcome
from ._task import UNKNOWN, Task
from ._ward import ward

IMAGES = "test"
BASELINES = ("random", "pixels")
SHARED = True
MOST = 5000  # largest number of images for Ward's clustering and the silhouette: both need all distances
UNLABELLED_K = (2, 5, 10, 20, 50, 100)
Algorithm = Literal["kmeans", "ward"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Clustering."""

    clusters: tuple[int, ...] | None = None
    """Numbers of clusters; the first one gives the headline number. Default: the number of classes; without labels
    2 5 10 20 50 100, and the best silhouette gives the headline."""
    algorithms: tuple[Algorithm, ...] = ("kmeans", "ward")
    """kmeans, or ward (agglomerative, on at most 5000 images drawn by the seed); the first one gives the headline
    number."""
    features: tuple[str, ...] = ("pooled",)
    """Features to cluster: pooled, cls, mean, or of earlier blocks cls@-4, mean@-4; the first one gives the headline
    number."""
    normalise: Literal["l2", "none"] = "l2"
    """Normalisation of the features: l2 (each image's feature scaled to length 1) or none."""
    starts: int = 10
    """Number of runs of k-means; the one with the lowest inertia counts (labels are not used)."""


def evaluate(task: Task, config: Config) -> Outcome:
    """Cluster the images; labels are only compared with, never used.

    Raises UserError for options out of range, fewer images than clusters, and as `Task.single`.
    """
    names = tuple(dict.fromkeys(str(Tap.parse(name)) for name in config.features))
    if isinstance(task.encoder.backbone, Pixels):
        names = ("pooled",)
    if not config.algorithms or not names or config.starts < 1:
        raise UserError(f"--starts is {config.starts}; it, --algorithms and --features need at least 1")
    side = task.single(names)
    known = side.labels != UNKNOWN
    classes = len(np.unique(side.labels[known]))
    n = len(side.labels)
    numbers = config.clusters or ((classes,) if classes >= 2 else tuple(k for k in UNLABELLED_K if k < n))
    if not numbers or min(numbers) < 2 or max(numbers) > n:
        raise UserError(
            f"--clusters {' '.join(map(str, numbers or (2,)))}: at least 2 and at most the images, which are {n}"
        )
    part = np.sort(numpy_generator(task.seed, "cluster").permutation(n)[:MOST])
    if "ward" in config.algorithms and max(numbers) > len(part):
        raise UserError(f"--clusters {max(numbers)}: ward takes at most {MOST} images, so at most as many clusters")

    tried: list[dict[str, Any]] = []
    done, total = 0, len(names) * len(config.algorithms) * len(numbers)
    for name in names:
        rows = torch.from_numpy(np.array(side.features[name])).to(task.device)
        if config.normalise == "l2":
            rows = normalize(rows, dim=1)
        subset = rows[torch.from_numpy(part).to(rows.device)]
        for algorithm in dict.fromkeys(config.algorithms):
            for k in dict.fromkeys(numbers):
                of = part if algorithm == "ward" else np.arange(n)
                if algorithm == "ward":
                    found = ward(subset.cpu().numpy(), k)
                else:
                    found = kmeans(rows, k, seed=task.seed, starts=config.starts).assigned.cpu().numpy()
                entry: dict[str, Any] = {"algorithm": algorithm, "clusters": k, "feature": name}
                entry["silhouette"] = silhouette(subset, found if algorithm == "ward" else found[part])
                labelled = known[of]
                if classes >= 2:
                    entry |= agreement(found[labelled], side.labels[of][labelled])
                tried.append(entry)
                done += 1
                task.report("clusterings", done, total)

    first = [entry for entry in tried if entry["algorithm"] == config.algorithms[0] and entry["feature"] == names[0]]
    by_silhouette = classes < 2 and config.clusters is None
    best = max(first, key=lambda entry: entry["silhouette"] or -1.0) if by_silhouette else first[0]
    scores = {key: value for key, value in best.items() if key not in ("algorithm", "clusters", "feature")}
    return Outcome(
        {**scores, "clusters": best["clusters"], "n": n},
        {
            "headline": f"{best['algorithm']}, {best['clusters']} clusters of feature {best['feature']}",
            "selection": "the number of clusters by the silhouette" if by_silhouette else "fixed in advance",
            "normalise": config.normalise,
            "starts": config.starts,
            "silhouette_images": len(part),
            "ward_images": len(part),
            "labelled": int(known.sum()),
            "all_scored_on": "the images themselves",
            **task.protocol(None, side),
        },
        tried,
    )
