"""Images per core-second through the loader, against the torchvision-PIL pipeline and a bare decode.

    python benchmarks/loader.py [--data FOLDER|SHARDS] [--seconds 20]

The view is MAE's: a random crop of 20-100 % of the area, bicubic to 224 x 224, flipped half the time, written into
the batch. All rows run in one process on one thread, taking turns batch by batch over the same images in memory, and
are compared by CPU time, so that a busy machine slows all of them alike.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssl_pretrain.data import decode
from ssl_pretrain.data.loader import Share, batches
from ssl_pretrain.data.source import Source, open_source
from ssl_pretrain.data.views import ViewSpec

NATURAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "natural"
BATCH = 64
SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEW = ViewSpec(name="image", size=(SIZE, SIZE), scale=(0.2, 1.0))

Row = Callable[[int], None]  # makes one batch, of that number


class InMemory(Source):
    """The encoded images of another source, read beforehand."""

    def __init__(self, source: Source, most: int = 2048) -> None:
        self.items = [source[i] for i in range(min(most, len(source)))]
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


def peer() -> tuple[str, Callable[[Image.Image], torch.Tensor]]:
    """The pipeline to beat, and what it is: torchvision's, or where that is absent the same steps with Pillow."""
    try:
        if not hasattr(torch.ops.torchvision, "nms"):
            # torchvision on a CPU build of torch wants its operators declared
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision import transforms
    except ImportError:
        return "the same steps with Pillow (torchvision is not installed)", with_pillow
    steps = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return "torchvision-PIL pipeline", steps


def with_pillow(image: Image.Image) -> torch.Tensor:
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
    return pixels.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))


def rows(source: InMemory) -> dict[str, Row]:
    """What is measured, by name; the first is what the others are compared with."""
    name, transform = peer()
    fast = decode.simplejpeg

    def pipeline(number: int) -> None:
        torch.stack([transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in source.encoded(number)])

    def bare_pillow(number: int) -> None:
        for file in source.encoded(number):
            np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))

    def bare_simplejpeg(number: int) -> None:
        for file in source.encoded(number):
            fast.decode_jpeg(file)

    def ours(number: int, module: object) -> None:
        decode.simplejpeg = module
        try:
            steps = {"start_step": number, "stop_step": number + 1}
            for _ in batches(source, [VIEW], Share(BATCH), seed=0, channels=3, workers=0, policy="replace", **steps):
                pass
        finally:
            decode.simplejpeg = fast

    table: dict[str, Row] = {name: pipeline, "bare decode, Pillow": bare_pillow}
    table["our loader, Pillow"] = lambda number: ours(number, None)
    if fast is not None:
        if all(isinstance(item, bytes) and fast.is_jpeg(item) for item in source.items):
            table["bare decode, simplejpeg"] = bare_simplejpeg
        table["our loader, simplejpeg"] = lambda number: ours(number, fast)
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
    parser.add_argument(
        "--data", default=str(NATURAL), help="a folder of images, tar shards or parquet (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure (default: %(default)s)")
    options = parser.parse_args()
    if options.data == str(NATURAL) and not NATURAL.exists():
        sys.exit(f"{NATURAL} is not there; name images with --data")
    torch.set_num_threads(1)
    source = InMemory(open_source(options.data, None))
    taken = measure(rows(source), options.seconds)
    base = next(iter(taken.values()))
    print(
        f"{len(source)} images of {options.data}, batches of {BATCH}, {len(base)} rounds, torch {torch.__version__}\n"
    )
    print(f"{'':<52}{'images/s a core':>16}{'times':>8}")
    for name, each in taken.items():
        # a ratio a round, for the rounds differ by what else the machine does
        times = statistics.median(b / e for b, e in zip(base, each, strict=True))
        print(f"{name:<52}{1 / statistics.median(each):>16.0f}{times:>8.2f}")


if __name__ == "__main__":
    main()
