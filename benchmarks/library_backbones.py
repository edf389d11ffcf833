"""Backbones of timm pretrained by several methods: does each learn on real images, does the export open in timm, and do
two processes compute what one computes?

    python benchmarks/library_backbones.py --out runs/timm [--only learn ranks] [--encoders resnet18] [--methods simclr]

learn: `ssl-pretrain --encoder timm:NAME` on the first 4,000 training images of CIFAR-10 (32 pixels), without labels; kNN
top-1 of 2,000 test images by the 4,000 training images, trained and untrained; timm then opens the export, and the
largest difference of its features over the largest value is printed. ranks: the loss and the gradients of the first step
of one process and of two that share its batch, as the largest difference of a gradient over the largest gradient. The
table is printed at the end, as Markdown. timm must be installed.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyarrow import parquet
from ssl_pretrain.launch.pretrain import main as pretrain
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ssl_pretrain import backbones, distributed, encoder, pretext
from ssl_pretrain.data.source import open_source
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.data.views import fitted
from ssl_pretrain.loop.score import KnnScore
from ssl_pretrain.pretext import Batch, Method, Step

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
ENCODERS = ("resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv4_conv_small", "efficientnet_lite0")
METHODS = ("simclr", "vicreg", "dino", "lejepa")
IMAGES, BANK, QUERIES = 4000, 4000, 2000
RUN = "--batch-size 64 --workers 0 --precision fp32 --aug fast --log-every 20 --monitor-every 0 --picture-every 0"
SMALL = {  # flags of short runs on small images; the rest is the recipe's
    "simclr": "--optimizer adamw --lr 1e-3 --temperature 0.2 --hidden-dim 512 --blur 0 --crop-scale 0.2 1",
    "vicreg": "--optimizer adamw --lr 1e-3 --projector-dim 512 --blur 0 --crop-scale 0.2 1",
    "dino": "--prototypes 128 --hidden-dim 512 --local-views 2 --momentum 0.97 --blur 0 --drop-path 0.05",
    "lejepa": "--lr 1e-3 --local-views 0 --global-scale 0.2 1 --hidden-dim 512 --blur 0",
}
# Sides in pixels: convnets without a large stem have one position left of 32
SIZES = {
    "resnet18": 32,
    "vit_tiny_patch16_224": 32,
    "convnext_atto": 64,
    "mobilenetv4_conv_small": 64,
    "efficientnet_lite0": 64,
}
ARGUMENTS = {"vit_tiny_patch16_224": ("patch_size=8", "depth=4")}  # 4 x 4 patches of 32 pixels
ROWS, SHARED = 8, (64, 64)  # batch and image size of the step of one and two processes


def import_timm() -> Any:
    """timm. On a CPU build of torch, torchvision wants two of its operators declared first."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = import_timm.__dict__.setdefault("library", torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


# ---- Learning, and the export in timm.


def learn(name: str, method: str, folder: Path, steps: int) -> dict[str, float]:
    """One run: kNN top-1 in percent of the untrained and the trained encoder, and the difference of timm's features."""
    out, data = folder / f"{name}-{method}", folder / "images"
    began = time.process_time()
    words = [
        "--method",
        method,
        "--encoder",
        f"timm:{name}",
        "--data",
        data,
        "--out",
        out,
        "--image-size",
        SIZES.get(name, 64),
    ]
    words += ["--steps", steps, *RUN.split(), "--no-score", *SMALL[method].split()]
    if name in ARGUMENTS:
        words += ["--timm-args", *ARGUMENTS[name]]
    if pretrain(list(map(str, words))):
        sys.exit(f"{name} with {method} ended with an error")
    seconds = time.process_time() - began
    train, test = open_source(str(data), "train"), open_source(str(DATA), "test")
    score = KnnScore(Subset(train, np.arange(BANK)), Subset(test, np.arange(QUERIES)), batch_size=250, workers=0)
    trained = encoder.load(out)
    untrained = encoder.random_like(trained)
    return {
        "untrained": score(untrained),
        "trained": score(trained),
        "timm": difference_in_timm(trained, out / "encoder"),
        "CPU s": seconds,
    }


def difference_in_timm(ours: encoder.Encoder, folder: Path) -> float:
    """timm opens the export: the largest difference of its features over the largest value."""
    timm = import_timm()
    written = json.loads((folder / "config.json").read_text())
    theirs = timm.create_model(
        written["architecture"], checkpoint_path=folder / "model.safetensors", num_classes=0, **written["model_args"]
    ).eval()
    images = torch.randn(8, 3, *ours.preprocessing.crop, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, expected = ours(images).pooled, theirs(images)
    return float((found - expected).abs().max() / expected.abs().max())


def some_images(folder: Path) -> None:
    """The first training images of CIFAR-10 in `folder`/images."""
    target = folder / "images" / "train-00000-of-00001.parquet"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(".part")
        parquet.write_table(parquet.read_table(next(DATA.glob("train-*.parquet"))).slice(0, IMAGES), part)
        part.rename(target)


# ---- One process and two.


def first_step(name: str, method_name: str) -> dict[str, Any]:
    """The loss and the gradients of one step on this process's share of a batch of noise images."""
    kind = pretext.load(method_name)
    torch.manual_seed(0)
    model: Any = backbones.build(f"timm:{name}", image_size=SHARED, drop_path=0.2 if method_name == "dino" else 0.0)
    known = {field.name for field in dataclasses.fields(kind.Config)}
    tiny = {key: value for key, value in kind.recipe.tiny.items() if key in known}
    method: Method = kind(model, kind.Config(**tiny))
    method.prepare(ROWS)
    method.train().double()  # batch norms of few values amplify rounding
    rank, size = distributed.rank(), distributed.size()
    rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    views = {}
    for i, spec in enumerate(fitted(kind.views(method.config, SHARED), SHARED, model.stride)):
        images = torch.randn(spec.count, ROWS, 3, *spec.size, generator=torch.Generator().manual_seed(i))[
            :, rows
        ].double()
        views[spec.name] = images if spec.count > 1 else images[0]
    batch = Batch(views=views, index=torch.arange(ROWS)[rows])
    step = Step(step=3, total=10, noise=7, rows=rows, batch_size=ROWS, device=torch.device("cpu"))
    wrapped: nn.Module = DistributedDataParallel(method) if size > 1 else method
    loss = wrapped(batch, step).total
    loss.backward()
    gradients = {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
    return {"loss": float(distributed.all_reduce_(loss.detach())) / size, "gradients": gradients}


def compare_ranks(pairs: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, float]]:
    """The differences between one process and two, of each pair of an encoder and a method."""
    with tempfile.TemporaryDirectory() as folder:
        place = {"SSL_PRETRAIN_RENDEZVOUS": (Path(folder) / "rendezvous").as_uri(), "WORLD_SIZE": "2"}
        words = [
            sys.executable,
            __file__,
            "--serve",
            folder,
            "--pairs",
            *(f"{name}:{method}" for name, method in pairs),
        ]
        processes = [
            subprocess.Popen(words, env={**os.environ, **place, "LOCAL_WORLD_SIZE": "2", "RANK": r, "LOCAL_RANK": r})
            for r in ("0", "1")
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(f"two processes ended with {codes}")
        found = {}
        for name, method in pairs:
            two, one = torch.load(Path(folder) / f"{name}-{method}.pt"), first_step(name, method)
            assert two["gradients"].keys() == one["gradients"].keys()
            largest = max(float(g.abs().max()) for g in one["gradients"].values())
            apart = max(float((two["gradients"][key] - g).abs().max()) for key, g in one["gradients"].items())
            found[name, method] = {
                "loss": abs(two["loss"] - one["loss"]) / abs(one["loss"]),
                "gradient": apart / largest,
            }
    return found


def serve(folder: Path, pairs: list[tuple[str, str]]) -> None:
    """One of two processes."""
    with distributed.world() as world:
        for name, method in pairs:
            found = first_step(name, method)
            if world.first:
                torch.save(found, folder / f"{name}-{method}.pt")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the runs")
    parser.add_argument("--only", nargs="+", choices=["learn", "ranks"], default=["learn", "ranks"])
    parser.add_argument("--encoders", nargs="+", default=ENCODERS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import_timm()
    torch.set_num_threads(1)
    if options.serve:
        return serve(options.serve, [(pair.partition(":")[0], pair.partition(":")[2]) for pair in options.pairs])
    pairs = [(name, method) for name in options.encoders for method in options.methods]
    rows: dict[tuple[str, str], dict[str, Any]] = {pair: {} for pair in pairs}
    if "learn" in options.only:
        if options.out is None:
            parser.error("--out is needed")
        some_images(options.out)
        for pair in pairs:
            rows[pair] |= learn(*pair, options.out, options.steps)
            print(pair, rows[pair], flush=True)
    if "ranks" in options.only:
        for pair, found in compare_ranks(pairs).items():
            rows[pair] |= found
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"| encoder | method | {' | '.join(columns)} |\n| --- | --- |{' --- |' * len(columns)}")
    for (name, method), row in rows.items():
        shown = (
            f"{row[key]:.1f}" if key in ("untrained", "trained", "CPU s") else f"{row[key]:.0e}" for key in columns
        )
        print(f"| `timm:{name}` | {method} | {' | '.join(shown)} |")
    return None


if __name__ == "__main__":
    main()
