"""How long training waits for a checkpoint: the copying before it is written behind its back, against writing it at once.

    python benchmarks/checkpoint.py --out FOLDER [--parameters 86] [--rounds 5]

The state is that of AdamW training: three float32 tensors a parameter. FOLDER should be on the disk that runs are kept on.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import torch

from ssl_pretrain import checkpoint

PARTS = 150  # tensors of each kind, as many as a ViT-B has


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; it is removed at the end")
    parser.add_argument("--parameters", type=float, default=86.0, help="millions (default: %(default)s, a ViT-B's)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    size = int(options.parameters * 1e6 / PARTS)
    state = {part: {f"{i}": torch.randn(size) for i in range(PARTS)} for part in ("method", "exp_avg", "exp_avg_sq")}
    folder = options.out / "checkpoints"
    writer = checkpoint.Writer(folder)
    blocked, behind, at_once = [], [], []
    for step in range(options.rounds + 1):
        began = time.perf_counter()
        writer.begin(2 * step, state)
        copied = time.perf_counter()
        writer.publish(keep_last=1, keep_every=None)
        behind.append(time.perf_counter() - copied)
        if writer.problem:
            raise writer.problem
        blocked.append(copied - began)
        began = time.perf_counter()
        checkpoint.save(folder, 2 * step + 1, state)
        at_once.append(time.perf_counter() - began)
        checkpoint.prune(folder, keep_last=1, keep_every=None)
    shutil.rmtree(options.out)
    first, *rest = blocked
    wait, whole = statistics.median(rest), statistics.median(at_once[1:])
    gigabytes = 3 * 4 * options.parameters / 1e3
    print(f"{gigabytes:.2f} GB; first checkpoint (its memory is new): blocked {first:.2f} s")
    print(f"then: blocked {wait:.3f} s, written behind in {statistics.median(behind[1:]):.2f} s, at once {whole:.2f} s")
    print(f"blocked share {100 * wait / whole:.1f} %")


if __name__ == "__main__":
    main()
