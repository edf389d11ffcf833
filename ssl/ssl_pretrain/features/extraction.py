"""Extracts features of a data set's images in one pass of a frozen encoder, and caches them for all evaluators.

Shapes: N images of the source, n of them readable, F floats a feature; B, H, W, C a batch of images in uint8.

A *tap* names a vector of an encoder: "cls", "mean" (of the patch tokens) or "pooled" (as the encoder defines it), of
the last block after the final norm; "cls@-4" and "mean@-4" are those of the fourth block from the end, also with the
final norm (as in DINOv2's and I-JEPA's linear evaluations).

The cache is the folder `features` under `files.cache_folder()`: a subfolder for each (encoder, images, preprocessing,
precision), with a .npy file for each tap. Everything in it may be deleted at any time. feature_cache.py lets several
processes fill it together and continues after a killed one.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..backbones.backbone import Backbone, Features
from ..data import decode as decoding
from ..data.decode import BadImage, decode
from ..data.source import Source
from ..data.subset import Subset
from ..data.views import resize_and_crop
from ..distributed import environment
from ..encoder import Encoder, Preprocessing
from ..errors import UserError, nearest, of_the_machine, system_error
from ..files import cache_folder, write_text
from .feature_cache import BLOCK, Bad, Pass, join
from .products import tf32

FORMAT = 1  # of the cache and of what a tap means; a cache of another format is not read
POOLINGS = ("pooled", "cls", "mean")
Precision = Literal["fp32", "bf16"]
Progress = Callable[[int, int], None]  # images done, images in all
PASSES = 4  # passes if other images are readable each time, before giving up
PAUSE = 0.1  # seconds between checks of other processes' work


class NotFinite(UserError):
    """The encoder gives NaN or infinity."""


@dataclass(frozen=True)
class Tap:
    """Names a vector of an encoder."""

    pooling: str  # one of POOLINGS
    block: int = -1  # from the end

    @classmethod
    def parse(cls, text: str) -> "Tap":
        """The tap of that name. Raises UserError for an invalid name."""
        match = re.fullmatch(r"(\w+)(?:@(-[1-9]\d*))?", text)
        if match is None or match[1] not in POOLINGS:
            raise UserError(
                f"unknown feature {text!r}{nearest(text, POOLINGS)} (cls@-4 is that of the fourth block from the end)"
            )
        tap = cls(match[1], int(match[2] or -1))
        if tap.pooling == "pooled" and tap.block != -1:
            raise UserError(
                f"feature {text!r}: 'pooled' is a vector of the last block; name cls@{tap.block} or mean@{tap.block}"
            )
        return tap

    def __str__(self) -> str:
        return self.pooling if self.block == -1 else f"{self.pooling}@{self.block}"


@dataclass(frozen=True)
class Extracted:
    """Features of the n readable images of a source, in its order."""

    features: dict[str, np.ndarray]  # by tap: (n, F) float32, memory-mapped and read-only if cached
    index: np.ndarray  # (n,) int64: which image of the source a row is of
    labels: np.ndarray | None  # (n,) int64, the source's
    bad: list[Bad]  # the images left out


def extract(
    encoder: Encoder,
    source: Source,
    taps: Sequence[str],
    *,
    batch_size: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    cache: bool = True,
    progress: Progress | None = None,
) -> Extracted:
    """Extract the features of every readable image of `source` at each of `taps`, with the encoder in eval mode on
    `device`.

    Images are decoded, resized and cropped by `encoder.preprocessing`, in `workers` processes (0: in this one), and
    pass the encoder once for all taps. With `cache`, only missing taps are computed, rows are written to the disk at
    once, and the result is memory-mapped, so memory does not grow with N. Without it everything is in memory. An image
    that cannot be read is left out and listed. Several processes that extract the same at the same time share the work,
    and the work of a killed process is continued, in blocks of images.

    Raises UserError where no image can be read, an unknown tap, one that the encoder does not have, or a cache that
    cannot be written where several processes share the work (one process goes on without it, with a warning); NotFinite
    where the encoder gives NaN or infinity. Either way nothing half-written stays.
    """
    wanted = {str(Tap.parse(text)): Tap.parse(text) for text in taps}
    encoder.to(device).eval()
    work = _Work(encoder, source, batch_size, workers, torch.device(device), precision, progress)
    stored = None
    if cache:
        try:
            stored = work.stored(_folder(encoder, source, precision), wanted)
        except _CacheUnwritable as problem:
            if environment.find().size > 1:
                raise UserError(f"{problem}: set SSL_PRETRAIN_CACHE to a folder with free space") from None
            warnings.warn(
                f"{problem}: features are kept in memory and not for the next time; set SSL_PRETRAIN_CACHE to a folder "
                f"with free space, or use --no-cache",
                stacklevel=2,
            )
    found, bad = stored or work.in_memory(list(wanted.values()))
    if len(bad) == len(source):
        raise UserError(f"none of the {len(bad)} images can be read; {bad[0].name}: {bad[0].reason}")
    readable = np.ones(len(source), bool)
    readable[[item.index for item in bad]] = False
    index = np.flatnonzero(readable)
    return Extracted(
        {name: found[name][: len(index)] for name in wanted},
        index,
        None if source.labels is None else np.asarray(source.labels)[index],
        bad,
    )


def vectors(encoder: Encoder, images: Tensor, taps: Sequence[Tap]) -> dict[str, Tensor]:
    """The encoder's vectors (B, F) float32 of normalised images (B, C, H, W), by tap. Raises UserError for a tap that
    the encoder does not have."""
    wanted = tuple(sorted({tap.block for tap in taps if tap.block != -1}))
    if wanted and -wanted[0] > blocks(encoder):
        raise UserError(f"this encoder gives features of its last {blocks(encoder)} block(s), not of {-wanted[0]}")
    features = encoder(images, blocks=wanted) if wanted else encoder(images)
    tokens = {}
    for block, output in zip(wanted, features.blocks, strict=True):
        # `norm`: the final norm of a backbone that supports "blocks"
        tokens[block] = cast(nn.Module, encoder.backbone.norm)(output)
    result = {}
    for tap in taps:
        if tap.pooling == "cls" and features.cls is None:
            raise UserError("this encoder has no CLS token: use --features pooled or mean, not cls")
        if tap.pooling == "pooled":
            vector = features.pooled
        elif tap.block == -1:
            vector = features.cls if tap.pooling == "cls" else features.patches.mean(1)
        else:
            output = tokens[tap.block]
            prefix = 0 if features.prefix is None else features.prefix.shape[1]
            vector = output[:, 0] if tap.pooling == "cls" else output[:, prefix:].mean(1)
        assert vector is not None
        result[str(tap)] = vector.float()
    return result


def blocks(encoder: Encoder) -> int:
    """Number of last blocks of which an encoder gives features; 1: only the last."""
    return encoder.backbone.depth if "blocks" in encoder.backbone.supports else 1


@torch.inference_mode()
def poolings(encoder: Encoder, device: torch.device | str) -> tuple[str, ...]:
    """The POOLINGS that the encoder's last block has: without "cls" if there is no CLS token."""
    height, width = encoder.preprocessing.crop
    blank = torch.zeros(1, encoder.preprocessing.channels, height, width, device=device)
    has_cls = encoder.to(device).eval()(blank).cls is not None
    return tuple(name for name in POOLINGS if has_cls or name != "cls")


@final
class Pixels(Backbone):
    """Raw pixels as a backbone: the image as one vector, which is `pooled` and the only patch."""

    supports = frozenset()

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def __init__(self, image_size: tuple[int, int], in_chans: int) -> None:
        super().__init__()
        self.config = self.Config()
        self.image_size, self.in_chans = image_size, in_chans
        self.dim, self.depth, self.stride = in_chans * image_size[0] * image_size[1], 1, image_size

    def forward(self, images: Tensor, **options: Any) -> Features:
        """The pixels of images (B, C, H, W). Raises UnsupportedByBackbone for any option."""
        self.require("the caller", *options)
        flat = images.flatten(1)
        return Features(cls=None, patches=flat[:, None], grid=(1, 1), pooled=flat)

    def layer_of(self, parameter: str) -> int:
        """Raises KeyError, because there are no parameters."""
        raise KeyError(parameter)


def pixel_encoder(image_size: tuple[int, int], channels: int) -> Encoder:
    """A baseline of raw pixels: images of about `image_size` (height, width), reduced to at most 32 x 32 pixels, with
    values (x - 0.5) / 0.25 for x in [0, 1]."""
    side = min(32, *image_size)
    preprocessing = Preprocessing.for_size((side, side), (0.5,) * channels, (0.25,) * channels)
    return Encoder(Pixels((side, side), channels), "pixels", preprocessing, {"method": "pixels"})


@dataclass(frozen=True)
class _Work:
    """One pass of the images through the encoder."""

    encoder: Encoder
    source: Source
    batch_size: int
    workers: int
    device: torch.device
    precision: Precision
    progress: Progress | None

    def in_memory(self, taps: list[Tap]) -> tuple[dict[str, np.ndarray], list[Bad]]:
        """Features by tap, (N, F), the rows of readable images first; and the bad images."""
        arrays = {name: np.empty((len(self.source), width), np.float32) for name, width in self._widths(taps).items()}
        bad: list[Bad] = []
        filled = done = 0
        for images, failures in crops_of(self.encoder.preprocessing, self.source, self.batch_size, self.workers):
            bad += failures
            done += len(images) + len(failures)
            self._give_up(done, bad)
            if len(images):
                for name, vector in self._encode(images, taps).items():
                    arrays[name][filled : filled + len(vector)] = vector
                filled += len(images)
            self._report(done)
        return arrays, bad

    def stored(self, folder: Path, wanted: Mapping[str, Tap]) -> tuple[dict[str, np.ndarray], list[Bad]]:
        """As `in_memory`, of the cache, which is filled before. Raises _CacheUnwritable."""
        with _cache_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for _ in range(PASSES):
            bad, found = _stored(folder, len(self.source), list(wanted))
            missing = [tap for name, tap in wanted.items() if name not in found]
            if not missing:
                return found, bad
            # If other images are readable than in the first pass, taps of that pass count as missing in the next one.
            self.on_disk(folder, missing)
        raise UserError(
            f"{self.source.description}: other images are readable in each pass: do not change them meanwhile, and repeat"
        )

    def on_disk(self, folder: Path, taps: list[Tap]) -> None:
        """Fill the cache with those taps, together with other processes that do the same; returns when it is
        complete."""
        widths = self._widths(taps)
        key = hashlib.blake2b(json.dumps(widths).encode(), digest_size=8).hexdigest()
        with _cache_errors(folder):
            job = join(folder, key, widths, len(self.source), lambda: self._is_cached(folder, taps))
        if job is None:
            return
        try:
            while not job.gone:
                self._fill(job, taps)
                if job.whole:
                    with _cache_errors(folder):
                        job.finish(lambda files, bad: self._put(folder, files, bad))
                else:
                    time.sleep(PAUSE)
                    self._report(job.finished)
        except (UserError, _CacheUnwritable):
            job.abandon()
            raise
        finally:
            job.leave()

    def _is_cached(self, folder: Path, taps: list[Tap]) -> bool:
        """Whether the cache has those taps."""
        return len(_stored(folder, len(self.source), list(map(str, taps)))[1]) == len(taps)

    def _fill(self, job: Pass, taps: list[Tap]) -> None:
        """Process all blocks that no other process has."""
        planned: deque[tuple[range, range]] = deque()  # a block, and the images of one of its batches

        def plan() -> Iterator[list[int]]:
            for block in job.claim():
                for start in range(block.start, block.stop, self.batch_size):
                    planned.append((block, range(start, min(start + self.batch_size, block.stop))))
                    yield list(planned[-1][1])

        bad: list[Bad] = []
        of_block = done = 0
        for images, failures in crops_of(
            self.encoder.preprocessing, self.source, self.batch_size, self.workers, batches=plan()
        ):
            block, rows = planned.popleft()
            bad += failures
            done += len(rows)
            self._give_up(done, bad)
            if len(images):
                failed = {one.index for one in failures}
                places = np.array([row for row in rows if row not in failed])
                for name, vector in self._encode(images, taps).items():
                    job.arrays[name][places] = vector
            if rows.stop == block.stop:
                with _cache_errors(job.folder.parent):
                    job.done(block, bad[of_block:])
                of_block = len(bad)
                self._report(job.finished)

    def _put(self, folder: Path, files: dict[str, Path], bad: list[Bad]) -> None:
        for name, path in files.items():
            os.replace(path, folder / _file(name, bad))
        what = {"images": self.source.description, "encoder": self.encoder.lineage, "bad": list(map(asdict, bad))}
        write_text(folder / "images.json", json.dumps(what, indent=1))

    @torch.inference_mode()
    def _widths(self, taps: list[Tap]) -> dict[str, int]:
        """Number of floats of each tap."""
        height, width = self.encoder.preprocessing.crop
        blank = torch.zeros(1, self.encoder.preprocessing.channels, height, width, device=self.device)
        return {name: vector.shape[1] for name, vector in vectors(self.encoder, blank, taps).items()}

    def _give_up(self, done: int, bad: list[Bad]) -> None:
        """Raise UserError if no image of a block can be read."""
        if len(bad) == done and done >= min(BLOCK, len(self.source)):
            raise UserError(f"none of the first {done} images can be read; {bad[0].name}: {bad[0].reason}")

    def _report(self, done: int) -> None:
        if self.progress:
            self.progress(done, len(self.source))

    @torch.inference_mode()
    def _encode(self, images: np.ndarray, taps: list[Tap]) -> dict[str, np.ndarray]:
        """The vectors (B, F) of uint8 images (B, H, W, C), by tap."""
        pixels = torch.from_numpy(images).to(self.device)
        with tf32(self.device), torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = vectors(self.encoder, self.encoder.normalise(pixels), taps)
        for name, vector in found.items():
            if not vector.isfinite().all():
                raise NotFinite(
                    f"the encoder gives NaN or infinity for images of {self.source.description} (feature {name}): its "
                    f"training diverged, or --precision bf16 is too coarse for it"
                )
        return {name: vector.cpu().numpy() for name, vector in found.items()}


# ---- Reading the images.


_MACHINE = -1  # in the place of an image's number: no image is to blame


class _Images(Dataset):
    """Images of a source as uint8 (H, W, C), or the reason why one is missing."""

    def __init__(self, source: Source, preprocessing: Preprocessing) -> None:
        self.source, self.how = source, preprocessing

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> np.ndarray | Bad:
        try:
            pixels = decode(self.source[i], self.how.channels)
        except (BadImage, OSError, ValueError) as problem:
            if (fault := of_the_machine(problem)) is not None:
                return Bad(
                    _MACHINE, "", fault
                )  # raised in the main process: out of a worker it would come with a traceback
            said = system_error(problem) if isinstance(problem, OSError) else str(problem)
            return Bad(i, self.source.name(i), said)
        return resize_and_crop(pixels, self.how.resize, self.how.crop, self.how.interpolation)


def _collate(items: list[np.ndarray | Bad]) -> tuple[np.ndarray, list[Bad]]:
    # Arrays, not tensors: tensors use shared memory, of which containers often have very little.
    images = [item for item in items if not isinstance(item, Bad)]
    bad = [item for item in items if isinstance(item, Bad)]
    return np.stack(images) if images else np.empty((0,), np.uint8), bad


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C


def crops_of(
    preprocessing: Preprocessing,
    source: Source,
    batch_size: int,
    workers: int,
    *,
    batches: Iterable[list[int]] | None = None,
) -> Iterator[tuple[np.ndarray, list[Bad]]]:
    """The source's images in order, or those of `batches`, uint8 (B, H, W, C), and those that could not be read."""
    how: dict[str, Any] = {"batch_size": batch_size} if batches is None else {"batch_sampler": batches}
    with warnings.catch_warnings():
        # Python 3.12 warns about forking with threads, which the workers do not use; torch about more workers than CPUs
        warnings.simplefilter("ignore")
        loader = iter(
            DataLoader(
                _Images(source, preprocessing),
                **how,
                num_workers=workers,
                collate_fn=_collate,
                worker_init_fn=_begin_worker,
                generator=torch.Generator(),  # for its workers' unused seed: keeps the global state
                multiprocessing_context="fork" if workers else None,
            )
        )
    for images, bad in loader:
        for fault in (one for one in bad if one.index == _MACHINE):
            raise UserError(fault.reason)
        yield images, bad


# ---- The cache.


def _folder(encoder: Encoder, source: Source, precision: Precision) -> Path:
    """The cache folder for features of these images by this encoder."""
    what: list[Any] = [FORMAT, encoder.fingerprint, _identity(source), asdict(encoder.preprocessing), precision]
    if decoding.MAX_PIXELS != decoding.DEFAULT_MAX_PIXELS:  # it decides which images are bad
        what.append(decoding.MAX_PIXELS)
    key = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()
    return cache_folder() / "features" / key


def _identity(source: Source) -> list[str]:
    if isinstance(source, Subset):
        return [
            *_identity(source.source),
            hashlib.blake2b(source.indices.astype(np.int64).tobytes(), digest_size=16).hexdigest(),
        ]
    return [source.fingerprint, str(len(source))]


def _file(tap: str, bad: list[Bad]) -> str:
    """A tap's file. Its name depends on the images that were left out, so rows of different passes are never mixed."""
    left_out = json.dumps([item.index for item in bad]).encode()
    return f"{tap}.{hashlib.blake2b(left_out, digest_size=4).hexdigest()}.npy"


def _stored(folder: Path, count: int, names: list[str]) -> tuple[list[Bad], dict[str, np.ndarray]]:
    """The cached taps: the images left out, and arrays (N, F). A damaged file counts as missing."""
    try:
        record = json.loads((folder / "images.json").read_text())
        bad = [Bad(**item) for item in record["bad"]]
    except (OSError, ValueError, KeyError, TypeError):
        return [], {}
    found = {}
    for name in names:
        with contextlib.suppress(OSError, ValueError, EOFError):
            array = np.load(folder / _file(name, bad), mmap_mode="r", allow_pickle=False)
            if array.ndim == 2 and len(array) == count and array.dtype == np.float32:
                found[name] = array
    return bad, found


class _CacheUnwritable(Exception):
    """The cache of features cannot be written, and why."""


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """Errors of the system in here are about the cache: raised as _CacheUnwritable."""
    try:
        yield
    except OSError as problem:
        raise _CacheUnwritable(f"the feature cache {folder.parent} cannot be written ({problem.strerror})") from None
