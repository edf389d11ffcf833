"""A result: the numbers of a classification, the file they are kept in with their protocol, and how a person sees them.

Shapes: n images, C classes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ssl_pretrain.checkpoint import write_text

LISTED = 12  # rows of a sweep that a person is shown


@dataclass(frozen=True)
class Outcome:
    """What an evaluator found out about one encoder."""

    metrics: dict[str, Any]  # the headline, as `classification` gives it
    protocol: dict[str, Any]  # what the headline depends on
    all: list[dict[str, Any]]  # everything that was tried: settings and scores


def classification(ranked: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """Accuracies in percent: top-1, top-5 (of at most C), top-1 of each class that has images, and their number.

    ranked: (n, at least min(5, C)) int64, each image's likeliest classes, best first; labels: (n,) int64 in [0, C).
    """
    hits = ranked[:, :5] == labels[:, None]
    counts = np.bincount(labels, minlength=len(classes))
    right = np.bincount(labels, weights=hits[:, 0], minlength=len(classes))
    return {
        "top1": 100 * float(hits[:, 0].mean()),
        "top5": 100 * float(hits.any(1).mean()),
        "per_class": {name: 100 * float(r / c) for name, r, c in zip(classes, right, counts, strict=True) if c},
        "n": len(labels),
    }


def record(
    evaluator: str, outcome: Outcome, *, baselines: dict[str, Any], encoder: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The content of results.json. encoder: where it came from; seconds: what the evaluation took, baselines
    included."""
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
    """Write results.json into an existing folder, whole or not at all."""
    path = folder / "results.json"
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path


def show(result: dict[str, Any]) -> None:
    """Print a result: what else was tried, best first, then the headline with the baselines beside it."""
    console = Console()
    metrics, protocol, encoder = result["metrics"], result["protocol"], result["encoder"]

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    tried = sorted((e for e in result["all"] if e["top1"] is not None), key=lambda e: -e["top1"])
    if len(tried) > 1:
        say(f"the best of {len(result['all'])} settings, on {protocol['all_scored_on']}:")
        sweep = Table(*(_HEADINGS.get(key, key) for key in tried[0]))
        for entry in tried[:LISTED]:
            sweep.add_row(*(f"{value:.2f}" if key in _HEADINGS else str(value) for key, value in entry.items()))
        console.print(sweep)

    say(f"{result['evaluator']} on {protocol['data']}, {protocol['test']['split']} ({metrics['n']:,} images):")
    table = Table("encoder", _HEADINGS["top1"], _HEADINGS["top5"])
    size = " x ".join(map(str, encoder["image_size"]))
    rows = [(f"{encoder['path']} ({encoder['name']}, {size})", metrics)]
    rows += [(_BASELINES.get(name, name), scores) for name, scores in result["baselines"].items()]
    for name, scores in rows:
        table.add_row(name, *(f"{scores[key]:.2f}" if key in scores else "" for key in ("top1", "top5")))
    console.print(table)
    say(f"headline: {protocol['headline']}")
    if bad := len(protocol["train"]["bad"]) + len(protocol["test"]["bad"]):
        say(f"{bad} images could not be read and were left out; results.json lists them")


_BASELINES = {"random": "the same, untrained", "pixels": "raw pixels", "majority": "most frequent class"}
_HEADINGS = {"top1": "top-1 %", "top5": "top-5 %", "loss": "loss"}
