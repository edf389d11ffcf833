"""What a step costs in communication and memory on many GPUs: a model on paper, checked where it can be.

    python benchmarks/scaling.py                      # the prediction, as Markdown tables
    python benchmarks/scaling.py --measure            # the model's volumes against the bytes that gloo sends here, and its
                                                      # times against measured ones, with 1, 2 and 4 processes

Symbols: W processes, S of them share one copy of the model (hsdp), P parameters, B images a process. Volumes are bytes that
one process sends in a step; times are seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ssl_pretrain import backbones

MODELS = {"ViT-L/16": "vit_large", "ViT-H/14": "vit_huge", "ViT-g/14": "vit_giant"}
PATCH = {"ViT-L/16": 16, "ViT-H/14": 14, "ViT-g/14": 14}


@dataclass(frozen=True)
class Cluster:
    """A machine room: H100-class GPUs, eight a machine, one 400 Gb/s adapter for each."""

    flops: float = 0.4 * 989e12  # bf16 a second that a ViT's step reaches
    per_machine: int = 8
    inside: float = (
        450e9 * 0.8
    )  # bytes a second between GPUs of a machine (NVLink, one direction, what NCCL gets of it)
    across: float = 50e9 * 0.8  # ... between machines
    latency: float = 15e-6  # of one hop of a collective
    memory: float = 80e9


@dataclass(frozen=True)
class Model:
    """What counts of a model that is trained on B images a process."""

    parameters: int
    units: int  # blocks that are gathered and reduced one after another
    flops: float  # of one image's forward and backward
    activations: float  # bytes kept of one image for backward


def vit(name: str, tokens: float = 1.0) -> Model:
    """A ViT at 224 pixels that sees that share of its tokens (MAE: 0.25)."""
    with torch.device("meta"):
        backbone = backbones.build(MODELS[name], image_size=(224, 224), in_chans=3, patch_size=PATCH[name])
    parameters = sum(p.numel() for p in backbone.parameters())
    n = tokens * (224 // PATCH[name]) ** 2 + 1
    dim, depth = backbone.dim, backbone.depth
    flops = 3 * (2 * parameters * n + 4 * depth * n * n * dim)  # backward costs two forwards
    # bf16: inputs of norms, QKV, attention's output, the MLP's two widths: 16 values a token and block
    return Model(parameters, depth + 1, flops, 2 * 16 * n * dim * depth)


@dataclass(frozen=True)
class Cost:
    """Of one step, for one process."""

    inside: float  # bytes sent within a sharing group's machine
    across: float  # bytes sent between machines
    exchange: float  # seconds of communication
    exposed: float  # seconds of it that no computation hides
    step: float  # seconds in all
    memory: float  # bytes


def ring(size: int) -> float:
    """The share of a buffer that a process sends when it is gathered or reduced around a ring."""
    return (size - 1) / size


def volumes(
    how: str, parameters: int, world: int, share: int, gathered: int = 2, scattered: int = 4
) -> tuple[float, float]:
    """Bytes that one process sends in a step: to those it shares a copy of the model with, and to the other copies.

    ddp: gradients (float32) go around twice, to be summed and handed out. fsdp: parameters (`gathered` bytes each) are
    gathered for forward and again for backward, gradients (`scattered` bytes) summed and scattered once. hsdp: fsdp among
    `share` processes, then ddp of each one's part among the world / share copies.
    """
    if how == "ddp":
        return 0.0, 2 * ring(world) * 4 * parameters
    size = world if how == "fsdp" else share
    among = ring(size) * parameters * (2 * gathered + scattered)
    copies = world // size
    return among, 2 * ring(copies) * 4 * parameters / size


def cost(how: str, model: Model, images: int, world: int, cluster: Cluster) -> Cost:
    """The prediction for `images` a process."""
    share = min(world, cluster.per_machine)
    among, between = volumes(how, model.parameters, world, share)
    one_machine = world <= cluster.per_machine
    if how == "ddp":
        inside, across = (between, 0.0) if one_machine else (0.0, between)
        size, hops = world, 2 * (world - 1) ** 0.5  # trees and rings lie between the logarithm and the number itself
    else:
        size = world if how == "fsdp" else share
        flat = size <= cluster.per_machine
        inside, across = (among, between) if flat else (0.0, among + between)
        hops = 3 * (size - 1) ** 0.5 + 2 * (world // size - 1) ** 0.5
    # A ring across machines runs at the slowest link it crosses.
    exchange = inside / cluster.inside + across / cluster.across
    exchange += hops * model.units * cluster.latency
    compute = model.flops * images / cluster.flops
    # Hidden behind the blocks that are computed meanwhile: all but one unit's share; ddp and the scattering of gradients
    # have backward only (two thirds), the gathering of parameters all of the step.
    hideable = compute * (2 / 3 if how == "ddp" else 1.0)
    exposed = max(exchange / model.units, exchange - hideable)
    state = 16 * model.parameters  # parameters, gradients, two moments, all float32
    held = state if how == "ddp" else state / size + 3 * 6 * model.parameters / model.units  # three gathered units
    return Cost(inside, across, exchange, exposed, compute + exposed, held + model.activations * images)


def predict(images: int, cluster: Cluster) -> None:
    """Print the tables."""
    for name in MODELS:
        model = vit(name)
        print(f"\n{name}: {model.parameters / 1e6:.0f} M parameters, {images} images a GPU, all tokens\n")
        print("| GPUs | | sent a step, GB | exposed, ms | share of the step | memory a GPU, GB |")
        print("| --- | --- | --- | --- | --- | --- |")
        for world in (8, 64, 256, 1024):
            for how in ("ddp", "fsdp", "hsdp"):
                c = cost(how, model, images, world, cluster)
                sent = (c.inside + c.across) / 1e9
                fits = "" if c.memory < cluster.memory else " (too much)"
                print(
                    f"| {world} | {how} | {sent:.2f} | {1e3 * c.exposed:.1f} | {100 * c.exposed / c.step:.0f} % | "
                    f"{c.memory / 1e9:.0f}{fits} |"
                )


# ---- The check: real processes over gloo, whose bytes the kernel counts.

WORKER = """
import json, os, sys, time
import torch, torch.distributed as dist
from ssl_pretrain import backbones, distributed, parallel
from torch import nn
how, images = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)

def sent():
    for line in open("/proc/net/dev"):
        if line.strip().startswith("lo:"):
            return int(line.split()[1])

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = backbones.build("vit_tiny", image_size=(64, 64), in_chans=3, patch_size=16)
    def forward(self, images):
        return self.encoder(images).pooled.square().mean()

class Asked:
    recompute, compile, precision, cpu_offload = False, False, "fp32", False
    parallel = how
    shard_size = 2 if how == "hsdp" else None

with distributed.world() as here:
    torch.manual_seed(0)
    method = Whole()
    parameters = sum(p.numel() for p in method.parameters())
    wrapped = parallel.wrap(method, Asked, here)
    batch = torch.randn(images, 3, 64, 64)
    def step():
        wrapped(batch).backward()
        for p in method.parameters():
            p.grad = None
    for _ in range(3):
        step()
    distributed.barrier()
    bytes_before, began, cpu = sent(), time.perf_counter(), time.process_time()
    for _ in range(10):
        step()
    distributed.barrier()
    seconds, bytes_after = (time.perf_counter() - began) / 10, sent()
    # what one exchange of the gradients takes by itself
    buffer = torch.zeros(parameters)
    alone = []
    if here.size > 1:
        for _ in range(5):
            distributed.barrier()
            t = time.perf_counter()
            dist.all_reduce(buffer)
            alone.append(time.perf_counter() - t)
    if here.first:
        exchange = sorted(alone)[2] if alone else 0.0
        print(json.dumps([parameters, (bytes_after - bytes_before) / 10 / here.size, seconds, exchange]))
"""


def run(how: str, world: int, images: int) -> tuple[int, float, float, float]:
    """Parameters, bytes a process sent a step, seconds a step, seconds of one all-reduce of all gradients."""
    with tempfile.TemporaryDirectory() as folder:
        place = {**os.environ, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
                 "SSL_PRETRAIN_RENDEZVOUS": (Path(folder) / "meet").as_uri()}  # fmt: skip
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, how, str(images)],
                env={**place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]
        said = [process.communicate()[0] for process in processes]
    return tuple(json.loads(said[0].splitlines()[-1]))


def measure(images: int) -> None:
    """Print predicted against counted bytes, and what the exchange added to the time of a step."""
    print("| processes | | bytes sent a step, predicted | counted | ratio | step, s | all-reduce alone, s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for world in (1, 2, 4):
        for how in ("ddp", "fsdp", "hsdp"):
            if world == 1 and how != "ddp":
                continue
            began = time.monotonic()
            rounds = [run(how, world, images) for _ in range(3)]
            parameters, counted = rounds[0][0], statistics.median(r[1] for r in rounds)
            # gloo sums and scatters by an all-reduce of everything, twice the traffic of NCCL's reduce-scatter.
            predicted = sum(volumes(how, parameters, world, 2, gathered=4, scattered=8))
            ratio = f"{counted / predicted:.2f}" if predicted else ""
            step, alone = (min(r[i] for r in rounds) for i in (2, 3))
            print(
                f"| {world} | {how} | {predicted:,.0f} | {counted:,.0f} | {ratio} | {step:.3f} | {alone:.3f} |",
                flush=True,
            )
            print(f"{world} {how}: {time.monotonic() - began:.0f} s", file=sys.stderr)


def main() -> None:
    """Predict, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run gloo processes here and compare")
    parser.add_argument("--images", type=int, default=64, help="a process (default: %(default)s)")
    options = parser.parse_args()
    if options.measure:
        measure(min(options.images, 16))
    else:
        predict(options.images, Cluster())


if __name__ == "__main__":
    main()
