"""Clusters of frozen features, found without labels and compared with them (k-means as in DeepCluster, ECCV 2018, and
agglomerative; SCAN, ECCV 2020, for the matched accuracy). Without labels the silhouette alone tells.

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
MOST = 5000  # images that Ward's joins and the silhouette take: both need all distances
UNLABELLED_K = (2, 5, 10, 20, 50, 100)
Algorithm = Literal["kmeans", "ward"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Clustering."""

    clusters: tuple[int, ...] | None = None
    """Numbers of clusters to make; the first is the headline's (default: as many as there are classes; without labels
    2 5 10 20 50 100, and the headline is the one of the best silhouette)."""
    algorithms: tuple[Algorithm, ...] = ("kmeans", "ward")
    """kmeans, or ward (agglomerative, of at most 5000 images drawn by the seed); the first is the headline's."""
    features: tuple[str, ...] = ("pooled",)
    """Features to cluster: pooled, cls, mean, or of earlier blocks cls@-4, mean@-4; the first is the headline's."""
    normalise: Literal["l2", "none"] = "l2"
    """Each image's feature scaled to length 1, or as it is."""
    starts: int = 10
    """Runs of k-means; the one of the lowest inertia counts, whatever its labels say."""


def evaluate(task: Task, config: Config) -> Outcome:
    """Cluster the images; labels are only compared with, never used.

    Raises UserError for knobs out of range, fewer images than clusters, and as `Task.single`.
    """
    names = tuple(dict.fromkeys(str(Tap.parse(name)) for name in config.features))
    if isinstance(task.encoder.backbone, Pixels):
        names = ("pooled",)
    if not config.algorithms or not names or config.starts < 1:
        raise UserError(f"--starts is {config.starts}; it, --algorithms and --features need at least one")
    side = task.single(names)
    known = side.labels != UNKNOWN
    classes = len(np.unique(side.labels[known]))
    n = len(side.labels)
    numbers = config.clusters or ((classes,) if classes >= 2 else tuple(k for k in UNLABELLED_K if k < n))
    if not numbers or min(numbers) < 2 or max(numbers) > n:
        raise UserError(f"--clusters {' '.join(map(str, numbers or (2,)))}: between 2 and the images, which are {n}")
    part = np.sort(numpy_generator(task.seed, "cluster").permutation(n)[:MOST])
    if "ward" in config.algorithms and max(numbers) > len(part):
        raise UserError(f"--clusters {max(numbers)}: ward takes {MOST} images, so at most as many clusters")

    tried: list[dict[str, Any]] = []
    done, total = 0, len(names) * len(config.algorithms) * len(numbers)
    for name in names:
        rows = torch.from_numpy(np.array(side.features[name])).to(task.device)
        if config.normalise == "l2":
            rows = normalize(rows, dim=1)
        few = rows[torch.from_numpy(part).to(rows.device)]
        for algorithm in dict.fromkeys(config.algorithms):
            for k in dict.fromkeys(numbers):
                of = part if algorithm == "ward" else np.arange(n)
                if algorithm == "ward":
                    found = ward(few.cpu().numpy(), k)
                else:
                    found = kmeans(rows, k, seed=task.seed, starts=config.starts).assigned.cpu().numpy()
                entry: dict[str, Any] = {"algorithm": algorithm, "clusters": k, "feature": name}
                entry["silhouette"] = silhouette(few, found if algorithm == "ward" else found[part])
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
