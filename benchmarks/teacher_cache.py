"""What a step costs with a frozen teacher, and with its stored outputs (`ssl-data cache-teacher`).

    python benchmarks/teacher_cache.py [--batch-size 8] [--steps 3]

featmim trains a student on the patch features of a teacher, at 224 pixels with patches of 16. A step is forward, backward
and, of the first row, the teacher's forward, of the second, reading its rows from the disk. CPU seconds of the process are
printed (`time.process_time`), so other work on the machine changes little. Loading and cropping images are not in a step;
with a cache the teacher's view is not made at all. Random weights: the time does not depend on them.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ssl_pretrain.methods.featmim import FeatMIM

from ssl_pretrain import backbones
from ssl_pretrain.backbones.stored import StoredOutputs
from ssl_pretrain.data import rows
from ssl_pretrain.data.rows import Layout, Rows
from ssl_pretrain.data.views import Sight
from ssl_pretrain.frozen import Frozen
from ssl_pretrain.pretext import Batch, Step

SIZE, PATCH = 224, 16
SCALE = ((0.5,) * 3, (0.25,) * 3)


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="vit_base")
    parser.add_argument("--student", default="vit_micro")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    count, n = args.batch_size, (SIZE // PATCH) ** 2

    def encoder(name: str) -> backbones.backbone.Backbone:
        options = {**backbones.defaults(name), "patch_size": PATCH}
        return backbones.build(name, image_size=(SIZE, SIZE), **options)

    backbone = encoder(args.teacher)
    teacher = Frozen(backbone, spec="", fingerprint="", sight=Sight((PATCH, PATCH)), own=SCALE, run=SCALE)
    stands_in = StoredOutputs(
        dim=backbone.dim, depth=backbone.depth, stride=(PATCH, PATCH), image_size=(SIZE, SIZE), in_chans=3,
        block=backbone.depth - 1, outputs=("patches",), kind="float32", grids={n: (SIZE // PATCH, SIZE // PATCH)},
    )  # fmt: skip
    cached = Frozen(stands_in, spec="", fingerprint="", sight=teacher.sight, own=SCALE, run=SCALE)
    images = torch.randn(count, 3, SIZE, SIZE)
    index = np.arange(count)
    layout = Layout((("teacher", "float32", (1, n, backbone.dim)),), count, count)
    with tempfile.TemporaryDirectory() as folder:
        record = np.empty(count, layout.record)
        record["index"], record["f0"] = index, teacher(images).patches[:, None].numpy()
        rows.write_part(Path(folder), layout, 0, [record])
        stored = Rows(Path(folder), layout, "")
        each = {
            "teacher": (teacher, lambda: images),
            "stored outputs": (cached, lambda: stored.read(0, 0, index)),
        }
        seconds = {name: _seconds(encoder(args.student), *how, images, args.steps) for name, how in each.items()}
    before = seconds["teacher"]
    print(
        f"{args.teacher} onto {args.student}, {SIZE} pixels, batch {count}, {args.steps} steps, one thread per core used"
    )
    for name, value in seconds.items():
        print(f"{name:<16}{value:>9.3f} CPU seconds a step{before / value:>8.1f} times cheaper")


def _seconds(
    student: backbones.backbone.Backbone,
    network: Frozen,
    view: Callable[[], torch.Tensor],
    images: torch.Tensor,
    steps: int,
) -> float:
    """CPU seconds of a step, the median."""
    method = FeatMIM(student, FeatMIM.Config())
    method.prepare(len(images), {"teacher": network})
    taken = []
    for number in range(steps + 1):
        began = time.process_time()
        batch = Batch(views={"image": images, "teacher": view()}, index=torch.arange(len(images)))
        step = Step(
            step=number, total=steps + 1, noise=number, rows=slice(0, len(images)), batch_size=len(images),
            device=torch.device("cpu"),
        )  # fmt: skip
        method(batch, step).total.backward()
        taken.append(time.process_time() - began)
        for parameter in method.parameters():
            parameter.grad = None
    return sorted(taken[1:])[(steps - 1) // 2]  # the first one sets things up


if __name__ == "__main__":
    main()
