"""Variants of the ViT beside the plain one: the cost of a step at equal width, and kNN after a short run of MAE.

    python benchmarks/vit_variants.py --out runs/variants [--only cost learn] [--seeds 2] [--steps 500]

cost: encoders of width 384 with 6 heads and 12 blocks (6 with two branches), images of 224 pixels with patches of 16,
float32, one thread, a mean of the patches as loss. The encoders take turns; the table has the median of the CPU time over
the plain ViT's in the same round, and the number of parameters. learn: encoders of width 128 with 4 blocks (2), 8 x 8
patches, MAE with the settings of recipes/mae_cifar10.yaml on the first 10,000 training images of CIFAR-10; kNN top-1 in
percent of 2,000 test images by 4,000 training images. Existing results are not computed again. The table is printed at
the end, as Markdown.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from all_methods import DATA, RECIPES, subset
from ssl_pretrain.launch.pretrain import main as pretrain

from ssl_pretrain import backbones, encoder
from ssl_pretrain.data.source import open_source
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.loop.score import KnnScore

# Row -> family of the encoder (its sizes are NAME_small and NAME_micro), options.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain ViT": ("vit", {}),
    "hMLP stem": ("vit", {"stem": "hmlp"}),
    "2 parallel branches, half the depth": ("vit", {"parallel_branches": 2}),
    "octic, hybrid": ("octic", {}),
    "octic, invariant": ("octic", {"octic_mode": "invariant"}),
    "Jumbo": ("jumbo", {}),
    "group tokenizer": ("grouper", {}),
}
DEPTH = {"small": 12, "micro": 4}
ROUNDS, BATCH = 5, 4
BANK, QUERIES = 4000, 2000


def depth(size: str, options: dict[str, Any]) -> int:
    """Blocks of an encoder of that size: as many attentions in all as the plain ViT has."""
    return DEPTH[size] // options.get("parallel_branches", 1)


def cost() -> dict[str, tuple[float, float]]:
    """CPU time over the plain ViT's, and millions of parameters."""
    torch.manual_seed(0)
    models = {}
    for row, (family, options) in ROWS.items():
        same = {"patch_size": 16, "dim": 384, "depth": depth("small", options), "heads": 6, **options}
        models[row] = backbones.build(f"{family}_small", image_size=(224, 224), **same).train()
    images = torch.randn(BATCH, 3, 224, 224)
    times: dict[str, list[float]] = {row: [] for row in ROWS}
    for _ in range(ROUNDS):
        for row, model in models.items():
            began = time.process_time()
            model(images).patches.mean().backward()
            times[row].append(time.process_time() - began)
            model.zero_grad()
    plain = times["plain ViT"][1:]
    return {
        row: (
            statistics.median(a / b for a, b in zip(times[row][1:], plain, strict=True)),
            sum(p.numel() for p in models[row].parameters()) / 1e6,
        )
        for row in ROWS
    }


def learn(row: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """kNN of one run, and of its untrained encoder, unless it is there."""
    out = options.out / f"{row.replace(', ', '-').replace(' ', '-')}-{seed}"
    result = out.with_suffix(".json")
    if result.exists():
        return json.loads(result.read_text())
    family, given = ROWS[row]
    words = ["--config", RECIPES / "mae_cifar10.yaml", "--data", subset(DATA, 10_000, options.out / "images")]
    words += [
        "--encoder",
        f"{family}_micro",
        "--depth",
        depth("micro", given),
        "--patch-size",
        4,
        "--batch-size",
        64,
        "--workers",
        0,
        "--no-score",
    ]
    words += ["--precision", "fp32", "--steps", options.steps, "--seed", seed, "--out", out, "--picture-every", 0]
    words += [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", value)]
    began = time.process_time()
    if pretrain(list(map(str, words))):
        sys.exit(f"{row} ended with an error")
    seconds = time.process_time() - began
    train, test = open_source(str(options.out / "images"), "train"), open_source(str(DATA), "test")
    score = KnnScore(Subset(train, np.arange(BANK)), Subset(test, np.arange(QUERIES)), batch_size=250, workers=0)
    trained = encoder.load(out)
    found = {"knn": score(trained), "untrained": score(encoder.random_like(trained)), "seconds": seconds}
    result.write_text(json.dumps(found))
    print(row, seed, found, flush=True)
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the runs")
    parser.add_argument("--only", nargs="+", choices=["cost", "learn"], default=["cost", "learn"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=500, help="of 64 images (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells: dict[str, list[str]] = {row: [] for row in ROWS}
    head = []
    if "cost" in options.only:
        head += ["time of a step, over the plain ViT's", "parameters, millions"]
        for row, (ratio, millions) in cost().items():
            cells[row] += [f"{ratio:.2f}", f"{millions:.1f}"]
    if "learn" in options.only:
        head += ["kNN, by seed", "untrained", "CPU s a run"]
        for row in ROWS:
            runs = [learn(row, seed, options) for seed in range(options.seeds)]
            scores, first = " / ".join(f"{run['knn']:.1f}" for run in runs), runs[0]
            cells[row] += [scores, f"{first['untrained']:.1f}", f"{first['seconds']:.0f}"]
    print(f"| encoder | {' | '.join(head)} |\n| --- |{' --- |' * len(head)}")
    for row, found in cells.items():
        print(f"| {row} | {' | '.join(found)} |")


if __name__ == "__main__":
    main()
