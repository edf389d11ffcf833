"""Features of a data set's images: one pass of a frozen encoder, kept in a cache that every evaluator reads.

Shapes: N images of the source, n of them readable, F floats a feature; B, H, W, C a batch of images in uint8.

A *tap* says which vector of an encoder: "cls", "mean" (of the patch tokens) or "pooled" (as the encoder defines it), of
the last block after the final norm; "cls@-4" and "mean@-4" are those of the fourth block from the end, with the final
norm applied to it too (as DINOv2's and I-JEPA's linear evaluations do).

The cache is the folder `features` under `data.index.directory()`: a subfolder for each (encoder, images, preprocessing,
precision), in it a .npy file for each tap. Anything in it may be deleted at any time. How several processes fill it, and go
on where a killed one stopped, is feature_cache.py's matter.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..backbones.backbone import Backbone, Features
from ..data.decode import BadImage, decode
from ..data.index import directory
from ..data.source import Source
from ..data.subset import Subset
from ..data.views import resize_and_crop
from ..encoder import Encoder, Preprocessing
from ..errors import UserError, nearest
from ..files import write_text
from .feature_cache import BLOCK, Bad, Pass, join

FORMAT = 1  # of the cache and of what a tap means; a cache of another format is not read
POOLINGS = ("pooled", "cls", "mean")
Precision = Literal["fp32", "bf16"]
Progress = Callable[[int, int], None]  # images done, images in all
PASSES = 4  # over images of which others can be read each time, before it is given up
PAUSE = 0.1  # seconds between looks at what other processes have done


class NotFinite(UserError):
    """The encoder gives NaN or infinity."""


@dataclass(frozen=True)
class Tap:
    """Which vector of an encoder."""

    pooling: str  # one of POOLINGS
    block: int = -1  # from the end

    @classmethod
    def parse(cls, text: str) -> "Tap":
        """The tap of that name. Raises UserError for what is none."""
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

    features: dict[str, np.ndarray]  # by tap: (n, F) float32, memory-mapped and read-only where cached
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
    """The features of every readable image of `source` at each of `taps`, of the encoder in eval mode on `device`.

    Images are decoded, resized and cropped as `encoder.preprocessing` says, in `workers` processes (0: in this one),
    and come to the encoder once however many taps there are. With `cache`, only taps that are not there yet are
    computed, rows go to the disk as they come, and what is returned is memory-mapped: memory does not grow with N.
    Without it everything is in memory. An image that cannot be read is left out and listed. Several processes that ask
    for the same at once share the work, and one that was killed is gone on with, block of images by block.

    Raises UserError where no image can be read, an unknown tap, one that the encoder does not have, or a cache that
    cannot be written; NotFinite where the encoder gives NaN or infinity. Either way nothing half-written stays.
    """
    wanted = {str(Tap.parse(text)): Tap.parse(text) for text in taps}
    encoder.to(device).eval()
    work = _Work(encoder, source, batch_size, workers, torch.device(device), precision, progress)
    if cache:
        folder = _folder(encoder, source, precision)
        with _cache_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for _ in range(PASSES):
            bad, found = _stored(folder, len(source), list(wanted))
            missing = [tap for name, tap in wanted.items() if name not in found]
            if not missing:
                break
            # Where others can be read than when the rest was computed, that counts as missing the next time around.
            work.on_disk(folder, missing)
        else:
            raise UserError(
                f"{source.description}: other images can be read at each try: see that they stay, and repeat"
            )
    else:
        found, bad = work.in_memory(list(wanted.values()))
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
        # `norm`: what a backbone that supports "blocks" has after the last of them
        tokens[block] = cast(nn.Module, encoder.backbone.norm)(output)
    result = {}
    for tap in taps:
        if tap.pooling == "cls" and features.cls is None:
            raise UserError("this encoder has no CLS token: --features pooled or mean, not cls")
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
    """Of how many of its last blocks an encoder gives features; 1: of the last only."""
    return encoder.backbone.depth if "blocks" in encoder.backbone.supports else 1


@torch.inference_mode()
def poolings(encoder: Encoder, device: torch.device | str) -> tuple[str, ...]:
    """Which of POOLINGS the encoder's last block has: not "cls" where there is no CLS token."""
    height, width = encoder.preprocessing.crop
    blank = torch.zeros(1, encoder.preprocessing.channels, height, width, device=device)
    has_cls = encoder.to(device).eval()(blank).cls is not None
    return tuple(name for name in POOLINGS if has_cls or name != "cls")


@final
class Pixels(Backbone):
    """Raw pixels in the place of a backbone: the image as one vector, which is `pooled` and the only patch."""

    supports = frozenset()

    @dataclass(frozen=True)
    class Config:
        """Nothing to choose."""

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
        """There are no parameters: raises KeyError."""
        raise KeyError(parameter)


def pixel_encoder(image_size: tuple[int, int], channels: int) -> Encoder:
    """The baseline that any encoder must beat: images of about `image_size` (height, width), shrunk to at most 32 x 32
    pixels, values in [0, 1] minus 0.5 over 0.25."""
    side = min(32, *image_size)
    preprocessing = Preprocessing.for_size((side, side), (0.5,) * channels, (0.25,) * channels)
    return Encoder(Pixels((side, side), channels), "pixels", preprocessing, {"method": "pixels"})


@dataclass(frozen=True)
class _Work:
    """A way of the images through the encoder."""

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

    def on_disk(self, folder: Path, taps: list[Tap]) -> None:
        """Fill the cache with those taps, together with whoever else does; returns when they are there."""
        widths = self._widths(taps)
        key = hashlib.blake2b(json.dumps(widths).encode(), digest_size=8).hexdigest()
        with _cache_errors(folder):
            job = join(folder, key, widths, len(self.source), lambda: self._there(folder, taps))
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
        except UserError:
            job.abandon()
            raise
        finally:
            job.leave()

    def _there(self, folder: Path, taps: list[Tap]) -> bool:
        """Whether the cache has those taps."""
        return len(_stored(folder, len(self.source), list(map(str, taps)))[1]) == len(taps)

    def _fill(self, job: Pass, taps: list[Tap]) -> None:
        """All blocks that nobody else has."""
        planned: deque[tuple[range, range]] = deque()  # a block, and the images of a batch of it

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
        """How many floats each tap has."""
        height, width = self.encoder.preprocessing.crop
        blank = torch.zeros(1, self.encoder.preprocessing.channels, height, width, device=self.device)
        return {name: vector.shape[1] for name, vector in vectors(self.encoder, blank, taps).items()}

    def _give_up(self, done: int, bad: list[Bad]) -> None:
        """Raise UserError where not one image of a block can be read."""
        if len(bad) == done and done >= min(BLOCK, len(self.source)):
            raise UserError(f"none of the first {done} images can be read; {bad[0].name}: {bad[0].reason}")

    def _report(self, done: int) -> None:
        if self.progress:
            self.progress(done, len(self.source))

    @torch.inference_mode()
    def _encode(self, images: np.ndarray, taps: list[Tap]) -> dict[str, np.ndarray]:
        """The vectors (B, F) of uint8 images (B, H, W, C), by tap."""
        pixels = torch.from_numpy(images).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            found = vectors(self.encoder, self.encoder.normalise(pixels), taps)
        for name, vector in found.items():
            if not vector.isfinite().all():
                raise NotFinite(
                    f"the encoder gives NaN or infinity for images of {self.source.description} (feature {name}): its "
                    f"training diverged, or --precision bf16 is too coarse for it"
                )
        return {name: vector.cpu().numpy() for name, vector in found.items()}


# ---- Reading the images.


class _Images(Dataset):
    """Images of a source as uint8 (H, W, C), or why there is none."""

    def __init__(self, source: Source, preprocessing: Preprocessing) -> None:
        self.source, self.how = source, preprocessing

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> np.ndarray | Bad:
        try:
            pixels = decode(self.source[i], self.how.channels)
        except (BadImage, OSError, ValueError) as problem:
            return Bad(i, self.source.name(i), str(problem))
        return resize_and_crop(pixels, self.how.resize, self.how.crop, self.how.interpolation)


def _collate(items: list[np.ndarray | Bad]) -> tuple[np.ndarray, list[Bad]]:
    # Arrays, not tensors: those would come through shared memory, of which containers often have next to none.
    images = [item for item in items if not isinstance(item, Bad)]
    bad = [item for item in items if isinstance(item, Bad)]
    return np.stack(images) if images else np.empty((0,), np.uint8), bad


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer


def crops_of(
    preprocessing: Preprocessing,
    source: Source,
    batch_size: int,
    workers: int,
    *,
    batches: Iterable[list[int]] | None = None,
) -> Iterator[tuple[np.ndarray, list[Bad]]]:
    """The source's images in order, or those of `batches`, uint8 (B, H, W, C), and what could not be read between them."""
    how: dict[str, Any] = {"batch_size": batch_size} if batches is None else {"batch_sampler": batches}
    with warnings.catch_warnings():
        # Python 3.12 on forking with threads about: the workers run none of theirs; torch on more workers than CPUs
        warnings.simplefilter("ignore")
        return iter(
            DataLoader(
                _Images(source, preprocessing),
                **how,
                num_workers=workers,
                collate_fn=_collate,
                worker_init_fn=_begin_worker,
                generator=torch.Generator(),  # it draws a seed for its workers, which use none; not the global state
                multiprocessing_context="fork" if workers else None,
            )
        )


# ---- The cache.


def _folder(encoder: Encoder, source: Source, precision: Precision) -> Path:
    """Where features of these images by this encoder are kept."""
    what = [FORMAT, encoder.fingerprint, _identity(source), asdict(encoder.preprocessing), precision]
    key = hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()
    return directory() / "features" / key


def _identity(source: Source) -> list[str]:
    if isinstance(source, Subset):
        return [
            *_identity(source.source),
            hashlib.blake2b(source.indices.astype(np.int64).tobytes(), digest_size=16).hexdigest(),
        ]
    return [source.fingerprint, str(len(source))]


def _file(tap: str, bad: list[Bad]) -> str:
    """A tap's file. Its name says which images were left out, so that rows of two passes are never mixed up."""
    left_out = json.dumps([item.index for item in bad]).encode()
    return f"{tap}.{hashlib.blake2b(left_out, digest_size=4).hexdigest()}.npy"


def _stored(folder: Path, count: int, names: list[str]) -> tuple[list[Bad], dict[str, np.ndarray]]:
    """What the cache has of these taps: the images left out, and arrays (N, F). A damaged file is as good as none."""
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


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """Errors of the system in here are about the cache: raised as UserError."""
    try:
        yield
    except OSError as problem:
        raise UserError(
            f"the feature cache {folder.parent} cannot be written ({problem.strerror}): set SSL_PRETRAIN_CACHE to a "
            f"folder with room, or do without (--no-cache)"
        ) from None
