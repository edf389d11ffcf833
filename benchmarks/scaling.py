"""Model of the communication and memory of a step on many GPUs, and of the storage bandwidth for checkpoints and
images; measured where possible.

    python benchmarks/scaling.py                      # the prediction, as Markdown tables
    python benchmarks/scaling.py --storage 50 --image-bytes 40000 --checkpoint-every 500    # ... for other inputs
    python benchmarks/scaling.py --planning 64        # time to plan a checkpoint of that number of processes
    python benchmarks/scaling.py --measure            # bytes and times of a step compared with 1, 2 and 4 processes
    python benchmarks/scaling.py --measure --links 0 4 1    # ... over links of these rates in Gbit/s (0: unlimited)

The kernel's traffic shaper limits the loopback of a separate network namespace to these rates. This needs root and the
commands unshare, ip and tc; without them only 0 can be measured.

Symbols: W processes, S of them share one copy of the model (hsdp), P parameters, B images per process. Volumes are
bytes that one process sends in a step; times are seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ssl_pretrain import backbones
from ssl_pretrain.checkpoint.shard_plan import OwnPlan, mine

MODELS = {"ViT-L/16": "vit_large", "ViT-H/14": "vit_huge", "ViT-g/14": "vit_giant"}
PATCH = {"ViT-L/16": 16, "ViT-H/14": 14, "ViT-g/14": 14}
WORLDS = (8, 64, 256, 1024)  # GPUs that are predicted for


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
    waits: bool = False  # whether a process of a sharded model waits for each exchange, as over gloo it does
    # The storage, and the ways to it: bytes a second
    to_host: float = 40e9  # from a GPU to page-locked memory
    to_pages: float = 5e9  # ... to any other
    stream: float = 1e9  # one process writes or reads a file
    sums: float = 6e9  # one core takes the CRC-32 of
    adapter: float = 25e9 * 0.8  # one machine, 200 Gbit/s
    storage: float = 100e9  # all machines together
    operation: float = 0.5e-3  # seconds of opening, renaming or removing a file
    operations: float = 100e3  # of them a second, for all machines together
    listing: float = 20e-6  # seconds of reading where one lies (--planning)


@dataclass(frozen=True)
class Model:
    """What counts of a model that is trained on B images a process."""

    parameters: int
    units: int  # blocks that are gathered and reduced one after another
    flops: float  # of one image's forward and backward
    activations: float  # bytes kept of one image for backward
    tensors: int = 0  # parameters by name


def vit(name: str, tokens: float = 1.0) -> Model:
    """A ViT at 224 pixels that sees that share of its tokens (MAE: 0.25)."""
    with torch.device("meta"):
        backbone = backbones.build(MODELS[name], image_size=(224, 224), in_chans=3, patch_size=PATCH[name])
    sizes = [p.numel() for p in backbone.parameters()]
    parameters = sum(sizes)
    n = tokens * (224 // PATCH[name]) ** 2 + 1
    dim, depth = backbone.dim, backbone.depth
    flops = 3 * (2 * parameters * n + 4 * depth * n * n * dim)  # backward costs two forwards
    # bf16: inputs of norms, QKV, attention's output, the MLP's two widths: 16 values a token and block
    return Model(parameters, depth + 1, flops, 2 * 16 * n * dim * depth, len(sizes))


def mae(name: str) -> Model:
    """The ViT as MAE trains it: a quarter of the tokens, and a decoder of 8 blocks of 512 that sees all of them."""
    encoder, n, width, depth = vit(name, 0.25), (224 // PATCH[name]) ** 2 + 1, 512, 8
    decoder = 3 * (2 * 12 * depth * width**2 * n + 4 * depth * n * n * width)
    return replace(encoder, flops=encoder.flops + decoder)


@dataclass(frozen=True)
class Cost:
    """Of one step, for one process."""

    inside: float  # bytes sent within a sharing group's machine
    across: float  # bytes sent between machines
    exchange: float  # seconds of communication
    exposed: float  # seconds of it that no computation hides
    step: float  # seconds in all
    memory: float  # bytes


BUCKET = 25 * 2**20  # bytes of gradients that DDP exchanges at a time


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


def not_hidden(how: str, model: Model, exchange: float, compute: float, waits: bool) -> float:
    """Seconds of the exchange that nothing is computed meanwhile.

    ddp has backward to hide behind (two thirds of a step), but for its last bucket, which is full only when backward ends.
    Sharded, parameters are gathered all through the step and gradients scattered behind them, but for one block's share.
    """
    if how == "ddp":
        buckets = max(1.0, 4 * model.parameters / BUCKET)
        return max(exchange / buckets, exchange - compute * 2 / 3)
    return exchange if waits else max(exchange / model.units, exchange - compute)


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
    exposed = not_hidden(how, model, exchange, compute, cluster.waits)
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
        for world in WORLDS:
            for how in ("ddp", "fsdp", "hsdp"):
                c = cost(how, model, images, world, cluster)
                sent = (c.inside + c.across) / 1e9
                fits = "" if c.memory < cluster.memory else " (too much)"
                print(
                    f"| {world} | {how} | {sent:.2f} | {1e3 * c.exposed:.1f} | {100 * c.exposed / c.step:.0f} % | "
                    f"{c.memory / 1e9:.0f}{fits} |"
                )


# ---- The storage: checkpoints as the loop writes and reads them, and the images.


@dataclass(frozen=True)
class Saved:
    """Of one checkpoint, in seconds but for the bytes."""

    part: float  # bytes that the first process writes, which writes most: its part, and the export
    blocked: float  # training waits
    written: float  # the files are written, behind training's back
    read: float  # until a run that is started again can go on


def saved(how: str, model: Model, world: int, cluster: Cluster) -> Saved:
    """The prediction for AdamW without a teacher: 12 bytes a parameter, and 4 for the export.

    Training waits while each process copies what it holds (the first one of ddp the export, too), and, some steps later,
    while the first process names the checkpoint: each part is looked for, and an older checkpoint's part removed. The
    export of what is sharded is read from the files and written after that.
    """
    state, export = 12 * model.parameters, 4 * model.parameters
    machines = max(1, world // cluster.per_machine)
    parts = 1 if how == "ddp" else world
    share = {"ddp": 1, "fsdp": world, "hsdp": min(world, cluster.per_machine)}[how]  # processes that hold one copy
    naming = 2 * parts * cluster.operation
    part, with_it, later = state / parts, 0 if parts > 1 else export, export if parts > 1 else 0
    blocked = with_it / cluster.to_pages + state / share / cluster.to_host + naming

    def takes(own: float, machine: float, all_of_them: float) -> float:
        return max(own / cluster.stream, machine / cluster.adapter, all_of_them / cluster.storage)

    one_machine = state / min(parts, machines) + with_it  # the first process's machine
    written = takes(part + with_it, one_machine, state + with_it) + 2 * takes(later, later, later)

    # The first process reads everything once to compare sums, up to eight files at once; then each reads what it holds.
    at_once = min(8, parts)
    speed = min(at_once * min(cluster.stream, cluster.sums), cluster.adapter, cluster.storage)
    machine = state if share <= cluster.per_machine else state / machines  # its processes share the file's pages
    own = max(state / share / cluster.stream, machine / cluster.adapter, machine * machines / cluster.storage)
    # Every process reads the header of every file, with every part of a parameter and of its moments in it.
    opening = parts * max(cluster.operation, world / cluster.operations)
    headers = opening + 3 * model.tensors * share * cluster.listing
    return Saved(part + export, blocked, written, state / speed + own + headers)


def images_a_second(model: Model, cluster: Cluster) -> float:
    """What one GPU eats where nothing but the model holds it up."""
    return cluster.flops / model.flops


def predict_checkpoints(images: int, every: int, speeds: list[float], cluster: Cluster) -> None:
    """Print the tables of checkpoints; `speeds`: of the storage as a whole, bytes a second."""
    heads = [f"{what}, s (GB/s), of {speed / 1e9:g} GB/s" for what in ("written", "read") for speed in speeds]
    for name in MODELS:
        model = vit(name)
        print(f"\n{name}: a checkpoint of {12 * model.parameters / 1e9:.1f} GB every {every} steps, and the export\n")
        print(f"| GPUs | | training waits, s | share | the first writes, GB | {' | '.join(heads)} |")
        print("| --- | --- | --- | --- | --- |" + " --- |" * len(heads))
        for world in WORLDS:
            for how in ("ddp", "fsdp", "hsdp"):
                period = every * cost(how, model, images, world, cluster).step
                each = [saved(how, model, world, replace(cluster, storage=speed)) for speed in speeds]
                one = each[0]
                wrote = [f"{c.written:.1f} ({16 * model.parameters / 1e9 / c.written:.1f})" for c in each]
                # Once for the sums, then a copy a machine, or one for all
                copies = 2 if how == "fsdp" else 1 + world / cluster.per_machine
                took = [f"{c.read:.0f} ({copies * 12 * model.parameters / 1e9 / c.read:.1f})" for c in each]
                print(
                    f"| {world} | {how} | {one.blocked:.1f} | {100 * one.blocked / period:.1f} % | {one.part / 1e9:.1f} | "
                    f"{' | '.join(wrote + took)} |"
                )


def planning(tensors: int) -> float:
    """CPU seconds that one sharded tensor takes a process to find out what it writes of a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))
        state = {f"{i}": distribute_tensor(torch.zeros(4, 8), mesh, [Shard(0)]) for i in range(tensors)}
        began = time.process_time()
        plan = OwnPlan()
        plan.set_up_planner(mine(state, first=True))
        plan.create_local_plan()
        took = time.process_time() - began
        dist.destroy_process_group()
    return took / tensors


def listing(processes: int, tensors: int) -> float:
    """CPU seconds of reading, from the headers of a checkpoint's files, where one part of a tensor lies."""
    with tempfile.TemporaryDirectory() as folder:
        for row in range(processes):
            parts = {f"{i}": torch.zeros(1, 8) for i in range(tensors)}
            places = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [row, 0]} for name in parts})}
            save_file(parts, Path(folder) / f"shard-{row:05d}.safetensors", metadata=places)
        began = time.process_time()
        HuggingFaceStorageReader(folder).read_metadata()
        return (time.process_time() - began) / (processes * tensors)


def predict_loading(size: float, decoded: float, cluster: Cluster) -> None:
    """Print what the images ask for: `size` bytes each on the mean, of which a core makes `decoded` views a second."""
    print(f"\nImages of {size / 1e3:.0f} KB, {decoded:.0f} views a core-second, one view an image\n")
    all_of_them = " | ".join(f"GB/s, {world} GPUs" for world in WORLDS)
    print(f"| | images/s a GPU | cores a GPU | GB/s a machine | {all_of_them} | reads/s, {WORLDS[-1]} GPUs |")
    print("| --- | --- | --- | --- |" + " --- |" * len(WORLDS) + " --- |")
    models = {name: vit(name) for name in MODELS} | {f"{name}, MAE": mae(name) for name in MODELS}
    for name, model in sorted(models.items(), key=lambda pair: -images_a_second(pair[1], cluster)):
        rate = images_a_second(model, cluster)
        each = " | ".join(f"{rate * size * world / 1e9:.1f}" for world in WORLDS)
        machine = cluster.per_machine * rate * size / 1e9
        print(
            f"| {name} | {rate:.0f} | {rate / decoded:.1f} | {machine:.2f} | {each} | {rate * WORLDS[-1] / 1e3:.0f} k |"
        )


# ---- The check: real processes over gloo, over links as slow as the shaper makes them. The kernel counts what a process
# writes, by process, because others use the machine too.

WORKER = """
import json, sys, time
import torch, torch.distributed as dist
from ssl_pretrain import backbones, distributed
from ssl_pretrain.loop import parallel
from torch import nn
how, images = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)

def sent():
    for line in open("/proc/self/io"):
        if line.startswith("wchar:"):
            return int(line.split()[1])

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = backbones.build("vit_small", image_size=(64, 64), in_chans=3, patch_size=16)
    def forward(self, images):
        return self.encoder(images).pooled.square().mean()

class Asked:
    gradient_checkpointing, compile, precision, cpu_offload = False, False, "fp32", False
    parallel = how
    shard_size = 2 if how == "hsdp" else None

def timed(work, rounds):
    taken = []
    for _ in range(rounds):
        distributed.barrier()
        began = time.perf_counter()
        work()
        distributed.barrier()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[rounds // 2]

with distributed.world() as here:
    torch.manual_seed(0)
    method = Whole()
    parameters = sum(p.numel() for p in method.parameters())
    units = len(parallel.blocks(method)) + 1
    batch = torch.randn(images, 3, 64, 64)
    model = method
    def step():
        model(batch).backward()
        for p in method.parameters():
            p.grad = None
    step()
    compute = timed(step, 7)  # beside the other processes, without an exchange
    exchange = latency = 0.0
    if here.size > 1:
        everything, nothing = torch.zeros(parameters), torch.zeros(1)
        exchange = timed(lambda: dist.all_reduce(everything), 3)
        latency = timed(lambda: [dist.all_reduce(nothing) for _ in range(20)], 5) / 20
    model = parallel.wrap(method, Asked, here)
    for _ in range(2):
        step()
    distributed.barrier()
    before = sent()
    seconds = timed(step, 5)
    counted = (sent() - before) / 5
    if here.first:
        print(json.dumps({"parameters": parameters, "units": units, "counted": counted, "step": seconds,
                          "compute": compute, "exchange": exchange, "latency": latency}))
"""


@dataclass(frozen=True)
class Seen:
    """What real processes showed."""

    parameters: int
    units: int
    counted: float  # bytes that the first process wrote in a step
    step: float  # seconds
    compute: float  # seconds of the same step without its exchange, in as many processes
    exchange: float  # seconds of one all-reduce of all gradients, by itself
    latency: float  # seconds of one of nothing


def run(how: str, world: int, images: int) -> Seen:
    """Steps in `world` processes on this machine."""
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
    return Seen(**json.loads(said[0].splitlines()[-1]))


def over_link(how: str, world: int, images: int, gbit: float) -> Seen:
    """`run` in a network namespace whose processes can each send that many Gbit/s."""
    if not gbit:
        return run(how, world, images)
    shape = f"tc qdisc add dev lo root tbf rate {gbit * world:g}gbit burst 256kb latency 1s"
    inside = ["unshare", "--net", "sh", "-c", f'ip link set lo up && {shape} && exec "$@"', "sh"]
    argv = [*inside, sys.executable, __file__, "--one", how, str(world), str(images)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"no link of {gbit:g} Gbit/s (it needs root, unshare, ip and tc): {done.stderr.strip()}")
    return Seen(**json.loads(done.stdout.splitlines()[-1]))


def measure(images: int, links: list[float]) -> None:
    """Print predicted against counted bytes, and predicted against measured time of a step."""
    heads = (
        "processes",
        "link, Gbit/s",
        "",
        "sent a step, MB",
        "counted",
        "ratio",
        "compute, s",
        "exposed, s",
        "step, s",
    )
    print(f"| {' | '.join(heads)} | measured | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for world, gbit in [(1, 0.0), *((world, gbit) for gbit in links for world in (2, 4))]:
        for how in ("ddp", "fsdp", "hsdp")[: 3 if world > 2 else 2 if world > 1 else 1]:
            # Of two starts the one that the machine disturbed less
            seen = min((over_link(how, world, images, gbit) for _ in range(2)), key=lambda s: s.step + s.compute)
            # gloo sums and scatters by an all-reduce of everything, twice the traffic of NCCL's reduce-scatter.
            sent = sum(volumes(how, seen.parameters, world, 2, gathered=4, scattered=8))
            # The link as an exchange by itself shows it, and what starting one costs
            each = seen.exchange / (2 * ring(world) * 4 * seen.parameters) if world > 1 else 0.0
            hops = {"ddp": 4 * seen.parameters / BUCKET, "fsdp": 3 * seen.units, "hsdp": 4 * seen.units}[how]
            exchange = sent * each + hops * seen.latency
            model = Model(seen.parameters, seen.units, 0.0, 0.0)
            exposed = not_hidden(how, model, exchange, seen.compute, waits=True)
            step = seen.compute + exposed
            ratio = f"{seen.counted / sent:.3f}" if sent else ""
            link = f"{gbit:g}" if gbit else "-"
            print(
                f"| {world} | {link} | {how} | {sent / 1e6:.1f} | {seen.counted / 1e6:.1f} | {ratio} | "
                f"{seen.compute:.3f} | {exposed:.3f} | {step:.3f} | {seen.step:.3f} | {seen.step / step:.2f} |",
                flush=True,
            )


def main() -> None:
    """Predict, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run gloo processes here and compare")
    parser.add_argument("--images", type=int, default=64, help="a process (default: %(default)s)")
    parser.add_argument(
        "--links", nargs="+", type=float, default=[0.0], metavar="GBIT", help="a process, to measure over"
    )
    parser.add_argument(
        "--storage", nargs="+", type=float, default=[2.0, 20.0], metavar="GB/S", help="what all machines get together"
    )
    parser.add_argument("--checkpoint-every", type=int, default=1000, help="steps (default: %(default)s)")
    parser.add_argument("--image-bytes", type=float, default=110e3, help="of a stored image (default: %(default)s)")
    parser.add_argument(
        "--decoded", type=float, default=683.0, help="views a core makes a second (default: %(default)s)"
    )
    parser.add_argument("--planning", type=int, metavar="PROCESSES", help="measure the finding of a checkpoint's parts")
    parser.add_argument("--one", nargs=3, metavar=("HOW", "PROCESSES", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        how, world, images = options.one
        print(json.dumps(asdict(run(how, int(world), int(images)))))
    elif options.planning:
        print(f"planned in {1e6 * planning(900):.0f} us a tensor")
        print(f"found in {1e6 * listing(options.planning, 900):.0f} us a tensor and process")
    elif options.measure:
        measure(min(options.images, 16), options.links)
    else:
        predict(options.images, Cluster())
        speeds = [1e9 * speed for speed in options.storage]
        predict_checkpoints(options.images, options.checkpoint_every, speeds, Cluster())
        predict_loading(options.image_bytes, options.decoded, Cluster())


if __name__ == "__main__":
    main()
