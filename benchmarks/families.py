"""An encoder of each family through every evaluator, on parts of CIFAR-10, Imagenette and CamVid, in one table.

    python benchmarks/families.py --runs runs/methods --out runs/families [--train 4000] [--test 2000]

The encoders are those that `benchmarks/methods.py --out runs/methods` trained with seed 0. So that two cores do it in half
an hour, the data are parts of the whole: CIFAR-10's first images, two training shards of Imagenette and one of its
validation shards. What it runs is one `ssl-eval suite`; the list is written to suite.yaml beside the table.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import yaml
from pyarrow import parquet

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
}


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


def main() -> None:
    """Make the parts, write the list, run the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", required=True, type=Path, help="folder of benchmarks/methods.py")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--train", type=int, default=4000, help="CIFAR-10 images to learn from (default: %(default)s)")
    parser.add_argument("--test", type=int, default=2000, help="and to be right about (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    asked = {
        "encoders": {f"{name} ({family})": str(options.runs / f"{name}-0") for family, name in FAMILIES.items()},
        "data": {
            "cifar10": str(cifar(options.train, options.test, options.out / "cifar10").resolve()),
            "imagenette": {"data": str(imagenette(options.out / "imagenette").resolve()), "test-split": "val"},
        },
        "evaluators": EVALUATORS,
        "options": {"workers": options.workers},
    }
    file = options.out / "suite.yaml"
    file.write_text(yaml.safe_dump(asked, sort_keys=False))
    argv = [
        sys.executable,
        "-m",
        "ssl_pretrain.launch.evaluate",
        "suite",
        "--list",
        str(file),
        "--out",
        str(options.out),
    ]
    sys.exit(subprocess.run(argv, check=False).returncode)


if __name__ == "__main__":
    main()
