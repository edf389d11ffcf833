"""Memory of feature extraction and of kNN for growing numbers of images: its growth, and the estimate for 1.3 million.

    python benchmarks/memory.py [--rows knn extract] [--sizes 50000 100000 200000] [--dim 1024] [--images 1.3e6]

knn: 2,000 queries among features of --dim floats in a .npy file, as in the cache. extract: features of images of 32
pixels by a vit_micro into the cache (CIFAR-10, repeated if there are not enough). Each runs in its own process, which
measures its private memory (RssAnon: pages of mapped files can be reclaimed at any time and do not count) and prints
the peak above the value at the start. A constant and a growing part are fitted to the sizes; they give the peak at
--images.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

CIFAR = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10"
SIZES = {"knn": [50_000, 100_000, 200_000], "extract": [20_000, 40_000, 80_000]}
QUERIES = 2000


def own() -> int:
    """Bytes of memory that belong to this process alone."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])


@contextmanager
def watched() -> Iterator[list[int]]:
    """The peak of `own` inside, beyond what it was at the start, is the list's only element afterwards."""
    before, peak, over = own(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            peak[0] = max(peak[0], own() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def knn(count: int, dim: int, folder: Path) -> int:
    """Peak bytes of a search."""
    from ssl_pretrain.features.neighbours import nearest

    file = folder / "bank.npy"
    bank = np.lib.format.open_memmap(file, "w+", np.float32, (count, dim))
    generator = np.random.default_rng(0)
    for start in range(0, count, 5000):
        bank[start : start + 5000] = generator.standard_normal((min(5000, count - start), dim), np.float32)
    bank.flush()
    del bank
    queries = generator.standard_normal((QUERIES, dim), np.float32)
    nearest(queries[:10], np.load(file, mmap_mode="r")[:100], 5)  # what a first call sets up
    with watched() as peak:
        nearest(queries, np.load(file, mmap_mode="r"), 20)
    return peak[0]


def extract(count: int, dim: int, folder: Path) -> int:
    """Peak bytes of an extraction into the cache."""
    os.environ["SSL_PRETRAIN_CACHE"] = str(folder)
    import torch

    from ssl_pretrain import backbones, features
    from ssl_pretrain.data.source import open_source
    from ssl_pretrain.data.subset import Subset
    from ssl_pretrain.encoder import Encoder, Preprocessing

    torch.manual_seed(0)
    backbone = backbones.build("vit_micro", image_size=(32, 32), **{**backbones.defaults("vit_micro"), "patch_size": 8})
    how = Preprocessing.for_size((32, 32), (0.5,) * 3, (0.25,) * 3)
    encoder = Encoder(backbone, "vit_micro", how, {"method": "random"}).eval()
    source = open_source(str(CIFAR), "train")
    indices = np.arange(count) % len(source)
    features.extract(encoder, Subset(source, indices[:300]), ["cls"], cache=False)
    with watched() as peak:
        features.extract(encoder, Subset(source, indices), ["cls", "mean"])
    return peak[0]


def main() -> None:
    """Measure each row at each size, fit, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--sizes", type=int, nargs="+", help=f"(default: {SIZES})")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--images", type=float, default=1.3e6, help="(default: %(default)s)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print({"knn": knn, "extract": extract}[options.one[0]](int(options.one[1]), options.dim, Path(folder)))
        return
    print(f"| | images | MiB of its own | grows by, bytes an image | MiB at {options.images:,.0f} |")
    print("| --- | --- | --- | --- | --- |")
    for name in options.rows:
        peaks, sizes = [], options.sizes or SIZES[name]
        for size in sizes:
            argv = [sys.executable, __file__, "--dim", str(options.dim), "--one", name, str(size)]
            said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
            peaks.append(int(said.split()[-1]))
        growth, fixed = np.polyfit(sizes, peaks, 1)
        cells = [" / ".join(f"{size:,}" for size in sizes), " / ".join(f"{peak / 2**20:.0f}" for peak in peaks)]
        at = (fixed + growth * options.images) / 2**20
        print(f"| {name} | {' | '.join(cells)} | {growth:.0f} | {at:.0f} |", flush=True)


if __name__ == "__main__":
    main()
