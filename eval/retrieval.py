"""Image retrieval with frozen features: each image is a query for the others of its class (recall@k as in metric
learning, Song et al., CVPR 2016, "Stanford Online Products"; mean average precision). With or without labels: near
duplicates, and picture sheets of the nearest neighbours.

Shapes: N images, Q queries among them, F floats a feature.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.views import resize_and_crop
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import Pixels, Tap
from ssl_pretrain.features.neighbours import nearest
from ssl_pretrain.randomness import numpy_generator

from ._intervals import bootstrap, wilson
from ._results import Outcome
from ._task import UNKNOWN, Side, Task

IMAGES = "test"
BASELINES = ("random", "pixels")
SHARED = True
SCORES = 2**22  # similarities in memory at a time
LISTED = 1000  # largest number of duplicates that are written to the file
NEIGHBOURS = 10  # neighbours of each image that are searched for duplicates
COLUMNS, SIDE, GAP, FRAME = 8, 96, 6, 4  # neighbours in a row of a sheet; pixels
QUERY, RIGHT, WRONG, UNLABELLED = (60, 90, 200), (40, 160, 60), (200, 50, 40), (120, 120, 120)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Retrieval."""

    k: tuple[int, ...] = (1, 5, 10)
    """Values of k for recall@k: a query is a hit if one of its first k neighbours has its class."""
    features: tuple[str, ...] = ("pooled",)
    """Features to compare: pooled, cls, mean, or of earlier blocks cls@-4, mean@-4; the first one gives the headline
    number."""
    queries: int = 10_000
    """Largest number of query images, drawn by the seed; the search is among all images."""
    duplicate: float = 0.99
    """Smallest cosine at which two images are listed as near duplicates."""
    sheet: int = 12
    """Rows of each picture sheet: queries with their 8 nearest images, and the nearest pairs (0: no sheets)."""


def evaluate(task: Task, config: Config) -> Outcome:
    """Rank all other images by cosine for each query.

    Writes neighbours.png into `task.out`, and duplicates.png and duplicates.json if there are near duplicates. Raises
    UserError for options out of range, fewer than two images, a folder that cannot be written, and as `Task.single`.
    """
    if not config.k or min(config.k) < 1 or config.queries < 1 or config.sheet < 0:
        raise UserError(
            f"--k is {' '.join(map(str, config.k))}, --queries {config.queries} and --sheet {config.sheet}; they must be "
            f"at least 1, 1 and 0"
        )
    if not -1 <= config.duplicate <= 1:
        raise UserError(f"--duplicate is {config.duplicate}; a cosine lies between -1 and 1")
    names = tuple(dict.fromkeys(str(Tap.parse(name)) for name in config.features))
    if isinstance(task.encoder.backbone, Pixels):
        names = ("pooled",)
    side = task.single(names)
    n = len(side.labels)
    if n < 2:
        raise UserError(f"{task.data.name} has one image that can be read: nothing to retrieve")

    drawn = np.sort(numpy_generator(task.seed, "queries").permutation(n)[: config.queries])
    tried: list[dict[str, Any]] = []
    intervals: dict[str, Any] = {}
    scored = 0
    for number, name in enumerate(names):
        recall, precision = ranking(task, side.features[name], side.labels, drawn, config.k)
        scored = len(precision)
        entry: dict[str, Any] = {"feature": name}
        if scored:
            entry |= {f"recall@{k}": 100 * float(hits.mean()) for k, hits in recall.items()}
            entry["map"] = 100 * float(precision.mean())
            if not tried:
                intervals = {f"recall@{k}_interval": wilson(int(hits.sum()), scored) for k, hits in recall.items()}
                intervals["map_interval"] = bootstrap(100 * precision, task.seed)
        tried.append(entry)
        task.report("rankings", number + 1, len(names))

    rows = torch.from_numpy(np.array(side.features[names[0]])).to(task.device)
    similarity, index = (found.cpu().numpy() for found in nearest(rows, rows, NEIGHBOURS, exclude_self=True))
    pairs = duplicates(similarity, index, config.duplicate)
    if task.out is not None:
        _write(task, side, config, index, drawn, pairs)
    listed = {key: value for key, value in tried[0].items() if key != "feature"}
    return Outcome(
        {
            **listed,
            **intervals,
            "queries": scored,
            "duplicates": len(pairs),
            "findings": _findings(pairs, n, config),
            "n": n,
        },
        {
            "headline": f"feature {names[0]}, {scored:,} queries",
            "features": list(names),
            "similarity": "cosine, float32; of equal ones the lower index first",
            "relevant": "all other images of the query's class; queries without any are left out",
            "queries_drawn": len(drawn),
            "duplicate": config.duplicate,
            "all_scored_on": "the images themselves",
            **task.protocol(None, side),
        },
        tried,
    )


@torch.no_grad()
def ranking(
    task: Task, features: np.ndarray, labels: np.ndarray, queries: np.ndarray, ks: Sequence[int]
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Retrieval scores of each query that has a label and another image of its class.

    By k: whether one of the first k of all other images has its class, (Q,) bool. And the average precision of the
    whole ranking, (Q,) float64 in [0, 1]: the mean over the relevant images of the precision at their rank."""
    counts = np.bincount(labels[labels != UNKNOWN], minlength=1)
    queries = queries[labels[queries] != UNKNOWN]
    queries = queries[counts[labels[queries]] > 1]
    unit = normalize(torch.from_numpy(np.array(features)).to(task.device), dim=1)
    given = torch.from_numpy(labels).to(task.device)
    place = torch.arange(1, len(labels), dtype=torch.float64, device=task.device)
    step = max(1, SCORES // len(labels))
    hits: dict[int, list[Tensor]] = {k: [] for k in dict.fromkeys(ks)}
    precision = []
    for start in range(0, len(queries), step):
        rows = torch.from_numpy(queries[start : start + step]).to(task.device)
        scores = unit[rows] @ unit.T
        scores.scatter_(1, rows[:, None], -torch.inf)  # the query itself comes last
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :-1]
        relevant = given[order] == given[rows, None]
        for k, parts in hits.items():
            parts.append(relevant[:, :k].any(1))
        share = relevant.cumsum(1) / place
        precision.append((share * relevant).sum(1) / relevant.sum(1))
    if not len(queries):
        return {k: np.zeros(0, bool) for k in hits}, np.zeros(0)
    return {k: torch.cat(parts).cpu().numpy() for k, parts in hits.items()}, torch.cat(precision).cpu().numpy()


def duplicates(similarity: np.ndarray, index: np.ndarray, minimum: float) -> list[tuple[int, int, float]]:
    """Pairs (i, j, cosine) with i < j and a cosine of at least `minimum`, in descending order, from each image's
    neighbours (N, K) and their similarity (N, K)."""
    row, column = np.nonzero(similarity >= minimum)
    other = index[row, column]
    pairs = {
        (min(i, j), max(i, j)): cosine
        for i, j, cosine in zip(row.tolist(), other.tolist(), similarity[row, column].tolist(), strict=True)
    }
    return sorted(((i, j, cosine) for (i, j), cosine in pairs.items()), key=lambda pair: (-pair[2], pair[0], pair[1]))


def _findings(pairs: list[tuple[int, int, float]], n: int, config: Config) -> list[str]:
    if not pairs:
        return [f"no two images have a cosine of {config.duplicate:g} or more"]
    count = len({i for pair in pairs for i in pair[:2]})
    text = f"{count:,} of {n:,} images have a near duplicate (cosine of {config.duplicate:g} or more): duplicates.json"
    if count > n / 2:
        text += "; so many indicate a problem of the features, not of the images: see ssl-eval diagnose"
    return [text]


# ---- Files.


def _write(
    task: Task,
    side: Side,
    config: Config,
    index: np.ndarray,
    queries: np.ndarray,
    pairs: list[tuple[int, int, float]],
) -> None:
    assert task.out is not None
    source = task.data.test.source
    try:
        stale = [task.out / name for name in ("neighbours.png", "duplicates.png", "duplicates.json")]
        for path in stale:  # of an earlier evaluation
            path.unlink(missing_ok=True)
        if config.sheet:
            chosen = numpy_generator(task.seed, "sheet").permutation(queries)[: config.sheet]
            _sheet(task, side, [[q, *index[q][:COLUMNS]] for q in chosen]).save(task.out / "neighbours.png")
        if pairs:
            listed = [
                {"cosine": cosine, "images": [source.name(int(side.index[i])) for i in (a, b)]}
                for a, b, cosine in pairs[:LISTED]
            ]
            (task.out / "duplicates.json").write_text(
                json.dumps({"pairs": len(pairs), "nearest": listed}, indent=1) + "\n"
            )
            if config.sheet:
                _sheet(task, side, [[a, b] for a, b, _ in pairs[: config.sheet]]).save(task.out / "duplicates.png")
    except OSError as problem:
        raise UserError(
            f"{task.out} cannot be written ({problem.strerror}): choose another folder with --out"
        ) from None


def _sheet(task: Task, side: Side, rows: list[list[int]]) -> Image.Image:
    """A picture with a row for each list of images. The first one has a blue frame; the others have a green frame if
    they have its class, else a red one; grey if a label is unknown."""
    step = SIDE + 2 * FRAME + GAP
    sheet = Image.new("RGB", (max(map(len, rows)) * step + GAP, len(rows) * step + GAP), (255, 255, 255))
    for down, row in enumerate(rows):
        for right, i in enumerate(row):
            own, other = side.labels[row[0]], side.labels[i]
            colour = UNLABELLED if UNKNOWN in (own, other) else RIGHT if own == other else WRONG
            place = GAP + right * step, GAP + down * step
            framed = Image.new("RGB", (SIDE + 2 * FRAME, SIDE + 2 * FRAME), colour if right else QUERY)
            framed.paste(_thumbnail(task, int(side.index[i])), (FRAME, FRAME))
            sheet.paste(framed, place)
    return sheet


def _thumbnail(task: Task, i: int) -> Image.Image:
    pixels = decode(task.data.test.source[i], task.encoder.preprocessing.channels)
    pixels = resize_and_crop(pixels, SIDE, (SIDE, SIDE), "bicubic")
    # with three or more channels the first three are shown, with one or two the first in grey
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., 0])).convert(
        "RGB"
    )
