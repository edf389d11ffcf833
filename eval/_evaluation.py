"""One evaluation, from the options to results.json: the encoder, the data, the evaluator, the baselines."""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ssl_pretrain import backbones, distributed
from ssl_pretrain.data.decode import DEFAULT_MAX_PIXELS, BadImage, Picture, allow_pixels
from ssl_pretrain.data.source import Source, evaluation_splits, open_source, splits
from ssl_pretrain.distributed import environment
from ssl_pretrain.encoder import Encoder, Preprocessing, load, random_like
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import pixel_encoder
from ssl_pretrain.files import make_folder
from ssl_pretrain.foreign import libraries
from ssl_pretrain.foreign.specs import Spec

from ._results import record, write
from ._task import Data, Helped, Task

UNTRAINED, PIXELS = "random", "pixels"  # values of --encoder that are not paths


@dataclass(frozen=True, kw_only=True)
class Options:
    """The evaluation."""

    encoder: str
    """A run folder, an exported encoder, an encoder of another library (timm:NAME, hf:FOLDER, torch:FILE,
    module:PACKAGE:FUNCTION), or a baseline: random (untrained) or pixels."""
    code: str | None = None
    """Code that an exported encoder is made by, module:PACKAGE:FUNCTION. It must be the name in its config.json: nothing
    is imported because a file names it."""
    like: Path | None = None
    """With --encoder random: a run or an encoder with the architecture to use (default: vit_tiny at the images'
    size)."""
    protocol: str | None = None
    """Name of a published protocol: it sets the evaluator's flags that are not given (docs/evaluators.md)."""
    data: str | None = None
    """Labelled images: a folder, tar shards, parquet, or fractals (default: the encoder's training data)."""
    train_split: str | None = None
    """Split for training, or for the search of neighbours (default: train)."""
    test_split: str | None = None
    """Split for the test, or the only split of an evaluator without training (default: test, else val)."""
    out: Path | None = None
    """Folder for results.json (default: eval/EVALUATOR-DATA in the encoder's folder)."""
    baselines: bool = True
    """Also evaluate the untrained encoder and, for some evaluators, raw pixels."""
    max_pixels: int | None = None
    """Most pixels of an image; a larger one is taken for a decompression bomb (default: 178,956,970)."""
    batch_size: int = 256
    """Images per pass through the encoder."""
    workers: int | None = None
    """Number of processes that read images (default: the free CPU cores, at most 16)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the encoder (auto: a GPU if there is one)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder's arithmetic; features are float32."""
    cache: bool = True
    """Cache features on disk and reuse cached ones."""
    seed: int = 0
    """Seed of all randomness: the untrained encoder, the held-out images, the heads and their batches."""


def run(
    name: str,
    evaluator: Any,
    options: Options,
    config: Any,
    progress: Callable[[str], Callable[[str, int, int], None] | None],
) -> tuple[dict[str, Any], Path]:
    """Run an evaluator; returns the content of results.json, and its path. With several processes, the first one does
    this; the others help it to extract features, and return nothing.

    evaluator: a module of this package, or a plugin, with `evaluate(task, config) -> Outcome`. It may have BASELINES,
    and IMAGES: its kind of data if that is not labelled images for training and test. "test" and "everything" are a
    single set of images, labelled or not (the test split, or all images); "pair" is images for training and test
    without labels; "masks" is images with masks, opened by its `open_data(name, train_split, test_split, config) ->
    Data`. SHARED means that other processes can help the evaluator: in `Task.features` or `Task.single`, which raise
    `Helped` there, and with everything that it extracts before if `task.helps`. progress: gives the progress callback
    for an encoder, named by its baseline ("" for the evaluated encoder). Raises UserError for every error that the user
    can correct.
    """
    started = time.monotonic()
    if options.batch_size < 1 or (options.workers or 0) < 0:
        raise UserError("--batch-size must be at least 1 and --workers at least 0")
    if options.max_pixels is not None and options.max_pixels < 1:
        raise UserError(f"--max-pixels is {options.max_pixels}; it must be at least 1")
    allow_pixels(options.max_pixels or DEFAULT_MAX_PIXELS)  # that of one entry of a suite is not for the next
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU; use --device cpu")
    cuda = options.device != "cpu" and torch.cuda.is_available()
    place = environment.find()
    spare = (distributed.cores() - 1 if cuda else distributed.cores() // 2) // place.local_size
    if place.size > 1:
        if not getattr(evaluator, "SHARED", False):
            raise UserError(f"{name} runs in one process: leave --nproc, --nodes and --gpus-per-node at 1")
        if not options.cache:
            raise UserError("several processes share the extraction through the cache: do not use --no-cache")
        if not cuda and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, distributed.cores() // place.local_size))
    encoder, chosen = _open(options)
    images = getattr(evaluator, "IMAGES", None)
    if images == "masks":
        data = evaluator.open_data(chosen, options.train_split, options.test_split, config)
    elif images is None:
        data = Data.open(chosen, options.train_split, options.test_split)
    elif images == "pair":
        data = Data.pair(chosen, options.train_split, options.test_split)
    elif options.train_split:
        raise UserError(f"{name} takes a single set of images: name it with --test-split {options.train_split}")
    else:
        data = Data.single(chosen, options.test_split, everything=images == "everything")
    out = options.out or _default_out(options, f"{name}-{Path(chosen).name.split(':')[0]}")
    make_folder(out)

    task = Task(
        encoder=encoder,
        data=data,
        device=torch.device("cuda", place.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu"),
        seed=options.seed,
        batch_size=options.batch_size,
        workers=min(16, spare) if options.workers is None else options.workers,
        precision=options.precision,
        cache=options.cache,
        progress=progress(""),
        code=options.code,
        out=out,
    )
    if place.rank > 0:
        _help(evaluator, options, config, task)
        return {}, out
    outcome = evaluator.evaluate(task, config)
    baselines: dict[str, Any] = {}
    if options.baselines:
        for kind in getattr(evaluator, "BASELINES", ()):
            if options.encoder in (PIXELS, kind):
                continue
            other = _baseline(kind, task)
            found = evaluator.evaluate(
                dataclasses.replace(task, encoder=other, progress=progress(kind), out=None), config
            )
            scores = {
                key: value
                for key, value in found.metrics.items()
                if isinstance(value, float) or key.endswith("_interval")
            }
            baselines[kind] = {**scores, "headline": found.protocol["headline"]}
        if images is None:
            baselines["majority"] = data.majority(outcome.protocol)
    if options.protocol:
        theirs = type(config)(**evaluator.PROTOCOLS[options.protocol])
        changed = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if getattr(config, field.name) != getattr(theirs, field.name)
        }
        outcome.protocol.update(published=options.protocol, changed=changed)
        outcome.protocol["headline"] += f"; protocol {options.protocol}" + (" with changes" if changed else "")
    seconds = time.monotonic() - started
    result = record(name, outcome, baselines=baselines, encoder=_facts(options, encoder), seconds=seconds)
    try:
        return result, write(out, result)
    except OSError as problem:
        raise UserError(f"{out} cannot be written ({problem.strerror}): choose another folder with --out") from None


def _baseline(kind: str, task: Task) -> Encoder:
    """The encoder of a baseline."""
    if kind == UNTRAINED:
        return _untrained_like(task.encoder, task.seed)
    return _pixels(task.data.train.source, task.encoder.preprocessing.channels)


def _help(evaluator: Any, options: Options, config: Any, task: Task) -> None:
    """Help the evaluating process: extract with it the features that it requests first, for every encoder."""
    kinds = getattr(evaluator, "BASELINES", ()) if options.baselines else ()
    others = [_baseline(kind, task) for kind in kinds if options.encoder not in (PIXELS, kind)]
    for encoder in (task.encoder, *others):
        with contextlib.suppress(Helped):
            evaluator.evaluate(dataclasses.replace(task, encoder=encoder, helps=True, out=None, progress=None), config)


def _open(options: Options) -> tuple[Encoder, str]:
    """The encoder and the name of the data to evaluate it on."""
    if options.encoder == PIXELS:
        assert options.data is not None  # guaranteed by _check_paths
        return _pixels(_training_images(options, options.data)), options.data
    if options.encoder == UNTRAINED and options.like is None:
        assert options.data is not None
        return _untrained(_training_images(options, options.data), options.seed), options.data
    named = str(options.like or options.encoder)
    encoder = libraries.load(named) if Spec.parse(named) else load(named, code=options.code)
    data = options.data or encoder.lineage.get("data")
    if not data:
        raise UserError(f"the training data of {options.encoder} is not known: name labelled images with --data")
    if not options.data:
        try:
            splits(data)
        except UserError as problem:
            raise UserError(f"{problem} (the encoder's training data; name other data with --data)") from None
    return (_untrained_like(encoder, options.seed) if options.encoder == UNTRAINED else encoder), data


def _untrained_like(encoder: Encoder, seed: int) -> Encoder:
    """An untrained encoder of the same architecture and preprocessing."""
    like = libraries.untrained if isinstance(encoder.backbone, libraries.Foreign) else random_like
    return like(encoder, seed)


def _training_images(options: Options, data: str) -> Source:
    return open_source(data, options.train_split or evaluation_splits(data)[0])


def _pixels(source: Source, channels: int | None = None) -> Encoder:
    """The raw pixels of such images, used as an encoder."""
    height, width, channels = _shape(source, channels)
    return pixel_encoder((height, width), channels)


def _untrained(source: Source, seed: int) -> Encoder:
    """An untrained vit_tiny for such images. Small images keep their size, with patches of 4 or 8 pixels; larger ones
    have 224 pixels and patches of 16."""
    height, width, channels = _shape(source, None)
    side = min(height, width)
    patch = 4 if side <= 48 else 8 if side <= 96 else 16
    size = max(side // patch * patch, patch) if side <= 96 else 224
    backbone = backbones.build("vit_tiny", image_size=(size, size), in_chans=channels, patch_size=patch)
    preprocessing = Preprocessing.for_size((size, size), (0.5,) * channels, (0.25,) * channels)
    return random_like(Encoder(backbone, "vit_tiny", preprocessing, {}), seed)


def _shape(source: Source, channels: int | None) -> tuple[int, int, int]:
    """Height, width and channels of the first readable image; `channels` if they are given."""
    for i in range(len(source)):
        with contextlib.suppress(BadImage, OSError, ValueError):
            item = source[i]
            count = channels or (3 if isinstance(item, bytes) or item.ndim == 2 else item.shape[2])
            picture = Picture(item, count)
            return picture.height, picture.width, count
    raise UserError(f"no image of {source.description} can be read")


def _facts(options: Options, encoder: Encoder) -> dict[str, Any]:
    """Description of the encoder for results.json."""
    return {
        "path": options.encoder,
        **({"like": str(options.like)} if options.like else {}),
        "name": encoder.name,
        "image_size": list(encoder.backbone.image_size),
        **encoder.backbone.describe(),
        **encoder.lineage,
    }


def _default_out(options: Options, name: str) -> Path:
    """Default folder of a result: in the encoder's folder; for a baseline or another library's encoder in the current
    folder."""
    if options.encoder in (UNTRAINED, PIXELS):
        return Path(f"eval-{options.encoder}-{name}")
    if spec := Spec.parse(options.encoder):
        words = re.sub(r"[^\w.]+", "-", f"{spec.kind}-{Path(spec.name).name}")
        return Path(f"eval-{words}-{name}")
    return Path(options.encoder) / "eval" / name
