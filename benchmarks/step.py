"""The training loop compared with a bare hand-written step of the same model: images per second and peak memory.

    python benchmarks/step.py [--encoder vit_tiny] [--image-size 224] [--batch-size 32] [--steps 12] [--rounds 3]
    python benchmarks/step.py --encoder vit_micro --image-size 32 --patch-size 8 --batch-size 2 --decoder 16 1 --steps 300
    python benchmarks/step.py --data ../shared/data/natural --batch-size 16

The second command shows the overhead of the loop: milliseconds per step with a model that takes almost no time. guarded
is the bare step with the work that every step of the loop must do, written by hand: pixels from bytes, and no step if
values are not finite. Each variant runs in its own process, one after another, on the same prepared batch; compare the
ratio of the medians. With `--beside` each variant alternates with bare steps of another model of the same kind. Machine
and caches are then the same for both, which shows differences that are smaller than those between two processes. With
`--data` the loop reads, decodes and crops images with its default number of workers. If Lightning is installed, its
Trainer takes the same steps as the bare ones, without logger, checkpoints and progress bar.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any


def model(arguments: argparse.Namespace) -> Any:
    import torch
    from ssl_pretrain.methods.mae import MAE

    from ssl_pretrain import backbones

    torch.manual_seed(0)
    options = {**backbones.defaults(arguments.encoder), **MAE.recipe.encoder, "patch_size": arguments.patch_size}
    size = (arguments.image_size, arguments.image_size)
    return MAE(backbones.build(arguments.encoder, image_size=size, **options), knobs(arguments))


def knobs(arguments: argparse.Namespace) -> Any:
    from ssl_pretrain.methods.mae import MAE

    if arguments.decoder is None:
        return MAE.Config()
    return MAE.Config(decoder_dim=arguments.decoder[0], decoder_depth=arguments.decoder[1], decoder_heads=1)


class Bare:
    """Forward, backward, AdamW: nothing else.

    guarded: with what the loop owes its users in every step, written out by hand: pixels arrive as bytes and are
    normalised, and a step whose loss or gradients are not finite is not taken.
    """

    def __init__(self, arguments: argparse.Namespace, guarded: bool = False) -> None:
        import torch

        self.method, self.guarded, self.number, self.steps = model(arguments), guarded, 0, arguments.steps
        parameters = self.method.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
        self.images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size)
        pixels = (self.images * 50 + 127).clamp(0, 255).to(torch.uint8)
        self.pixels = pixels.permute(0, 2, 3, 1).contiguous()
        self.mean, self.std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)

    def step(self) -> None:
        import torch

        from ssl_pretrain.pretext import Batch, Step

        images = (self.pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std if self.guarded else self.images
        batch = Batch(views={"image": images}, index=torch.arange(len(images)))
        where: Any = {"rows": slice(0, len(images)), "batch_size": len(images), "device": images.device}
        losses = self.method(batch, Step(step=self.number, total=self.steps, noise=self.number, **where))
        losses.total.backward()
        checked = [p.grad for p in self.method.parameters() if p.grad is not None] if self.guarded else []
        if not checked or torch.isfinite(losses.total + torch.nn.utils.get_total_norm(checked)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number = (self.number + 1) % self.steps


class Clock:
    """Seconds of each step, and of the bare steps taken in between (none without `other`)."""

    def __init__(self, other: Bare | None) -> None:
        self.other, self.own, self.bare = other, list[float](), list[float]()
        self._since: float | None = None

    def between(self) -> None:
        """A step has ended, the next one is about to begin."""
        now = time.perf_counter()
        if self._since is not None:
            self.own.append(now - self._since)
        if self.other is not None:
            self.other.step()
            self.bare.append(time.perf_counter() - now)
        self._since = time.perf_counter()

    def result(self) -> dict[str, float]:
        """Medians over the second half of the steps, in ms."""
        taken = {"own": self.own, "bare": self.bare}
        return {name: 1e3 * statistics.median(each[len(each) // 2 :]) for name, each in taken.items() if each}


def bare(arguments: argparse.Namespace, clock: Clock, guarded: bool = False) -> None:
    """Bare steps one after another."""
    ours = Bare(arguments, guarded)
    clock.between()
    for _ in range(arguments.steps):
        ours.step()
        clock.between()


def loop(arguments: argparse.Namespace, clock: Clock) -> None:
    """The same through `ssl_pretrain.train`, its loader replaced by one ready uint8 batch unless there are data."""
    import numpy as np
    import torch
    from ssl_pretrain.methods.mae import MAE

    from ssl_pretrain import backbones, train
    from ssl_pretrain.config import Run
    from ssl_pretrain.data.loader import RawBatch
    from ssl_pretrain.data.views import COLOUR_PARAMS, GEOMETRY_PARAMS
    from ssl_pretrain.loop import start

    size, count = arguments.image_size, arguments.batch_size
    raw = RawBatch(
        step=0,
        micro=0,
        index=np.arange(count),
        labels=None,
        views={"image": torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8)},
        geometry={"image": np.zeros((count, GEOMETRY_PARAMS), np.float32)},
        colour={"image": np.zeros((count, COLOUR_PARAMS), np.float32)},
    )

    def ready(*_: Any, **__: Any) -> Iterator[RawBatch]:
        while True:
            clock.between()
            yield raw

    read = start.batches

    def stamped(*given: Any, **named: Any) -> Iterator[RawBatch]:
        for each in read(*given, **named):
            clock.between()
            yield each

    start.batches = ready if arguments.data is None else stamped  # type: ignore[assignment]
    options = backbones.config_class(arguments.encoder)(
        **{**backbones.defaults(arguments.encoder), **MAE.recipe.encoder, "patch_size": arguments.patch_size}
    )
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            method="mae",
            out=Path(folder) / "run",
            encoder=arguments.encoder,
            image_size=(size,),
            batch_size=count,
            steps=arguments.steps,
            precision="fp32",
            monitor_every=0,
            picture_every=0,
            **({} if arguments.data is None else {"data": arguments.data}),
        )
        train.train(run, knobs(arguments), options)


def lightning(arguments: argparse.Namespace, clock: Clock) -> None:
    """The bare step through Lightning's Trainer: nothing looked at, nothing logged, nothing kept."""
    import logging

    import torch
    from losses import peer

    from ssl_pretrain.pretext import Batch, Step

    base, trainer_kind = peer("lightning", "LightningModule"), peer("lightning", "Trainer")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    method = model(arguments)
    size, count = arguments.image_size, arguments.batch_size
    batch = Batch(views={"image": torch.randn(count, 3, size, size)}, index=torch.arange(count))

    class Module(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.method = method

        def training_step(self, _: Any, number: int) -> Any:
            clock.between()
            where: Any = {"rows": slice(0, count), "batch_size": count, "device": torch.device("cpu")}
            return self.method(batch, Step(step=number, total=arguments.steps, noise=number, **where)).total

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    trainer = trainer_kind(
        **{"accelerator": "cpu", "max_steps": arguments.steps, "logger": False, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False},
    )
    numbers: Any = range(arguments.steps)
    trainer.fit(Module(), torch.utils.data.DataLoader(numbers, batch_size=None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="vit_tiny")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decoder", type=int, nargs=2, metavar=("DIM", "DEPTH"), help="(default: the paper's)")
    parser.add_argument("--data", help="images for the loop to read (default: one ready batch)")
    parser.add_argument("--beside", action="store_true", help="take bare steps in turn with those of each variant")
    parser.add_argument("--variant", choices=["bare", "guarded", "loop", "lightning"])
    arguments = parser.parse_args()
    if arguments.variant:
        kinds: dict[str, Callable[..., None]] = {
            "bare": bare,
            "guarded": partial(bare, guarded=True),
            "loop": loop,
            "lightning": lightning,
        }
        clock = Clock(Bare(arguments) if arguments.beside else None)
        kinds[arguments.variant](arguments, clock)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**clock.result(), "memory": memory}))
        return
    variants = ["bare", "guarded", "loop", *(["lightning"] if importlib.util.find_spec("lightning") else [])]
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(arguments.rounds):
        for variant, results in found.items():
            argv = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
            # Plugins speak, too
            results.append(json.loads(next(line for line in said.splitlines() if line.startswith("{"))))
    median = {v: {k: statistics.median(r[k] for r in results) for k in results[0]} for v, results in found.items()}
    size = arguments.image_size
    print(f"MAE {arguments.encoder}/{arguments.patch_size} at {size}, batch {arguments.batch_size}, fp32")
    for variant, m in median.items():
        more = [r["own"] - r.get("bare", median["bare"]["own"]) for r in found[variant]]
        print(
            f"{variant:9}  {1e3 * arguments.batch_size / m['own']:8.1f} images/s  a step {m['own']:8.2f} ms, "
            f"{statistics.median(more):+.2f} ({min(more):+.2f} to {max(more):+.2f}) beside bare; {m['memory']:7.0f} MiB"
        )
    each, memory = (median["loop"][k] / median["bare"][k] for k in ("own", "memory"))
    print(f"loop / bare: speed {1 / each:.3f}, memory {memory:.3f}")


if __name__ == "__main__":
    main()
