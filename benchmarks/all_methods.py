"""kNN and linear accuracy of all methods at the same budget on CIFAR-10, with untrained, raw-pixel and supervised
controls.

    python benchmarks/all_methods.py --out runs/methods [--seeds 2] [--steps 1500] [--jobs 2] [--methods mae simclr]

Each run is `ssl-pretrain --config recipes/M_cifar10.yaml` with the same encoder, batch, steps (images seen) and seed
for all, on the first 10,000 training images without labels. These are few enough that each image is seen several times,
which a memory bank of all images needs. Each score is `ssl-eval` on the whole data set: 50,000 labelled training images
and 10,000 test images. Jobs run in parallel on one thread each. Existing results are not computed again. The table is
printed at the end, as Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyarrow import parquet

from ssl_pretrain import plugins

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "cifar10"
RECIPES = ROOT / "recipes"
BATCH = 64
COMMON = ["--encoder", "vit_micro", "--image-size", 32, "--patch-size", 8, "--batch-size", BATCH, "--workers", 0]
COMMON += ["--precision", "fp32"]  # the same arithmetic on every machine
COMMON += ["--checkpoint-every", 100000, "--monitor-every", 0, "--picture-every", 0, "--val-images", 0, "--no-score"]
PROBE = ["--lrs", 0.005, 0.02, 0.1, 0.5, "--layers", 1, "--steps", 1000]


def subset(data: Path, images: int, folder: Path) -> Path:
    """A folder with the first images of a data set's training part."""
    target = folder / "train-00000-of-00001.parquet"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "part"
        parquet.write_table(parquet.read_table(next(data.glob("train-*.parquet"))).slice(0, images), part)
        part.rename(target)
    return folder


def run(*argv: object) -> None:
    """A command on one thread; ends this program with its words where it fails."""
    command = [sys.executable, "-m", *map(str, argv)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def train(name: str, seed: int, options: argparse.Namespace) -> None:
    """One run and its scores, unless they are there."""
    out = Path(options.out) / f"{name}-{seed}"
    if (out / "scores.json").exists():
        return
    began = time.monotonic()
    data = Path(options.out) / "images"
    argv = ["--config", RECIPES / f"{name}_cifar10.yaml", "--data", data, "--out", out]
    argv += ["--steps", options.steps, "--seed", seed]
    run("ssl_pretrain.launch.pretrain", *argv, *COMMON)
    seconds = time.monotonic() - began
    scores = {"seconds": seconds, **score(out, out, options)}
    (out / "scores.json").write_text(json.dumps(scores))
    print(f"{out.name}: {scores}", flush=True)


def score(encoder: object, folder: Path, options: argparse.Namespace, *like: object) -> dict[str, float]:
    """kNN and linear top-1 in percent of an encoder."""
    found = {}
    for evaluator, extra in (("knn", []), ("linear", PROBE)):
        out = folder / evaluator
        argv = ["--encoder", encoder, *like, "--data", options.data, "--out", out, "--no-baselines", *extra]
        run("ssl_pretrain.launch.evaluate", evaluator, *argv)
        found[evaluator] = json.loads((out / "results.json").read_text())["metrics"]["top1"]
    return found


def controls(some: str, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Scores of the untrained encoder and of raw pixels."""
    path = Path(options.out) / "controls.json"
    if not path.exists():
        like = Path(options.out) / f"{some}-0"
        rows = {
            "untrained": score("random", Path(options.out) / "untrained", options, "--like", like),
            "raw pixels": score("pixels", Path(options.out) / "pixels", options),
        }
        path.write_text(json.dumps(rows))
    return json.loads(path.read_text())


def main() -> None:
    """Train, score, print."""
    every = [name for name in plugins.own("ssl_pretrain.methods") if name != "spark"]  # which trains no ViT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the runs")
    parser.add_argument("--data", default=str(DATA), help="CIFAR-10 as parquet (default: %(default)s)")
    parser.add_argument("--images", type=int, default=10000, help="to train on (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", default=every, choices=every, metavar="M")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500, help=f"of {BATCH} images (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side (default: %(default)s)")
    options = parser.parse_args()
    subset(Path(options.data), options.images, Path(options.out) / "images")
    wanted = [(name, seed) for seed in range(options.seeds) for name in options.methods]
    with ThreadPoolExecutor(options.jobs) as pool:
        for done in [pool.submit(train, name, seed, options) for name, seed in wanted]:
            done.result()
    print(
        f"\n{options.steps} steps of {BATCH} images, {options.seeds} seeds\n\n| method | kNN | linear | seconds a run |"
    )
    print("| --- | --- | --- | --- |")
    for name, row in controls(options.methods[0], options).items():
        print(f"| {name} | {row['knn']:.1f} | {row['linear']:.1f} | |")
    for name in options.methods:
        files = [Path(options.out) / f"{name}-{seed}" / "scores.json" for seed in range(options.seeds)]
        rows = [json.loads(file.read_text()) for file in files]
        cells = [" / ".join(f"{row[key]:.1f}" for row in rows) for key in ("knn", "linear")]
        print(f"| {name} | {' | '.join(cells)} | {statistics.mean(row['seconds'] for row in rows):.0f} |")


if __name__ == "__main__":
    main()
