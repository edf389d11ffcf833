"""The loader: from samples of a source to batches on the device.

A worker makes one whole micro-batch at a time, uint8, from nothing but its number: which samples, which crops, which
replacement for a bad file are functions of (seed, epoch, sample). So the bytes do not depend on how many workers
there are, where a run started, or how many ranks hold the batch.

Shapes: B images of this process's micro-batch, H x W pixels of a view, C channels, P colour parameters
(`colour.apply`).
"""

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import add
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..errors import UserError, of_the_machine, system_error
from ..randomness import Part, key, numpy_generator
from . import colour, composed
from .batch import Batch
from .decode import SHRINKS, BadImage, Picture, Scratch, shrink
from .sampler import permute, samples
from .source import Source
from .views import COLOUR_PARAMS, GEOMETRY_PARAMS, Box, Draw, ViewSpec, draw, render

Policy = Literal["replace", "skip", "fail"]
Failure = tuple[int, str, str]  # index in the source, its name, why it could not be used

_ATTEMPTS = 100  # bad samples in a row before the data, not a file, is what is wrong
_PREFETCH = 3  # micro-batches each worker makes ahead
_SHARED_MEMORY = "/dev/shm"
_PR_SET_PDEATHSIG = 1  # prctl(2): the signal this process gets when the thread that started it ends
# What terminals and clusters send to every process of a job: for the main process to act on, which then ends its
# workers
_NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Share:
    """Which rows of the global batch a process holds: the batch is cut into `accumulate` micro-batches, one after
    another, and each of them into `world` equal runs of rows, by rank. Raises UserError where that does not come out
    even."""

    batch_size: int  # global
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.accumulate < 1 or self.world < 1 or not 0 <= self.rank < self.world:
            raise UserError(
                f"accumulate is {self.accumulate} and this is rank {self.rank} of {self.world}; "
                f"accumulate must be at least 1 and the rank in 0..{max(self.world, 1) - 1}"
            )
        parts = self.accumulate * self.world
        if self.batch_size < 1 or self.batch_size % parts:
            below = self.batch_size // parts * parts
            raise UserError(
                f"--batch-size {self.batch_size} does not divide into {self.world} process(es) x "
                f"{self.accumulate} micro-batch(es); the nearest that do: "
                + (f"{below} and {below + parts}" if below > 0 else f"{parts}")
            )

    @property
    def micro_size(self) -> int:
        """Images in each of this process's micro-batches."""
        return self.batch_size // (self.accumulate * self.world)

    def rows(self, micro: int) -> slice:
        """The rows of the global batch that this process's micro-batch `micro` of a step holds."""
        start = (micro * self.world + self.rank) * self.micro_size
        return slice(start, start + self.micro_size)


@dataclass
class RawBatch:
    """A micro-batch as the workers make it, on the CPU."""

    step: int  # which optimiser step it is for
    micro: int  # which micro-batch of that step
    index: np.ndarray  # (B,) int64, of the images really used
    labels: np.ndarray | None  # (B,) int64, of the same; None where the data has none
    views: dict[
        str, Tensor
    ]  # by spec name, uint8 (B, H, W, C), or (count, B, H, W, C) where the spec's count is above 1; or its stored rows
    geometry: dict[str, np.ndarray]  # float32 (B, 6) or (count, B, 6), see `batch.Batch`
    colour: dict[str, np.ndarray]  # float32 (B, P) or (count, B, P)
    failures: list[Failure] = field(default_factory=list)

    def pin_memory(self) -> "RawBatch":
        """With the views in page-locked memory; DataLoader calls this."""
        self.views = {name: view.pin_memory() for name, view in self.views.items()}
        return self


def batches(
    source: Source,
    specs: Sequence[ViewSpec],
    share: Share,
    *,
    seed: int,
    channels: int,
    start_step: int,
    stop_step: int,
    workers: int,
    policy: Policy,
    pin: bool = False,
) -> Generator[RawBatch, None, None]:
    """This process's micro-batches of the steps start_step, ..., stop_step - 1, in order; `share.accumulate` for each
    step.

    `workers`: processes that make them (0: this one does). `policy`, for a sample that cannot be read or decoded:
    "replace" takes another one, drawn for this sample; "skip" the next in the epoch's order; "fail" ends the run.
    Failures come with the micro-batch they happened in. `pin`: into page-locked memory, for copies to a CUDA device.

    Raises UserError for the bad sample itself ("fail"), after 100 bad ones in a row, and where the shared memory for
    the workers is too small.
    """
    stream = _Stream(source, specs, share, channels=channels, seed=seed, policy=policy)
    numbers = range(start_step * share.accumulate, stop_step * share.accumulate)
    return _made(stream, numbers, workers, pin, share.micro_size)


def fixed_batches(
    source: Source,
    specs: Sequence[ViewSpec],
    share: Share,
    *,
    seed: int,
    channels: int,
    policy: Policy,
    workers: int = 0,
    pin: bool = False,
) -> Generator[RawBatch, None, None]:
    """The samples of `source` once, in their own order, with the same views every time: for a validation loss.

    Shared out as in `batches`; samples beyond the last whole global batch are left out. The rest is as in `batches`,
    too.
    """
    fixed = _Fixed(source, specs, share, channels=channels, seed=seed, policy=policy)
    numbers = range(len(source) // share.batch_size * share.accumulate)
    return _made(fixed, numbers, workers, pin, share.micro_size)


def to_batch(
    raw: RawBatch, specs: Sequence[ViewSpec], mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Batch:
    """The micro-batch on the device, its views float32 (B, C, H, W) or (count, B, C, H, W), coloured and normalised
    by `mean` and `std` (C numbers each, of pixels in [0, 1])."""

    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def seen(spec: ViewSpec) -> Tensor:
        if spec.stored is not None:
            rows = raw.views[spec.name].to(device, non_blocking=True)
            return rows.float() if rows.is_floating_point() else rows.long()
        composes = spec.fast and len(mean) == 3 and colour.coloured(spec)
        pixels = raw.views[spec.name].to(device, non_blocking=True)
        return (composed if composes else colour).finish(pixels, raw.colour[spec.name], spec, mean, std)

    return Batch(
        views={spec.name: seen(spec) for spec in specs},
        index=moved(raw.index),
        geometry={name: moved(rows) for name, rows in raw.geometry.items()},
        labels=None if raw.labels is None else moved(raw.labels),
    )


@dataclass(frozen=True)
class _Mistake:
    """A UserError on its way out of a worker, without the traceback that DataLoader would put around it."""

    message: str


class _Maker(Dataset, ABC):
    """Micro-batches by number, each made from nothing but that."""

    def __init__(
        self,
        source: Source,
        specs: Sequence[ViewSpec],
        share: Share,
        *,
        seed: int,
        channels: int,
        policy: Policy,
    ) -> None:
        self.source = source
        self.specs = tuple(specs)
        self.share = share
        self.seed = seed
        self.channels = channels
        self.policy = policy
        self.fast = all(spec.fast for spec in self.specs)
        self._generator = _Restarted()
        self._scratch = Scratch()

    @abstractmethod
    def _wanted(self, position: int) -> list[tuple[int | str, int, int]]:
        """What the rows of a micro-batch are of, from `position` of the stream on: epoch, sample, place in the
        epoch."""

    @abstractmethod
    def _at(self, epoch: int | str, place: int) -> int:
        """The sample at a place of the epoch."""

    def __getitem__(self, number: int) -> RawBatch | _Mistake:
        try:
            prepared = self._make(*divmod(number, self.share.accumulate))
            if get_worker_info() is not None:
                for view in prepared.views.values():
                    view.share_memory_()  # on its way out anyway; failing here, it can still be reported
            return prepared
        except UserError as mistake:
            return _Mistake(str(mistake))
        except RuntimeError as error:
            if _is_about_shared_memory(error):
                return _Mistake(_SHARED_MEMORY_FULL)
            raise

    def _make(self, step: int, micro: int) -> RawBatch:
        size, specs = self.share.micro_size, self.specs
        rendered = [spec for spec in specs if spec.stored is None]
        views = {s.name: torch.empty(s.count, size, *s.size, self.channels, dtype=torch.uint8) for s in rendered}
        targets = {name: view.permute(0, 1, 4, 2, 3) for name, view in views.items()}
        geometry = {s.name: np.empty((s.count, size, GEOMETRY_PARAMS), dtype=np.float32) for s in specs}
        colour = {s.name: np.empty((s.count, size, COLOUR_PARAMS), dtype=np.float32) for s in specs}
        index = np.empty(size, dtype=np.int64)
        failures: list[Failure] = []
        position = step * self.share.batch_size + self.share.rows(micro).start
        wanted = self._wanted(position)
        for row, (epoch, sample, place) in enumerate(wanted):
            index[row], draws, (top, left, by), pixels = self._usable(epoch, sample, place, failures)
            for spec, copy, drawn in draws:
                if spec.stored is None:
                    y, x, height, width = drawn.box if by == 1 else shrink(drawn.box, by)
                    crop = pixels[y - top : y - top + height, x - left : x - left + width]
                    render(crop, spec, drawn, targets[spec.name][copy, row : row + 1])
                geometry[spec.name][copy, row] = drawn.geometry
                colour[spec.name][copy, row] = drawn.colour
        for spec in specs:
            if spec.stored is not None:  # (B, count, L, D), where the batch has (count, B, 1, L, D)
                rows = spec.stored.rows.read(spec.stored.field, position, index)
                views[spec.name] = rows.transpose(0, 1).unsqueeze(2).contiguous()
            if spec.count == 1:
                name = spec.name
                views[name], geometry[name], colour[name] = views[name][0], geometry[name][0], colour[name][0]
        labels = None if self.source.labels is None else np.asarray(self.source.labels[index], dtype=np.int64)
        return RawBatch(step, micro, index, labels, views, geometry, colour, failures)

    def _usable(
        self, epoch: int | str, wanted: int, place: int, failures: list[Failure]
    ) -> tuple[int, list[tuple[ViewSpec, int, Draw]], tuple[int, int, int], np.ndarray]:
        """The wanted sample, or the one that takes its place: its index, its draws, and the pixels that hold all its
        crops, with their top and left in the whole image, and how many times smaller they and it are."""
        size, sample = len(self.source), wanted
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return sample, *self._pixels(epoch, sample)
            except BadImage as error:
                bad, name = error, self.source.name(sample)
            failures.append((sample, name, bad.reason))
            if self.policy == "fail":
                raise UserError(
                    f"{name} cannot be used: {bad.reason}. Repair or remove it, or let bad images be passed over: "
                    f"--bad-images replace"
                )
            if self.policy == "replace":
                sample = key(self.seed, "replace", epoch, wanted, attempt) % size
            else:
                sample = self._at(epoch, (place + attempt) % size)
        gone = isinstance(bad.__cause__, FileNotFoundError)
        what = "the data is not where it was when the run started" if gone else "nearly all images are unreadable"
        raise UserError(f"{what}: {_ATTEMPTS} in a row could not be used, the last one {name}: {bad.reason}")

    def _pixels(
        self, epoch: int | str, sample: int
    ) -> tuple[list[tuple[ViewSpec, int, Draw]], tuple[int, int, int], np.ndarray]:
        try:
            item = self.source[sample]
        except (OSError, ValueError) as error:
            if (fault := of_the_machine(error)) is not None:
                raise UserError(fault) from error
            said = system_error(error) if isinstance(error, OSError) else str(error)
            raise BadImage(f"{type(error).__name__}: {said}") from error
        picture = Picture(item, self.channels)
        draws = []
        boxes_of: dict[str, list[Box]] = {}
        for spec in self.specs:
            for copy in range(spec.count):
                # A rendering of another view draws that view's numbers.
                rng = self._generator(self.seed, "view", epoch, sample, spec.of or spec.name, copy)
                beside = None
                if spec.overlap is not None:
                    others = boxes_of[spec.overlap[0]]
                    beside = others[min(copy, len(others) - 1)]
                drawn = draw(spec, rng, picture.height, picture.width, beside)
                boxes_of.setdefault(spec.name, []).append(drawn.box)
                draws.append((spec, copy, drawn))
        by = 1
        if self.fast and picture.shrinks:
            # as small as leaves every crop no smaller than its view
            least = min(min(d.box[2] / spec.size[0], d.box[3] / spec.size[1]) for spec, _, d in draws)
            by = max(by for by in SHRINKS if by == 1 or by <= least)
        boxes = [drawn.box if by == 1 else shrink(drawn.box, by) for _, _, drawn in draws]
        tops, lefts, heights, widths = zip(*boxes, strict=True)
        top, left = min(tops), min(lefts)
        bottom, right = max(map(add, tops, heights)), max(map(add, lefts, widths))
        pixels = picture.crop(top, left, bottom - top, right - left, self._scratch, fast=self.fast, by=by)
        return draws, (top, left, by), pixels


@final
class _Restarted:
    """`numpy_generator`, restarted in place: making a new one takes longer than all that a small view draws from it."""

    def __init__(self) -> None:
        self._generator = numpy_generator()
        self._start: dict[str, Any] = dict(self._generator.bit_generator.state)

    def __call__(self, *parts: Part) -> np.random.Generator:
        self._start["state"]["key"][0] = key(*parts)
        self._generator.bit_generator.state = self._start
        return self._generator


@final
class _Stream(_Maker):
    """The endless stream of epochs, each in an order of its own."""

    def _wanted(self, position: int) -> list[tuple[int | str, int, int]]:
        size, count = len(self.source), self.share.micro_size
        epochs, index = samples(position, count, size, self.seed)
        places = [p % size for p in range(position, position + count)]
        return list(zip(epochs.tolist(), index.tolist(), places, strict=True))

    def _at(self, epoch: int | str, place: int) -> int:
        return int(permute(np.array([place]), len(self.source), key(self.seed, "order", epoch))[0])


@final
class _Fixed(_Maker):
    """One pass in the source's own order, the same every time."""

    def _wanted(self, position: int) -> list[tuple[int | str, int, int]]:
        return [("fixed", place, place) for place in range(position, position + self.share.micro_size)]

    def _at(self, epoch: int | str, place: int) -> int:
        return place


def _made(maker: _Maker, numbers: range, workers: int, pin: bool, rows: int) -> Generator[RawBatch, None, None]:
    """`maker`'s micro-batches of `numbers`, in order, by that many workers; `rows` images in each."""
    workers = min(workers, len(numbers))
    if workers == 0:
        for number in numbers:
            raw = _or_raise(maker[number])
            yield raw.pin_memory() if pin else raw
        return
    _check_shared_memory(rows * sum(_bytes(spec, maker.channels) for spec in maker.specs), workers)
    with _quiet_start():
        loader = DataLoader(
            maker,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            worker_init_fn=partial(_settle_worker, os.getpid()),
            pin_memory=pin,
            generator=torch.Generator(),  # it draws a seed for its workers, which use none; not from the global state
            multiprocessing_context="fork",
        )
        ready = iter(loader)
    while True:
        try:
            prepared = next(ready)
        except StopIteration:
            return
        except RuntimeError as error:
            if _is_about_shared_memory(error):
                raise UserError(_SHARED_MEMORY_FULL) from error
            raise
        yield _or_raise(prepared)


def _bytes(spec: ViewSpec, channels: int) -> int:
    """Of a view of one image in a micro-batch."""
    if spec.stored is not None:
        return spec.stored.rows.row_bytes(spec.stored.field)
    return spec.count * spec.size[0] * spec.size[1] * channels


def _or_raise(prepared: RawBatch | _Mistake) -> RawBatch:
    if isinstance(prepared, _Mistake):
        raise UserError(prepared.message)
    return prepared


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Start workers without their ever running this process's signal handlers, and without advice on their number."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        with warnings.catch_warnings():
            # Python 3.12 on forking with threads about: the workers run none of theirs; torch on more workers than CPUs
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle_worker(parent: int, number: int) -> None:
    # DataLoader's own watch remembers whoever is the parent at that time, so a worker that comes to it after its parent
    # was killed would wait for ever. The kernel ends this one at once; what had happened before is asked.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)
    for each in _NOT_FOR_WORKERS:
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # torch's handler would print; the main process says it better
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOT_FOR_WORKERS)


_REMEDY = (
    "Use --workers 0, fewer workers, a smaller batch or a larger --accumulate, or give the machine more shared memory "
    "(docker run --shm-size 16g; mount -o remount,size=16g /dev/shm)"
)
_SHARED_MEMORY_FULL = f"the loader's workers ran out of shared memory ({_SHARED_MEMORY}). {_REMEDY}"


def _check_shared_memory(bytes_each: int, workers: int) -> None:
    """Raise UserError where the micro-batches under way at once (`bytes_each`) will not fit: a worker that finds out by
    itself dies of a bus error."""
    try:
        free = shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:  # no such place on this system; its workers do not go by it
        return
    needed = bytes_each * (workers * _PREFETCH + 1)
    if needed > free:
        raise UserError(
            f"{workers} workers need {needed / 2**20:.0f} MiB of shared memory, and {_SHARED_MEMORY} has "
            f"{free / 2**20:.0f} MiB free. {_REMEDY}"
        )


def _is_about_shared_memory(error: BaseException | None) -> bool:
    """Whether a RuntimeError of torch, or what it was raised from, says that /dev/shm is full."""
    while error is not None:
        text = str(error)
        if "Bus error" in text or "shared memory" in text or "No space left" in text:
            return True
        error = error.__cause__
    return False
