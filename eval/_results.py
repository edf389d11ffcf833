"""Results: the numbers of a classification, the results file with the protocol, and the printed summary.

Shapes: n images, C classes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ssl_pretrain.files import write_text

from ._intervals import by_class, wilson

LISTED = 12  # rows of a sweep, or classes, that are printed
NO_CLASS = -1  # in a ranking: no further class, like one that none of an image's neighbours belongs to
UNBALANCED = 1.5  # ratio of the largest to the smallest class above which the single classes are printed


@dataclass(frozen=True)
class Outcome:
    """The result of one evaluator for one encoder."""

    metrics: dict[str, Any]  # the headline, as `classification` gives it
    protocol: dict[str, Any]  # what the headline depends on
    all: list[dict[str, Any]]  # everything that was tried: settings and scores


def classification(ranked: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Scores of a classification, in percent: top-1 and top-5 (of at most C) with their 95 % intervals; accuracy
    (`per_class`), precision and F1 of each class that has images; the unweighted means `balanced` (of the accuracies)
    and `macro_f1`; and the numbers of images.

    ranked: (n, at least min(5, C)) int64, each image's likeliest classes, best first, and NO_CLASS where the classifier has
    no more of them, which is never a hit; labels: (n,) int64 in [0, C).
    """
    hits = ranked[:, :5] == labels[:, None]
    table = by_class(ranked[:, 0], labels, classes)
    return {
        "top1": 100 * float(hits[:, 0].mean()),
        "top1_interval": wilson(int(hits[:, 0].sum()), len(labels)),
        "top5": 100 * float(hits.any(1).mean()),
        "top5_interval": wilson(int(hits.any(1).sum()), len(labels)),
        "balanced": float(np.mean([row["recall"] for row in table.values()])),
        "macro_f1": float(np.mean([row["f1"] for row in table.values()])),
        "per_class": {name: row["recall"] for name, row in table.items()},
        "per_class_precision": {name: row["precision"] for name, row in table.items()},
        "per_class_f1": {name: row["f1"] for name, row in table.items()},
        "per_class_n": {name: row["n"] for name, row in table.items()},
        "n": len(labels),
    }


def record(
    evaluator: str, outcome: Outcome, *, baselines: dict[str, Any], encoder: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The content of results.json. encoder: its origin; seconds: duration of the evaluation, including baselines."""
    return {
        "evaluator": evaluator,
        "metrics": outcome.metrics,
        "protocol": outcome.protocol,
        "baselines": baselines,
        "encoder": encoder,
        "seconds": round(seconds, 1),
        "all": outcome.all,
    }


def write(folder: Path, result: dict[str, Any]) -> Path:
    """Write results.json atomically into an existing folder."""
    path = folder / "results.json"
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def show(result: dict[str, Any]) -> None:
    """Print a result: all settings that were tried, best first; the headline number with the baselines; and the
    evaluator's findings."""
    console = Console()
    metrics, protocol, encoder = result["metrics"], result["protocol"], result["encoder"]

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    tried = result["all"]
    if tried and "top1" in tried[0]:
        tried = sorted((entry for entry in tried if entry["top1"] is not None), key=lambda entry: -entry["top1"])
    if len(tried) > 1:
        say(f"{'the best of ' if len(tried) > LISTED else ''}{len(tried)} settings, on {protocol['all_scored_on']}:")
        columns = [key for key in tried[0] if not key.endswith("_interval")]
        sweep = Table(*(_HEADINGS.get(key, key) for key in columns))
        for entry in tried[:LISTED]:
            sweep.add_row(*(_cell(entry[key]) if key in _HEADINGS else _setting(entry[key]) for key in columns))
        console.print(sweep)

    say(f"{result['evaluator']} on {protocol['data']}, {protocol['test']['split']} ({metrics['n']:,} images):")
    columns = [key for key in _HEADINGS if key in metrics]
    if columns:
        table = Table("encoder", *(_HEADINGS[key] for key in columns))
        size = " x ".join(map(str, encoder["image_size"]))
        rows = [(f"{encoder['path']} ({encoder['name']}, {size})", metrics)]
        rows += [(_BASELINES.get(name, name), scores) for name, scores in result["baselines"].items()]
        for name, scores in rows:
            table.add_row(name, *(_cell(scores.get(key)) for key in columns))
        console.print(table)
    if "per_class_n" in metrics:
        if "top1_interval" in metrics:
            say("95 % interval of top-1: {:.2f} to {:.2f}".format(*metrics["top1_interval"]))
        counts = metrics["per_class_n"]
        if max(counts.values()) > UNBALANCED * min(counts.values()):
            worst = sorted(counts, key=metrics["per_class_f1"].__getitem__)[:LISTED]
            say(f"classes are unbalanced; {'the worst of ' if len(counts) > LISTED else ''}{len(counts)} by F1:")
            classes = Table("class", "images", "accuracy %", "precision %", "F1 %")
            for name in worst:
                shares = (metrics[key][name] for key in ("per_class", "per_class_precision", "per_class_f1"))
                classes.add_row(name, str(counts[name]), *map(_cell, shares))
            console.print(classes)
    say(f"headline: {protocol['headline']}")
    for finding in metrics.get("findings", ()):
        say(f"- {finding}")
    sides = (protocol[side]["bad"] for side in ("train", "test") if side in protocol)
    if bad := sum(map(len, sides)):
        say(f"{bad} images could not be read and were left out; results.json lists them")


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


_BASELINES = {"random": "the same, untrained", "pixels": "raw pixels", "majority": "most frequent class"}
_HEADINGS = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "macro_f1": "macro-F1 %",
    "loss": "loss",
    "recall@1": "recall@1 %",
    "recall@5": "recall@5 %",
    "recall@10": "recall@10 %",
    "map": "mAP %",
    "chance_map": "mAP % by chance",
    "r2": "R2",
    "miou": "mIoU %",
    "pixel_accuracy": "pixel accuracy %",
    "jf": "J&F %",
    "j": "J %",
    "f": "F %",
    "accuracy": "matched accuracy %",
    "nmi": "NMI",
    "ami": "AMI",
    "ari": "ARI",
    "silhouette": "silhouette",
    "spread": "spread",
    "rankme": "RankMe",
    "effective_rank": "effective rank",
    "utilised_rank": "99 % of variance in",
    "alpha": "alpha-ReQ",
    "uniformity": "uniformity",
    "alignment": "alignment",
    "lidar": "LiDAR",
    "views_found": "views found %",
    "knn": "kNN %",
    "corrupted_top1": "corrupted top-1 %",
    "relative_drop": "of it lost %",
    "ece": "ECE %",
}
