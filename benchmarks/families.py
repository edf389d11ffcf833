"""Evaluates one encoder of each family with every evaluator, on parts of CIFAR-10, Imagenette and CamVid, in one table.

    python benchmarks/families.py --runs runs/methods --out runs/families [--train 4000] [--test 2000]

The encoders are those that `benchmarks/all_methods.py --out runs/methods` trained with seed 0. Only parts of the data
are used, so that two cores need half an hour: CIFAR-10's first images, two training shards of Imagenette and one of its
validation shards. It runs `ssl-eval suite`; each list is written to suite.yaml next to its table. `targets` has
separate suites, because its table of attributes and numbers belongs to one data set (this script creates it: common
attributes of classes, and the mean brightness of the image). `segment` has one too, because it needs masks (CamVid's
first 60 training and 40 test images).
"""

import argparse
import csv
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from pyarrow import parquet

from ssl_pretrain.data.decode import decode
from ssl_pretrain.data.source import open_source

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FAMILIES = {
    "masked images": "mae",
    "masked latents": "data2vec2",
    "contrastive": "simclr",
    "without negatives": "vicreg",
    "clustering": "swav",
    "JEPA": "lejepa",
    "self-distillation": "dino",
    "autoregressive": "aim",
}
EVALUATORS = {
    "knn": {},
    "linear": {"steps": 1000, "lrs": [0.005, 0.02, 0.1, 0.5]},
    "logistic": {"c-count": 9, "budgets": ["5", "10%"], "draws": 3},
    "attentive": {"epochs": 5, "blocks": [1]},
    "finetune": {"epochs": 3, "lrs": [0.002], "layer-decay": 0.75, "train-batch-size": 128},
    "cluster": {"algorithms": ["kmeans"], "starts": 3},
    "retrieval": {"queries": 1000},
    "robust": {"test-images": 500, "severities": [3]},
    "diagnose": {"images": 2000, "view-images": 200},
    "embed": {},
}
# Which classes have what, for `targets`
ATTRIBUTES = {
    "cifar10": {
        "animal": ("bird", "cat", "deer", "dog", "frog", "horse"),
        "flies": ("airplane", "bird"),
        "wheels": ("automobile", "truck"),
    },
    "imagenette": {  # its shards number the classes: tench 0, English springer 1, ..., parachute 9
        "animal": ("0", "1"),
        "machine": ("2", "3", "6", "7"),
        "sky": ("4", "9"),
    },
}
SEGMENT = {"task": ["linear"], "ignore-label": [11], "image-size": [96, 128], "steps": 500}
SCENES = {"train": 60, "test": 40}


def cifar(train: int, test: int, folder: Path) -> Path:
    """The first images of each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        whole = parquet.read_table(next((SHARED / "cifar10").glob(f"{split}-*.parquet")))
        parquet.write_table(whole.slice(0, count), folder / f"{split}-00000-of-00001.parquet")
    return folder


def imagenette(folder: Path) -> Path:
    """Two training shards and one of validation, as links."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train-000", "train-001", "val-000"):
        link = folder / f"imagenette160-{name}.tar"
        if not link.is_symlink():
            link.symlink_to(SHARED / "imagenette160" / link.name)
    return folder


def camvid(folder: Path) -> Path:
    """The first images and masks of two splits."""
    if not folder.exists():
        taken: Counter[str] = Counter()
        with tarfile.open(SHARED / "camvid320" / "camvid320.tar") as archive:
            members = [member for member in archive if member.name.split("/")[0] in SCENES]
            for member in sorted(members, key=lambda member: member.name):
                split = member.name.split("/")[0]
                taken[split] += 1
                if taken[split] <= 2 * SCENES[split]:  # the image and its mask, which follow one another
                    archive.extract(member, folder, filter="data")
    return folder


def attributes(name: str, data: Path, splits: tuple[str, str], file: Path) -> Path:
    """The table of `targets`: a line an image, what its class has, and its mean brightness."""
    has = ATTRIBUTES[name]
    with open(file, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["file", "split", *has, "brightness"])
        for split, called in zip(splits, ("train", "test"), strict=True):
            source = open_source(str(data), split)
            assert source.labels is not None
            assert source.classes is not None
            for i in range(len(source)):
                label = source.classes[source.labels[i]]
                values = [int(label in classes) for classes in has.values()]
                writer.writerow(
                    [
                        source.name(i).removeprefix(f"{data}/"),
                        called,
                        *values,
                        f"{decode(source[i], 1).mean() / 255:.6f}",
                    ]
                )
    return file


def suite(out: Path, asked: dict[str, Any]) -> int:
    """Run one list; returns its exit code."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / "suite.yaml"
    file.write_text(yaml.safe_dump(asked, sort_keys=False))
    argv = ["-m", "ssl_pretrain.launch.evaluate", "suite", "--list", str(file), "--out", str(out)]
    return subprocess.run([sys.executable, *argv], check=False).returncode


def main() -> None:
    """Make the parts, write the lists, run the suites."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, type=Path, help="folder of benchmarks/all_methods.py")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--train", type=int, default=4000, help="CIFAR-10 images to learn from (default: %(default)s)")
    parser.add_argument("--test", type=int, default=2000, help="and to be right about (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    out: Path = options.out
    encoders = {f"{name} ({family})": str(options.runs / f"{name}-0") for family, name in FAMILIES.items()}
    common = {"workers": options.workers}
    small = cifar(options.train, options.test, out / "cifar10").resolve()
    photographs = imagenette(out / "imagenette").resolve()
    data = {"cifar10": str(small), "imagenette": {"data": str(photographs), "test-split": "val"}}
    codes = [suite(out, {"encoders": encoders, "data": data, "evaluators": EVALUATORS, "options": common})]
    for name, splits in (("cifar10", ("train", "test")), ("imagenette", ("train", "val"))):
        table = attributes(name, small if name == "cifar10" else photographs, splits, out / f"{name}.csv").resolve()
        # Without controls: the turning of 3,072 raw pixels takes longer than all else.
        same = {"evaluator": "targets", "targets": str(table), "baselines": False}
        wanted = {"map": {**same, "columns": [*ATTRIBUTES[name]]}, "r2": {**same, "columns": ["brightness"]}}
        asked = {"encoders": encoders, "data": {name: data[name]}, "evaluators": wanted, "options": common}
        codes.append(suite(out / f"targets-{name}", asked))
    scenes = {"camvid": str(camvid(out / "scenes").resolve())}
    wanted = {"segment": SEGMENT}
    codes.append(
        suite(out / "segment", {"encoders": encoders, "data": scenes, "evaluators": wanted, "options": common})
    )
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
