"""Time that training waits for a checkpoint: the copy before a background write, compared with a synchronous write.

    python benchmarks/checkpoint.py --out FOLDER [--parameters 86] [--rounds 5]
    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/checkpoint.py --out FOLDER

The state is that of AdamW training: three float32 tensors per parameter. FOLDER should be on the disk that stores runs.
The second command is a sharded run (MAE with a ViT-S, FSDP2): every process copies and writes its part. There the
synchronous write is everything that saving without a thread would do: the parts, the renaming, and the export from
gathered parameters.
"""

import argparse
import os
import shutil
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from ssl_pretrain import backbones, checkpoint, distributed, encoder, optim
from ssl_pretrain.distributed import World
from ssl_pretrain.loop import parallel

PARTS = 150  # tensors of each kind, as many as a ViT-B has


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; it is removed at the end")
    parser.add_argument("--parameters", type=float, default=86.0, help="millions (default: %(default)s, a ViT-B's)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        with distributed.world() as here:
            sharded(options, here)
        return
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


def sharded(options: argparse.Namespace, here: World) -> None:
    """The same of a sharded run, through the parts of the loop that save."""
    from ssl_pretrain.methods.mae import MAE

    torch.manual_seed(0)
    kind = {**backbones.defaults("vit_small"), **MAE.recipe.encoder, "patch_size": 16}
    method = MAE(
        backbones.build("vit_small", image_size=(224, 224), **kind),
        MAE.Config(decoder_dim=512, decoder_depth=8, decoder_heads=16),
    )
    how = {
        "parallel": "fsdp",
        "gradient_checkpointing": False,
        "compile": False,
        "precision": "fp32",
        "cpu_offload": False,
    }
    parallel.wrap(method, cast(Any, SimpleNamespace(**how)), here)
    shards = parallel.Shards(method, here.device)
    groups = optim.parameter_groups(method, method.encoder, rule=MAE.recipe.decay, layer_decay=1.0, part=shards)
    optimizer = optim.build("adamw", groups, (0.9, 0.95), shards.norms)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    writer = checkpoint.Writer(options.out / "checkpoints", sharded=True)
    twin = encoder.another("vit_small", method.exported())
    whole = encoder.Encoder(twin, "vit_small", encoder.Preprocessing.for_size((224, 224), (0.5,) * 3, (0.5,) * 3), {})

    def save(step: int, copy: bool) -> tuple[float, float]:
        distributed.barrier()
        began = time.perf_counter()
        state = {"method": method.state_dict(), "optimizer": shards.entries(optim.state_by_name(optimizer), method)}
        writer.begin(step, state, copy=copy)
        blocked = time.perf_counter() - began
        writer.wait()
        distributed.barrier()
        writer.publish(keep_last=1, keep_every=None)
        if not copy:
            parallel.copy_whole(method.exported(), twin if here.first else None)
            if here.first:
                encoder.save(options.out / "encoder", whole)
        distributed.barrier()
        return blocked, time.perf_counter() - began

    times = [(save(2 * i, True)[0], save(2 * i + 1, False)[1]) for i in range(options.rounds + 1)]
    if here.first:
        shutil.rmtree(options.out)
        wait, at_once = (statistics.median(each) for each in zip(*times[1:], strict=True))
        print(f"{here.size} processes, FSDP2; first checkpoint (its memory is new): blocked {times[0][0]:.2f} s")
        print(f"then: blocked {wait:.3f} s, at once {at_once:.2f} s: {100 * wait / at_once:.1f} %")


if __name__ == "__main__":
    main()
