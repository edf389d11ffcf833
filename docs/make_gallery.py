"""Make the pictures of docs/gallery.md again.

    python docs/make_gallery.py                          every picture, about seven minutes of CPU time
    python docs/make_gallery.py fractals masks           only these
    python docs/make_gallery.py --runs DIR               keep the training runs in DIR, or use those that are there
    python docs/make_gallery.py --out DIR                write to DIR instead of docs/pictures

All images are the built-in fractals, so the pictures may be redistributed under the project's license.
"""

import argparse
import io
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the models are small

import numpy as np
import torch
from PIL import Image
from ssl_pretrain.launch import report_pictures
from torch import Tensor

from ssl_pretrain import encoder, pretext
from ssl_pretrain.data import colour
from ssl_pretrain.data.fractals import FractalSource
from ssl_pretrain.data.views import cut, fitted
from ssl_pretrain.parts.block_masks import ATTEMPTS, block_masks
from ssl_pretrain.parts.masks import random_masking
from ssl_pretrain.parts.multi_block_masks import multi_block_masks

# The runs that some pictures need. MAE predicts plain pixels, so that the picture shows nothing but its predictions.
RUNS = {
    "mae": "--method mae --data fractals:size=72 --image-size 64 --patch-size 8 --encoder vit_micro --decoder-dim 128 "
    "--decoder-depth 2 --decoder-heads 4 --batch-size 64 --steps 1600 --lr 2e-3 --no-norm-pix --crop-scale 0.5 1 "
    "--picture-every 400 --monitor-every 25 --workers 0 --no-score",
    "dino": "--method dino --monitor-every 10 --workers 0 --no-score",
    "short": "--method mae --steps 100 --picture-every 100 --workers 0 --no-score",
}
SHOWN = (3, 0, 4, 14, 11, 8, 6, 1)  # test images with much to see
GREY, BLUE, GAP = np.uint8([128, 128, 128]), np.uint8([40, 110, 220]), 4


def fractals(_: Callable[[str], Path]) -> Image.Image:
    """Two images of each class of the built-in data."""
    source = FractalSource("fractals:size=72", "train")
    return grid([[source[row * 10 + column] for column in range(10)] for row in range(4)], gap=0)


def simclr_views(_: Callable[[str], Path]) -> Image.Image:
    """Six draws of SimCLR's views of each image."""
    return with_views("simclr", 6)


def dino_views(_: Callable[[str], Path]) -> Image.Image:
    """DINO's two large views and six small ones of each image."""
    return with_views("dino", 8)


def masks(_: Callable[[str], Path]) -> Image.Image:
    """MAE's masks, iBOT's blocks, and I-JEPA's context and targets (blue), of 14 x 14 patches."""
    pixels, side = images(112)[:4], (14, 14)
    count, patches = len(pixels), side[0] * side[1]
    step = pretext.Step(step=0, total=1, noise=5, rows=slice(0, count), batch_size=count, device=torch.device("cpu"))

    def marked(index: Tensor) -> np.ndarray:
        """Patch indices (B, K) as bool (B, h, w)."""
        return torch.zeros(count, patches).scatter(1, index, 1.0).bool().view(count, *side).numpy()

    kept, _unused = random_masking(step.rand(patches), patches // 4)
    blocks = block_masks(step.rand(ATTEMPTS, 4), side, torch.full((count,), 0.4 * patches), smallest=16)
    context, targets = multi_block_masks(step, side)
    rows = [
        pixels,
        [hide(image, ~seen) for image, seen in zip(pixels, marked(kept), strict=True)],
        [hide(image, hidden) for image, hidden in zip(pixels, blocks.view(count, *side).numpy(), strict=True)],
        [
            hide(image, ~(seen | asked), asked)
            for image, seen, asked in zip(pixels, marked(context), marked(targets.flatten(1)), strict=True)
        ],
    ]
    return grid([list(column) for column in zip(*rows, strict=True)])


def mae_reconstruction(run: Callable[[str], Path]) -> Image.Image:
    """The last picture that the MAE run logged: rows of input, masked input and reconstruction."""
    picture = logged(run("mae"), "reconstruction")
    return picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)


@torch.inference_mode()
def pca_patches(run: Callable[[str], Path]) -> Image.Image:
    """The first three principal components of all patch features of eight images as red, green and blue. Rows: images,
    MAE untrained and trained, DINO untrained and trained."""
    pixels = images(128)
    rows = [pixels]
    for folder in (run("mae"), run("dino")):
        for model in (encoder.random_like(folder), encoder.load(folder)):
            features = model(model.normalise(torch.from_numpy(np.stack(pixels))))
            rows.append(list(components(features.patches, features.grid, 128)))
    return grid(rows, gap=0)


def run_features(run: Callable[[str], Path]) -> Image.Image:
    """Patch features of the fixed images after a short run, and their similarity to the class token."""
    upper, lower = (logged(run("short"), name) for name in ("PCA", "similarity"))
    height, width = upper.height // 2 + 1, upper.width
    both = Image.new("RGB", (width, upper.height + height), "white")
    both.paste(upper, (0, 0))
    both.paste(lower.crop((0, lower.height - height, width, lower.height)), (0, upper.height))
    return both


def run_neighbours(run: Callable[[str], Path]) -> Image.Image:
    """Nearest neighbours after a short run: the first four rows of the picture that it logged."""
    picture = logged(run("short"), "neighbours")
    return picture.crop((0, 0, picture.width, picture.height // 2 - 1))


def report(run: Callable[[str], Path]) -> Image.Image:
    """The top of the page that ssl-report writes about the short run, as a browser shows it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("report: needs the browser Chromium")
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "report.html"), Path(folder, "report.png")
        subprocess.run([sys.executable, "-m", "ssl_pretrain.launch.report", run("short"), "--out", page], check=True)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1120,2000"]
        own = [f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
        subprocess.run([browser, *flags, *own, page.as_uri()], check=True, stderr=subprocess.DEVNULL)
        return Image.open(shot).convert("RGB").quantize(128)


PICTURES: dict[str, Callable[[Callable[[str], Path]], Image.Image]] = {
    each.__name__: each
    for each in (
        *(fractals, simclr_views, dino_views, masks, mae_reconstruction),
        *(pca_patches, run_features, run_neighbours, report),
    )
}


def logged(folder: Path, name: str) -> Image.Image:
    """The last picture that a run logged under a name that contains this word."""
    found, _ = report_pictures.read(folder, report_pictures.PAGE_BYTES)
    (series,) = (each for each in found if name in each.tag)
    return Image.open(io.BytesIO(series.shown[-1].png))


def images(size: int) -> list[np.ndarray]:
    """The test images that are shown, (size, size, 3) uint8."""
    source = FractalSource(f"fractals:size={size}", "test")
    return [source[index] for index in SHOWN]


def with_views(method: str, count: int) -> Image.Image:
    """Four images, each in a row with `count` of its views."""
    rows = enumerate(images(96)[:4])
    return grid([[pixels, *islice(views_of(method, pixels, 96, seed), count)] for seed, pixels in rows])


def views_of(method: str, pixels: np.ndarray, size: int, seed: int) -> Iterator[np.ndarray]:
    """The views that a method declares, with its default options, one draw of all after another: (h, w, 3) uint8."""
    kind = pretext.load(method)
    specs = fitted(kind.views(kind.Config(), (size, size)), (size, size), (8, 8))
    rng = np.random.default_rng(seed)
    while True:
        for spec in specs:
            for _ in range(spec.count):
                made = cut(pixels, spec, rng)
                raw, parameters = torch.from_numpy(made.image)[None], made.colour[None]
                seen = colour.finish(raw, parameters, spec, mean=(0.0,) * 3, std=(1.0,) * 3)[0]
                yield (seen.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def hide(pixels: np.ndarray, hidden: np.ndarray, tinted: np.ndarray | None = None) -> np.ndarray:
    """An image with the hidden patches (h, w) grey and the tinted ones bluish."""
    side = pixels.shape[0] // hidden.shape[0]
    out = pixels.copy()
    out[hidden.repeat(side, 0).repeat(side, 1)] = GREY
    if tinted is not None:
        where = tinted.repeat(side, 0).repeat(side, 1)
        out[where] = pixels[where] // 2 + BLUE // 2
    return out


def components(patches: Tensor, side: tuple[int, int], size: int) -> np.ndarray:
    """The first three principal components of patch features (B, N, D) as colours: (B, size, size, 3) uint8."""
    flat = patches.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    _, axes = torch.linalg.eigh(flat.T @ flat)
    axes = axes[:, -3:].flip(1)
    scores = flat @ (axes * axes.sum(0).sign())  # an axis has no sign of its own
    low, high = scores.quantile(0.01, 0), scores.quantile(0.99, 0)
    colours = ((scores - low) / (high - low)).clamp(0, 1).view(len(patches), *side, 3).numpy()
    return (colours * 255).astype(np.uint8).repeat(size // side[0], 1).repeat(size // side[1], 2)


def grid(rows: list[list[np.ndarray]], gap: int = GAP) -> Image.Image:
    """Images in rows on white; smaller ones keep their size."""
    side = max(image.shape[0] for row in rows for image in row)
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * (side + gap) - gap, len(rows) * (side + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(Image.fromarray(image), (x * (side + gap), y * (side + gap)))
    return canvas


def write(picture: Image.Image, name: str, out: Path) -> Path:
    """Write a picture as PNG."""
    path = out / f"{name}.png"
    picture.save(path, optimize=True)
    return path


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)} (default: all)")
    parser.add_argument("--runs", type=Path, help="folder of the training runs (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    options = parser.parse_args()
    if unknown := set(options.names) - set(PICTURES):
        parser.error(f"unknown picture: {', '.join(sorted(unknown))}")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        runs = options.runs or Path(temporary)

        def run(name: str) -> Path:
            """The folder of a finished run; the same command does nothing where it has finished already."""
            command = [sys.executable, "-m", "ssl_pretrain.launch.pretrain", *RUNS[name].split(), "--out", runs / name]
            subprocess.run(command, check=True)
            return runs / name

        for name in options.names or PICTURES:
            path = write(PICTURES[name](run), name, options.out)
            print(f"{path}: {math.ceil(path.stat().st_size / 1024)} KiB")


if __name__ == "__main__":
    main()
