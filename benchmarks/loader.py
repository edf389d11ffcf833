"""Images per core-second of the loader, compared with other pipelines and bare decoding.

    python benchmarks/loader.py [--views mae|simclr|dino] [--data FOLDER|SHARDS] [--seconds 20]

mae: a random crop of 20-100 % of the area, bicubic to 224 x 224, flipped with probability 0.5. simclr: two crops with
SimCLR's colours and blur. dino: two crops and eight of 96 pixels with DINO's (lightly's own transform makes six). The
time is that of an image from its bytes to its normalised float32 views in a batch. All rows run in one process on one
thread and alternate batch by batch over the same images in memory. They are compared by CPU time, so a busy machine
slows all equally.
"""

import argparse
import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ssl_pretrain import pretext
from ssl_pretrain.data import decode
from ssl_pretrain.data.loader import Share, batches, to_batch
from ssl_pretrain.data.source import Source, open_source
from ssl_pretrain.data.views import ViewSpec

NATURAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "natural"
BATCH = 64
SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS = ("mae", "simclr", "dino")

Row = Callable[[int], None]  # makes one batch, of that number


class InMemory(Source):
    """The images of another source, read beforehand; `packed`: decoded, too."""

    def __init__(self, source: Source, most: int = 2048, packed: bool = False) -> None:
        self.items: list[Any] = [source[i] for i in range(min(most, len(source)))]
        if packed:  # as `ssl-data pack` keeps them
            self.items = [decode.decode(item, 3) for item in self.items]
        self.labels, self.classes = None, None
        self.fingerprint, self.description = source.fingerprint, source.description

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        return self.items[index]

    def name(self, index: int) -> str:
        return str(index)

    def encoded(self, number: int) -> list[bytes]:
        """The files of one batch."""
        return [self.items[(number * BATCH + i) % len(self.items)] for i in range(BATCH)]


Transform = Callable[[Image.Image], list[torch.Tensor]]  # a picture to its views


def peers(views: str) -> dict[str, Transform]:
    """The pipelines to beat: torchvision's (where that is absent the same steps with Pillow), and lightly's where it is
    installed and has these views."""
    if not hasattr(torch.ops.torchvision, "nms"):
        # torchvision on a CPU build of torch wants its operators declared
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)
    found: dict[str, Transform] = {}
    with contextlib.suppress(ImportError):
        found["torchvision-PIL pipeline"] = with_torchvision(views)
    if not found and views == "mae":
        found["the same steps with Pillow (torchvision is not installed)"] = with_pillow
    if views != "mae":
        with contextlib.suppress(ImportError):
            from lightly import transforms

            theirs = (
                transforms.SimCLRTransform(SIZE)
                if views == "simclr"
                else transforms.DINOTransform(SIZE, local_crop_size=96)
            )
            found["lightly" + (" (2 + 6 crops)" if views == "dino" else "")] = theirs
    if not found:
        sys.exit(f"--views {views} is compared with torchvision or lightly: install one of them")
    return found


KEPT: list[torch.library.Library] = []  # what is declared is gone with its library


def with_torchvision(views: str) -> Transform:
    """The views as torchvision's transforms make them of Pillow images."""
    from torchvision import transforms as t

    bicubic = t.InterpolationMode.BICUBIC
    finish = [t.ToTensor(), t.Normalize(MEAN, STD)]
    if views == "mae":
        steps = [t.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=bicubic), t.RandomHorizontalFlip(), *finish]
        whole = t.Compose(steps)
        return lambda image: [whole(image)]

    def one(
        size: int, scale: tuple[float, float], strength: float, hue: float, blur: float, solarize: float
    ) -> Callable:
        jitter = t.ColorJitter(0.8 * strength, 0.8 * strength, (0.8 if views == "simclr" else 0.4) * strength, hue)
        steps = [
            t.RandomResizedCrop(size, scale, interpolation=bicubic), t.RandomHorizontalFlip(),
            t.RandomApply([jitter], 0.8), t.RandomGrayscale(0.2), t.RandomApply([t.GaussianBlur(size // 20 * 2 + 1)], blur),
            t.RandomSolarize(128, solarize), *finish,
        ]  # fmt: skip
        return t.Compose(steps)

    if views == "simclr":
        both = one(SIZE, (0.08, 1.0), 1.0, 0.2, 0.5, 0.0)
        return lambda image: [both(image) for _ in range(2)]
    crops = [one(SIZE, (0.25, 1.0), 0.5, 0.1, 1.0, 0.0), one(SIZE, (0.25, 1.0), 0.5, 0.1, 0.1, 0.2)]
    crops += [one(96, (0.05, 0.25), 0.5, 0.1, 0.5, 0.0)] * 8
    return lambda image: [crop(image) for crop in crops]


def with_pillow(image: Image.Image) -> list[torch.Tensor]:
    """Crop, resize, flip, to float and normalise, as torchvision's transforms do it on Pillow images."""
    rng = np.random.default_rng(int.from_bytes(image.tobytes()[:8], "little"))
    area = image.width * image.height * rng.uniform(0.2, 1.0)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    width, height = min(image.width, round((area * ratio) ** 0.5)), min(image.height, round((area / ratio) ** 0.5))
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    crop = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous().float().div(255)
    return [pixels.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))]


def declared(views: str, fast: bool) -> list[ViewSpec]:
    """What the method of that name wants to see, with its own defaults."""
    method = pretext.load(views)
    return [replace(spec, fast=fast) for spec in method.views(method.Config(), (SIZE, SIZE))]


def rows(source: InMemory, views: str) -> dict[str, Row]:
    """What is measured, by name; the first is what the others are compared with."""
    simplejpeg = decode.simplejpeg
    table: dict[str, Row] = {}

    def pipeline(transform: Transform) -> Row:
        def row(number: int) -> None:
            made = [transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in source.encoded(number)]
            for view in zip(*made, strict=True):
                torch.stack(view)

        return row

    def bare_pillow(number: int) -> None:
        for file in source.encoded(number):
            np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))

    def bare_simplejpeg(number: int) -> None:
        for file in source.encoded(number):
            simplejpeg.decode_jpeg(file)

    pixels = InMemory(source, packed=True)

    def ours(module: object, fast: bool, to_float: bool = True, source: InMemory = source) -> Row:
        specs = declared(views, fast)

        def row(number: int) -> None:
            decode.simplejpeg = module
            try:
                steps: Any = {"start_step": number, "stop_step": number + 1}
                stream = batches(source, specs, Share(BATCH), seed=0, channels=3, workers=0, policy="replace", **steps)
                for raw in stream:
                    if to_float:
                        to_batch(raw, specs, MEAN, STD, torch.device("cpu"))
            finally:
                decode.simplejpeg = simplejpeg

        return row

    for name, transform in peers(views).items():
        table[name] = pipeline(transform)
    table["bare decode, Pillow"] = bare_pillow
    # Without colours to change, workers hand over uint8; whoever trains makes float32 of it, on a GPU for next to nothing.
    kinds = ((" to uint8", False), (" to float32", True)) if views == "mae" else ((" to float32", True),)
    for kind, to_float in kinds:
        table[f"our loader{kind}, Pillow"] = ours(None, False, to_float)
        if simplejpeg is not None:
            table[f"our loader{kind}, simplejpeg"] = ours(simplejpeg, False, to_float)
            table[f"our loader{kind}, simplejpeg, --aug fast"] = ours(simplejpeg, True, to_float)
        table[f"our loader{kind}, packed pixels"] = ours(simplejpeg, False, to_float, pixels)
        table[f"our loader{kind}, packed pixels, --aug fast"] = ours(simplejpeg, True, to_float, pixels)
    if simplejpeg is not None and all(isinstance(item, bytes) and simplejpeg.is_jpeg(item) for item in source.items):
        table["bare decode, simplejpeg"] = bare_simplejpeg
    return table


def measure(table: dict[str, Row], seconds: float) -> dict[str, list[float]]:
    """CPU seconds an image of every row, once a round, for about that many seconds of rounds."""
    taken: dict[str, list[float]] = {name: [] for name in table}
    for row in table.values():
        row(0)
    begin, number = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds or number < 3:
        number += 1
        for name, row in table.items():
            start = time.process_time()
            row(number)
            taken[name].append((time.process_time() - start) / BATCH)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", choices=VIEWS, default="mae", help="(default: %(default)s)")
    parser.add_argument(
        "--data", default=str(NATURAL), help="a folder of images, tar shards or parquet (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure (default: %(default)s)")
    options = parser.parse_args()
    if options.data == str(NATURAL) and not NATURAL.exists():
        sys.exit(f"{NATURAL} is not there; name images with --data")
    torch.set_num_threads(1)
    source = InMemory(open_source(options.data, None))
    taken = measure(rows(source, options.views), options.seconds)
    base = next(iter(taken.values()))
    print(f"{len(source)} images of {options.data}, views of {options.views}, batches of {BATCH}")
    print(f"{len(base)} rounds, torch {torch.__version__}\n")
    print(f"{'':<52}{'images/s a core':>16}{'times':>8}")
    for name, each in taken.items():
        # a ratio a round, for the rounds differ by what else the machine does
        times = statistics.median(b / e for b, e in zip(base, each, strict=True))
        print(f"{name:<52}{1 / statistics.median(each):>16.0f}{times:>8.2f}")


if __name__ == "__main__":
    main()
