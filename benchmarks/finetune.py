"""Fine-tuning from a MAE export compared with training from scratch at the same budget: test accuracy after each epoch,
on Imagenette.

    python benchmarks/finetune.py --out runs/finetune [--steps 1000] [--epochs 6]

MAE is pretrained on the training images without labels. Then `ssl-eval finetune` trains its encoder, and in the same
way a random one of the same architecture. Existing results are not computed again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenette160"
ENCODER = ["--encoder", "vit_micro", "--image-size", 48, "--patch-size", 8]
MAE = ["--method", "mae", "--decoder-dim", 128, "--decoder-depth", 1, "--decoder-heads", 4, "--batch-size", 128]
MAE += ["--lr", 2e-3, "--val-images", 0, "--no-score"]
TUNE = ["--lrs", 2e-3, "--train-batch-size", 128, "--mixup", 0, "--cutmix", 0, "--no-baselines"]


def run(*argv: object) -> None:
    """A command of ours; ends this program where it fails."""
    command = [sys.executable, "-m", *map(str, argv)]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


def main() -> None:
    """Pretrain, fine-tune both, print the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--data", default=str(DATA), help="labelled images with splits (default: Imagenette)")
    parser.add_argument("--steps", type=int, default=1000, help="of MAE (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    pretrained = options.out / "mae"
    common = ["--data", options.data, "--workers", options.workers]
    run("ssl_pretrain.launch.pretrain", *MAE, *ENCODER, *common, "--steps", options.steps, "--out", pretrained)
    print(f"| epoch | {' | '.join(map(str, range(1, options.epochs + 1)))} |\n| --- |{' --- |' * options.epochs}")
    ways = {"from MAE": ["--encoder", pretrained], "from scratch": ["--encoder", "random", "--like", pretrained]}
    for name, encoder in ways.items():
        out = options.out / name.replace(" ", "-")
        if not (out / "results.json").exists():
            length = ["--epochs", options.epochs, "--curve", options.epochs]
            run("ssl_pretrain.launch.evaluate", "finetune", *encoder, *common, *TUNE, *length, "--out", out)
        curve = json.loads((out / "results.json").read_text())["metrics"]["curve"]
        print(f"| {name} | {' | '.join(format(point['top1'], '.1f') for point in curve)} |", flush=True)


if __name__ == "__main__":
    main()
