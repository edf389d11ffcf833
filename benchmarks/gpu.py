"""Training on a GPU: images per second, share of the GPU's matrix product rate, memory, idle time.

    python -m benchmarks.gpu [--minutes 8] [--methods mae dino ...] [--encoders vit_base ...] [--out results.json]

It needs only torch and this package. First it measures the limits of the machine: bfloat16 matrix products and copies.
Then it measures training steps (forward, backward, fused AdamW, and the method's work after a step) on prepared images
under bfloat16 autocast, for each method, encoder and mode (eager, compiled). Then it compares the loop of
`ssl-pretrain` on JPEG files, with all cores of the machine, with the bare step. The batch is halved until it fits. The
most important rows come first; rows for which there is no time are named. --device cpu and --image-size allow to test
the suite without a GPU, without memory and idle time.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from ssl_pretrain import backbones, pretext, train
from ssl_pretrain.config import Run
from ssl_pretrain.data.views import fitted
from ssl_pretrain.loop import parallel
from ssl_pretrain.pretext import Batch, Method, Step

METHODS = ["mae", "dino", "simclr", "ijepa", "lejepa"]
ENCODERS = ["vit_large", "vit_base", "vit_small"]
BATCHES = {"vit_small": 256, "vit_base": 128, "vit_large": 64}  # images, to begin with; MAE takes twice as many
CLOCKED = 6  # steps, after three that warm up
OutOfMemory = torch.cuda.OutOfMemoryError


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    """Median time of one `work`, of so many."""
    taken = []
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def ceilings(device: torch.device) -> dict[str, float]:
    """FLOP/s of a bfloat16 (CPU: float32) matrix product, and bytes/s that a copy reads and writes."""
    dtype, side = (torch.bfloat16, 8192) if device.type == "cuda" else (torch.float32, 1024)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind(0)
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        a @ b
        target.copy_(source)
    return {
        "matmul_flops": 2 * side**3 / seconds(lambda: a @ b, device, 10),
        "copy_bytes": 2 * source.numel() / seconds(lambda: target.copy_(source), device, 10),
    }


def paper_knobs(kind: type[Method]) -> Any:
    """The knobs of the method's paper, also for encoders and data that are smaller than the paper's."""
    with torch.device("meta"):
        return kind.sized(kind.Config(), backbones.build("vit_large", image_size=(224, 224)), None)


def build(name: str, encoder: str, size: tuple[int, int], device: torch.device) -> Method:
    """A method with its paper's knobs on an encoder."""
    kind = pretext.load(name)
    patch = 16 if min(size) >= 64 else 8
    options = {**backbones.defaults(encoder), "patch_size": patch, **kind.recipe.encoder}
    torch.manual_seed(0)
    method = kind(backbones.build(encoder, image_size=size, **options), paper_knobs(kind))
    method.prepare(4096)
    return method.to(device).train()


def step_of(method: Method, images: int, size: tuple[int, int], device: torch.device) -> Callable[[], None]:
    """A training step on ready images."""
    views = {}
    for spec in fitted(type(method).views(method.config, size), size, method.encoder.stride):
        shape = (images, 3, *spec.size) if spec.count == 1 else (spec.count, images, 3, *spec.size)
        views[spec.name] = torch.randn(shape, device=device)
    batch = Batch(views=views, index=torch.arange(images, device=device), labels=None)
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def run() -> None:
        step = Step(step=50, total=100, noise=7, rows=slice(0, images), batch_size=images, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            losses = method(batch, step)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step.carried = losses.carry
        with torch.no_grad():
            method.after_step(step)

    return run


def busy(run: Callable[[], None]) -> float:
    """Seconds of a step in which the GPU worked: the sum of its kernels' times (of one stream)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(2):
            run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 2 / 1e6


def row(name: str, encoder: str, compiled: bool, options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """One line of the table; with a batch of half the size where memory does not do."""
    device, size = torch.device(options.device), (options.image_size, options.image_size)
    images = options.batch_size or BATCHES.get(encoder, 256) * (2 if name == "mae" else 1)
    while True:
        try:
            return _row(name, encoder, compiled, images, size, device, ceiling)
        except OutOfMemory:
            torch.cuda.empty_cache()
            images //= 2
            if images < 1:
                raise


def _row(
    name: str,
    encoder: str,
    compiled: bool,
    images: int,
    size: tuple[int, int],
    device: torch.device,
    ceiling: float,
) -> dict[str, Any]:
    cuda = device.type == "cuda"
    method = build(name, encoder, size, device)
    run = step_of(method, images, size, device)
    with FlopCounterMode(display=False) as counter:
        run()  # before compilation, which hides operations from the counter
    flops = counter.get_total_flops()
    if compiled:
        for block in parallel.blocks(method):
            block.compile(dynamic=False)
    for _ in range(3):
        run()
    wait(device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taken = seconds(run, device, CLOCKED)
    found: dict[str, Any] = {
        "method": name,
        "encoder": encoder,
        "compiled": compiled,
        "batch": images,
        "images_per_s": images / taken,
        "share_of_matmul": flops / taken / ceiling,
    }
    if cuda:
        found["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
        found["idle"] = max(0.0, 1 - busy(run) / taken)
    return found


def jpegs(folder: Path, count: int) -> None:
    """Files of 500 x 375 pixels, with detail at every scale, as photographs have."""
    rng = np.random.default_rng(0)
    for i in range(count):
        layers = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((500, 375)), np.float32)
            for n in (4, 16, 64, 250)
        ]
        mixed = sum(weight * layer for weight, layer in zip((0.5, 0.25, 0.15, 0.1), layers, strict=True))
        Image.fromarray(np.asarray(mixed).astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=90)


def loop(name: str, encoder: str, options: argparse.Namespace, bare: dict[str, Any]) -> dict[str, Any]:
    """The loop's images a second on files, over its later half, against the bare step of the same batch."""
    batch, kind = bare["batch"], pretext.load(name)
    patch = 16 if options.image_size >= 64 else 8
    chosen = backbones.config_class(encoder)(
        **{**backbones.defaults(encoder), "patch_size": patch, **kind.recipe.encoder}
    )
    with tempfile.TemporaryDirectory() as folder:
        files = Path(options.data) if options.data else Path(folder) / "images"
        if not options.data:
            files.mkdir()
            jpegs(files, max(256, 2 * batch) if options.device == "cuda" else 2 * batch)
        run = Run(
            method=name, data=str(files), out=Path(folder) / "run", encoder=encoder, image_size=(options.image_size,),
            batch_size=batch, steps=40 if options.device == "cuda" else 6, monitor_every=0, picture_every=0,
            val_images=0, score=False, log_every=2, checkpoint_every=10**6, aug=options.aug,
        )  # fmt: skip
        train.train(replace(run), paper_knobs(kind), chosen)
        lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()] if run.out else []
    later = [line for line in lines if "images_per_s" in line][len(lines) // 2 :]
    speed = statistics.median(line["images_per_s"] for line in later)
    return {
        "method": name,
        "encoder": encoder,
        "batch": batch,
        "images_per_s": speed,
        "of_bare_step": speed / bare["images_per_s"],
        "data_wait": statistics.median(line["data_wait"] for line in later),
        "cores": len(os.sched_getaffinity(0)),
    }


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as Markdown."""
    top = report["ceilings"]
    yield f"{report['device']}, torch {report['torch']}, Python {report['python']}, {report['date']}; "
    yield f"matrix product {top['matmul_flops'] / 1e12:.1f} TFLOP/s, copy {top['copy_bytes'] / 1e9:.0f} GB/s\n"
    yield "| method | encoder | | batch | images/s | share of the matrix product | peak GiB | idle |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for each in report["steps"]:
        way = "compiled" if each["compiled"] else "eager"
        gpu = f"{each['peak_GiB']:.1f} | {each['idle']:.0%}" if "idle" in each else " | "
        yield (
            f"| {each['method']} | {each['encoder']} | {way} | {each['batch']} | {each['images_per_s']:.0f} | "
            f"{each['share_of_matmul']:.0%} | {gpu} |"
        )
    for each in report["loops"]:
        yield (
            f"\nLoop on JPEG files, {each['method']} {each['encoder']}, {each['cores']} cores: "
            f"{each['images_per_s']:.0f} images/s, {each['of_bare_step']:.2f} of the bare step, "
            f"waiting for data {each['data_wait']:.0%} of the time"
        )
    if report["not_run"]:
        yield "\nNot run, for want of time: " + ", ".join(report["not_run"])


def main() -> None:
    """Measure until the time is over; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/gpu.json")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new row after so long, less a minute a row")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--encoders", nargs="+", default=ENCODERS)
    parser.add_argument("--ways", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, help="images a step (default: by encoder)")
    parser.add_argument("--data", help="folder of images for the loop (default: made)")
    parser.add_argument("--aug", choices=["exact", "fast"], default="fast")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --device cpu tries the suite without one")
    began, device = time.monotonic(), torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    top = ceilings(device)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "ceilings": top,
        "steps": [],
        "loops": [],
        "not_run": [],
    }
    # Eager rows first: a compiled one takes as long as five of them.
    wanted = [(w, e, m) for w in options.ways for e in options.encoders for m in options.methods]
    longest = {"eager": 0.0, "compiled": 0.0}
    reserve = 45 if device.type == "cuda" else 0  # seconds for the loop
    for way, encoder, name in wanted:
        left = 60 * options.minutes - (time.monotonic() - began) - reserve
        if longest[way] > left or left < 0:
            report["not_run"].append(f"{name} {encoder} {way}")
            continue
        started = time.monotonic()
        report["steps"].append(row(name, encoder, way == "compiled", options, top["matmul_flops"]))
        longest[way] = max(longest[way], time.monotonic() - started)
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps(report["steps"][-1]), flush=True)
    for name, encoder in ((m, e) for m in options.methods[:1] for e in options.encoders[-2:-1] or options.encoders[:1]):
        same = [r for r in report["steps"] if (r["method"], r["encoder"], r["compiled"]) == (name, encoder, False)]
        if same and time.monotonic() - began < 60 * options.minutes:
            report["loops"].append(loop(name, encoder, options, same[0]))
        else:
            report["not_run"].append(f"loop {name} {encoder}")
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    lines = "\n".join(table(report)) + "\n"
    out.with_suffix(".md").write_text(lines)
    print(lines)


if __name__ == "__main__":
    main()
