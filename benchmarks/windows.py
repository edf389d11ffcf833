"""A Swin and a ViT pretrained by SimMIM on small images, and the same exports read at twice the size: kNN on Imagenette.

    python benchmarks/windows.py --out runs/windows [--data ../shared/data/imagenette160] [--steps 600] [--batch-size 64]

Both are pretrained at 64 pixels on the training images, without labels: `swin_micro` (windows of 4 positions) and
`vit_micro` (patches of 8, relative positions in each block). Each export is then read for images of 64 and of 128 pixels
(`ssl-export resize`): the Swin with windows of 4 and of 8, the ViT with its positions resized. kNN top-1 in percent of
`--queries` validation images among `--bank` training images, trained and untrained. Run again, it resumes: a finished run
is not trained again, and finished scores are read from `scores.json`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from ssl_pretrain.launch.pretrain import main as pretrain

from ssl_pretrain import encoder
from ssl_pretrain.data.source import evaluation_splits, open_source
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.encoder import Encoder
from ssl_pretrain.files import write_text
from ssl_pretrain.loop.score import KnnScore
from ssl_pretrain.randomness import numpy_generator

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenette160"
SIZE = 64
RUN = "--precision fp32 --workers 0 --log-every 50 --monitor-every 0 --picture-every 0 --no-score --aug fast --lr 1e-3"
ENCODERS = {
    "swin": "--encoder swin_micro",
    "vit": "--encoder vit_micro --patch-size 8 --positions relative --pool mean",
}
# How an export is read: side of the images, side of the windows.
READ: dict[str, tuple[tuple[int, int | None], ...]] = {
    "swin": ((64, 4), (64, 8), (128, 4), (128, 8)),
    "vit": ((64, None), (128, None)),
}


def trained(kind: str, options: argparse.Namespace) -> Path:
    """The folder of a finished run."""
    out = options.out / kind
    words = ["--method", "simmim", *ENCODERS[kind].split(), "--data", options.data, "--out", out, "--image-size", SIZE]
    words += ["--steps", options.steps, "--batch-size", options.batch_size, *RUN.split(), *options.more]
    if pretrain(list(map(str, words))):
        sys.exit(f"the run of {kind} ended with an error")
    return out


def some(source: Any, count: int, seed: int) -> Subset:
    """`count` images of a source, drawn by the seed."""
    chosen = numpy_generator(seed, "windows").permutation(len(source))[:count]
    return Subset(source, chosen)


def main() -> None:
    """Train, score, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--bank", type=int, default=2000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="flags of the runs, at the end")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file = options.out / "scores.json"
    scores: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}
    train, test = (open_source(str(options.data), split) for split in evaluation_splits(str(options.data)))
    bank, queries = some(train, options.bank, 0), some(test, options.queries, 1)
    knn = KnnScore(bank, queries, batch_size=50, workers=0)
    rows = []
    for kind in options.encoders:
        export = encoder.load(trained(kind, options))
        both: dict[str, Encoder] = {"untrained": encoder.random_like(export), "trained": export}
        for side, window in READ[kind]:
            row = f"{kind}, {side} pixels" + ("" if window is None else f", windows of {window}")
            cells = []
            for state, one in both.items():
                key = f"{row}, {state}, step {export.lineage.get('step')}, {options.bank} and {options.queries} images"
                if key not in scores:
                    scores[key] = knn(encoder.resized(one, (side, side), window=window))
                    write_text(file, json.dumps(scores, indent=1) + "\n")
                cells.append(f"{scores[key]:.1f}")
            rows.append(f"| {row} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    print("\n".join(["", "| encoder | untrained | trained |", "| --- | --- | --- |", *rows]))


if __name__ == "__main__":
    main()
