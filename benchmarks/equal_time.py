"""Accuracy over time of data2vec 2.0 and MAE: both on the same images, one core each, in parallel.

    python benchmarks/equal_time.py --out runs/equal-time [--every 250] [--steps 3000 1250]

Each uses its CIFAR-10 recipe with the encoder, patch and batch of `benchmarks/all_methods.py`, on the first 10,000
images, with a kNN score every --every steps. The numbers of steps are chosen so that both take about the same time.
Each line of the table is a score, its time (seconds of training since the first logged step), and its step.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from all_methods import COMMON, DATA, RECIPES, run, subset

METHODS = ("mae", "data2vec2")


def main() -> None:
    """Train both, print what was reached when."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--every", type=int, default=250, help="steps between scores (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[3000, 1250], help="of MAE and data2vec (default: %(default)s)"
    )
    options = parser.parse_args()
    data = subset(DATA, 10_000, options.out / "images")

    def train(name: str, steps: int) -> None:
        flags = ["--config", RECIPES / f"{name}_cifar10.yaml", "--data", data, "--out", options.out / name]
        run("ssl_pretrain.launch.pretrain", *flags, *COMMON, "--steps", steps, "--knn-every", options.every)

    with ThreadPoolExecutor(len(METHODS)) as pool:
        for done in [pool.submit(train, *pair) for pair in zip(METHODS, options.steps, strict=True)]:
            done.result()
    print("| method | seconds | step | kNN |\n| --- | --- | --- | --- |")
    for name in METHODS:
        lines = [json.loads(line) for line in (options.out / name / "metrics.jsonl").read_text().splitlines()]
        began = now = next(line["time"] for line in lines if "time" in line)
        for line in lines:
            now = line.get("time", now)
            if "knn/top1" in line:
                print(f"| {name} | {now - began:.0f} | {line['step']} | {line['knn/top1']:.1f} |")


if __name__ == "__main__":
    main()
