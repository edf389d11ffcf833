"""How long a run will take, said in its first ten seconds: from a timed slice of a micro-batch where a step is long, then
from real steps. The result of the run does not change by a bit.

Each process of a run times the same slice, all at the same time, and the slowest counts. Meanwhile each of them is a run
of one (`distributed.alone`): no process can wait for another that fails. So the time of communication is not in it.

Shapes: n images of the slice.
"""

import dataclasses
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from .. import backbones, distributed
from ..config import BUILT_IN_RUN, Resolved
from ..data.loader import Share, batches, to_batch
from ..data.source import Source
from ..data.views import ViewSpec, fitted
from ..distributed import World
from ..errors import UserError
from ..pretext import Method, Step, WholeBatchMethod
from ..randomness import key
from . import parallel
from .report import Report
from .signals import StopRequest
from .stages import Stage

LONG_STEP = 2e11  # operations of a step that is measured on a slice first: seconds on a CPU
SECONDS = 1.0  # of training, and of reading images, that a slice is made for
FIRST, ENOUGH = 3.0, 8.0  # seconds after which several real steps, or one, are reported
HOUR = 3600.0
SMALL: dict[str, Any] = {"encoder": "vit_micro", "image-size": 64, "patch-size": 8}  # of a first look


@dataclass(frozen=True)
class Speed:
    """Seconds an image, and the memory of a run."""

    training: float
    reading: float  # of one process
    gibibytes: float  # 0: not known

    def step(self, images: int, workers: int, cores: float) -> float:
        """Seconds of a step of `images` of one process. On a CPU, reading takes its share of the cores from training."""
        shared = self.training + self.reading / cores if workers else self.training + self.reading
        return images * max(shared, self.reading / max(1, workers))


@final
class Estimate:
    """Says once how long the run takes, and on a CPU what makes a long one short: `begin` before the first step, `after`
    each step."""

    def __init__(
        self,
        run: Resolved,
        method: Method,
        source: Source,
        plan: list[Stage],
        world: World,
        report: Report,
        stop: StopRequest,
    ) -> None:
        """stop: once a signal came, nothing more is measured."""
        self.run, self.method, self.source, self.plan = run, method, source, plan
        self.world, self.report, self.stop = world, report, stop
        self._begun = self._since = 0.0  # when training began, and from when on real steps are counted
        self._steps = self._counted = 0
        self._said = False

    def begin(self, start: int, autocast: Any) -> None:
        """Before step `start`: measure a slice if the steps are long, or say why not. All processes call it."""
        self.method.train()
        specs = next((stage.specs for stage in self.plan if start < stage.last), None)
        if specs is not None and _operations(self.method, specs) * self._share >= LONG_STEP:
            if parallel.is_sharded(self.method):
                self.report.say(
                    f"no estimate before the first step: with --parallel {self.run.parallel} a process holds a part of the "
                    f"model; speed and time left are measured in the first steps"
                )
            else:
                with _eager(self.run.compile):  # compiled for the slice's size: a minute
                    self._say_from_slice(specs, start, autocast)
        if self.run.compile:
            self.report.say("the first step also compiles the model; the speed is measured after it")
        self._begun = self._since = time.monotonic()

    @property
    def _share(self) -> int:
        """Images of a step that one process computes."""
        return self.run.batch_size // self.world.size

    def leave_out(self, seconds: float) -> None:
        """Do not count the last `seconds`, which were no training: pictures, scores."""
        self._begun, self._since = self._begun + seconds, self._since + seconds

    def after(self, step: int) -> None:
        """After `step` steps of the run: say how fast the real ones are, once that is known."""
        if self._said or self.report.silent:
            return
        now = time.monotonic()
        self._steps, self._counted = self._steps + 1, self._counted + 1
        # It warms up, or is compiled; the next ones tell more.
        if self._steps == 1 and (now - self._begun < ENOUGH or self.run.compile):
            self._since, self._counted = now, 0
            return
        if now - self._begun < FIRST:
            return
        self._said = True
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        seconds = (time.monotonic() - self._since) / self._counted
        self.report.say(
            f"step {step}/{self.run.steps}  measured: {self.run.batch_size / seconds:.3g} images/s, "
            f"{in_words((self.run.steps - step) * seconds)} left, {_memory(self.world.device):.1f} GiB of memory so far"
        )

    def _say_from_slice(self, specs: tuple[ViewSpec, ...], start: int, autocast: Any) -> None:
        run = self.run
        measured = self._measure(self.method, specs, start, autocast)
        if measured is None:
            return
        images, speed = measured
        seconds = self._seconds(speed)
        left = (run.steps - start) * seconds
        several = self.world.size > 1
        how = f" on each of {self.world.size} processes, without their communication" if several else ""
        how += ", not compiled" if run.compile else ""
        self.report.say(
            f"estimated from {images} images{how}: {run.batch_size / seconds:.3g} images/s, {seconds:.1f} s a step, "
            f"{in_words(left)} for {run.steps - start:,} steps"
            + (f", about {speed.gibibytes:.1f} GiB of memory" if speed.gibibytes else "")
            + (" a process" if speed.gibibytes and several else "")
        )
        if self.world.device.type == "cpu" and left > 1.2 * HOUR:
            for line in self._shorter(specs, speed, start, autocast):
                self.report.say(line)

    def _seconds(self, speed: Speed) -> float:
        """Of a step of the run."""
        again = 4 / 3 if isinstance(self.method, WholeBatchMethod) and self.run.accumulate > 1 else 1.0  # GradCache
        speed = dataclasses.replace(speed, training=again * speed.training)
        workers = 1 if self.run.workers is None else self.run.workers
        return speed.step(self._share, workers, max(1.0, distributed.cores() / self.world.local_size))

    def _measure(
        self, method: Method, specs: tuple[ViewSpec, ...], start: int, autocast: Any
    ) -> tuple[int, Speed] | None:
        """How many images were timed, and the speed of the slowest process; None where one could not measure it: no run
        ends for that. All processes call it and get the same."""
        most = max(2, self._share // self.run.accumulate)
        few = min(most, max(2, method.least_batch))
        with _unchanged(method, self.world):
            before = _memory(self.world.device)
            times = self._timed(method, specs, few, start, autocast)  # warms up
            warm, images = _memory(self.world.device), few
            if times is not None and sum(times) < SECONDS:
                times = self._timed(method, specs, few, start, autocast)
                if times is not None:
                    images = int(min(SECONDS / max(times[1], 1e-9), SECONDS / max(times[0], 1e-9)) * few)
                    images = max(few, min(most, images))
                    times = self._timed(method, specs, images, start, autocast)
            peaks = distributed.from_all((before, warm, _memory(self.world.device)))
            before, warm, end = (max(of_all) for of_all in zip(*peaks, strict=True))
        if times is None:
            return None
        reading, training = times
        an_image = max(end - warm, 0.0) / max(1, images - few)
        state = 2 * 4 * sum(p.numel() for p in method.parameters() if p.requires_grad) / 2**30  # AdamW's moments
        # Of fewer images the difference is noise.
        memory = max(end, before + state + an_image * most) if images >= 4 * few else 0.0
        return images, Speed(training / images, reading / images, memory)

    def _timed(
        self, method: Method, specs: tuple[ViewSpec, ...], images: int, start: int, autocast: Any
    ) -> tuple[float, float] | None:
        """The most seconds that a process needs to read images, and for their loss and its gradients; None where one
        failed. All processes call it and get the same."""
        own = None
        with suppress(Exception), distributed.alone():
            own = self._pass(method, specs, images, start, autocast)
        found = distributed.from_all(own)
        return None if None in found else (max(each[0] for each in found), max(each[1] for each in found))

    def _pass(
        self, method: Method, specs: tuple[ViewSpec, ...], images: int, start: int, autocast: Any
    ) -> tuple[float, float]:
        """Seconds to read images, and for their loss and its gradients."""
        if self.stop.signal is not None:
            raise UserError("the run is asked to stop")
        run, world = self.run, self.world
        began = time.perf_counter()
        stream = batches(
            self.source, specs, Share(images), seed=run.seed, channels=run.in_chans, start_step=start,
            stop_step=start + 1, workers=0, policy="replace",
        )  # fmt: skip
        with closing(stream):
            raw = next(stream)
        read = time.perf_counter()
        batch = to_batch(raw, specs, run.mean, run.std, world.device)
        step = Step(
            step=start, total=run.steps, noise=key(run.seed, "estimate"), rows=slice(0, images), batch_size=images,
            device=world.device,
        )  # fmt: skip
        with autocast:
            losses = method(batch, step)
        # Not backward(): it would add to the parameters' gradients, and run the hooks on them.
        trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
        torch.autograd.grad(losses.total, trained, allow_unused=True)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        return read - began, time.perf_counter() - read

    def _shorter(self, specs: tuple[ViewSpec, ...], speed: Speed, start: int, autocast: Any) -> Iterator[str]:
        """Lines of flags with which the run takes an hour or less, from the time of each."""
        # Of the mask unit, which is a whole number of patches, so that the encoder takes all sizes.
        run, kind, encoder = self.run, type(self.method), self.method.encoder
        timed: list[tuple[dict[str, Any], Speed]] = [({}, speed)]
        half = (_half(run.image_size[0], encoder.unit[0]), _half(run.image_size[1], encoder.unit[1]))
        seen_by_networks = any(spec.network is not None for spec in specs)  # whose views need their sizes
        if half != run.image_size and not run.stages and not seen_by_networks:
            specs = fitted(kind.views(self.method.config, half), half, encoder.stride, unit=encoder.unit)
            found = self._measure(self.method, specs, start, autocast)
            timed += [({"image-size": " ".join(map(str, dict.fromkeys(half)))}, found[1])] if found else []
        timed += self._small(start, autocast)
        if any(distributed.any_of(self.stop.signal is not None)):
            return
        yield "to be done within an hour, for example:"
        for flags, each in timed:
            seconds = self._seconds(each) / run.batch_size  # an image
            images = min(run.steps * run.batch_size, HOUR / seconds)
            epochs, steps = int(images / len(self.source)), int(images / flags.get("batch-size", run.batch_size))
            length = f"--epochs {epochs}" if epochs >= 3 else f"--steps {steps}"
            words = [f"--{name} {value}" for name, value in flags.items()]
            if steps:
                yield f"  {' '.join([*words, length])}   ({in_words(images * seconds)})"

    def _small(self, start: int, autocast: Any) -> list[tuple[dict[str, Any], Speed]]:
        """The flags of a first look and its speed; nothing where the run is as small, or the method cannot be so."""
        kind, size = type(self.method), (SMALL["image-size"], SMALL["image-size"])
        if self.run.encoder == SMALL["encoder"] or min(self.run.image_size) <= size[0]:
            return []
        if kind.frozen(kind.Config()):  # networks that the method cannot do without
            return []
        options = {**backbones.defaults("vit_micro"), **kind.recipe.encoder, "patch_size": SMALL["patch-size"]}
        try:
            with torch.random.fork_rng(devices=[]), distributed.alone():
                backbone = backbones.build("vit_micro", image_size=size, in_chans=self.run.in_chans, **options)
                method = kind(backbone, kind.sized(kind.Config(), backbone, len(self.source)))
                method.prepare(len(self.source))
        except UserError:
            return []
        specs = fitted(kind.views(method.config, size), size, backbone.stride)
        measured = self._measure(method.train(), specs, start, autocast)
        # The paper's optimiser, learning rate and batch are for large encoders and long runs.
        built_in = {**BUILT_IN_RUN, **kind.recipe.small}
        short = {
            name.replace("_", "-"): built_in[name] for name in ("batch_size", "optimizer", "lr") if name in built_in
        }
        return [({**SMALL, **short}, measured[1])] if measured else []


@contextmanager
def _unchanged(method: Method, world: World) -> Iterator[None]:
    """What a forward pass changes is as before at the end: batch-norm statistics, and generators of torch."""
    norms = [module for module in method.modules() if isinstance(module, _BatchNorm)]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    devices = [world.device] if world.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _eager(compiled: bool) -> AbstractContextManager[object]:
    """Within it, compiled blocks are computed as they are; nothing is compiled, and what is compiled stays."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def _half(side: int, unit: int) -> int:
    """Half an image's side, a multiple of the mask unit; the side itself where half of it is below 32 pixels."""
    half = side // 2 // unit * unit
    return half if half >= 32 else side


def _operations(method: Method, specs: tuple[ViewSpec, ...]) -> float:
    """Roughly, floating-point operations of training on one image: 6 for each parameter and each 16 x 16 pixels (or patch,
    where patches are smaller)."""
    parameters = sum(p.numel() for p in method.parameters() if p.requires_grad)
    side = min(16, *method.encoder.stride)
    return 6.0 * parameters * sum(spec.count * spec.size[0] * spec.size[1] for spec in specs) / side**2


def _memory(device: torch.device) -> float:
    """The most memory so far, GiB: of the process on a CPU, of tensors on a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def in_words(seconds: float) -> str:
    """A time that a person plans with: "40 seconds", "12 minutes", "5 h 20 min", "3 days 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} second" + "s" * (round(seconds) != 1)
    if minutes < 90:
        return f"{minutes} minutes"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes // 1440} days {minutes % 1440 // 60} h"
