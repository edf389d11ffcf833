"""Pictures of a run, for every method: its views, the features of a few fixed images, their nearest neighbours, and what
the method itself draws (masks, reconstructions).

They are made before the first step, every `--picture-every` steps, and after the last one. Training is not changed: the
encoder is in eval mode meanwhile, no noise is drawn that training draws, and the state of no generator is used. A picture
is a function of the seed, the step and the weights, so that a resumed run makes the same ones.

Shapes: n images, C channels, H x W pixels, D features.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from ..backbones.backbone import Features
from ..config import Resolved
from ..data.loader import Share, fixed_batches
from ..data.sampler import permute
from ..data.source import Source
from ..data.subset import Subset
from ..data.views import ViewSpec
from ..distributed import World
from ..features.neighbours import nearest
from ..pretext import Batch, Method, Step
from ..randomness import key
from . import drawing, parallel
from .report import Report

SHOWN = 8  # images: the columns of a picture
FEWEST, MOST = 32, 256  # images among which neighbours are looked for: twice the batch, within these bounds
NEIGHBOURS = 6
QUERY_GAP = 16  # white pixels between an image and its neighbours
CHUNK = 64  # images that the encoder sees at a time, at most
VIEWS, COMPONENTS, SIMILARITY, ATTENTION, NEAREST = (
    "views",
    "patch features (PCA)",
    "similarity to the class token",
    "attention of the last block",
    "nearest neighbours",
)


@final
class Pictures:
    """Makes and reports the pictures. With sharded parameters all processes call it at the same steps, else the first."""

    def __init__(
        self, run: Resolved, method: Method, world: World, report: Report, source: Source, autocast: Any, sharded: bool
    ) -> None:
        """source: the training images, of which some are shown; sharded: whether the processes share the parameters."""
        self.run, self.method, self.world, self.report = run, method, world, report
        self.source, self.autocast, self.sharded = source, autocast, sharded
        self._pixels: Tensor | None = None  # (n, H, W, C) uint8, the fixed images; read when they are first needed
        self._failed: set[str] = set()  # names of pictures that were warned about

    def __call__(self, step: int, batch: Batch, specs: tuple[ViewSpec, ...], noise: Step) -> None:
        """Pictures of the state after `step` steps. batch: a few images as `specs` declare them; noise: their step."""
        with self._surviving(VIEWS):
            if self.world.first:
                self._report(VIEWS, self._views(batch, specs), step)
        if self.sharded and step == 0 and not self._set_up(batch, noise):
            return
        with self._surviving("pictures of the method"):
            with self._looking(), parallel.gathered(self.method):
                own = self.method.pictures(batch, noise)
            if own and self.world.first:
                self._report(" | ".join(own), self._rows(list(own.values())), step)
        with self._surviving("pictures of features"):
            self._features(step)

    def _features(self, step: int) -> None:
        """The pictures that show how the exported encoder sees the fixed images."""
        pixels = self._fixed_images()
        if not len(pixels):
            return
        pooled, seen = self._encoded(pixels)
        if not self.world.first:
            return
        few = pixels[:SHOWN]
        with self._surviving(COMPONENTS):
            means = F.adaptive_avg_pool2d(drawing.as_rgb(few).permute(0, 3, 1, 2).float(), seen.grid)
            colours = drawing.components(seen.patches, means.flatten(2).transpose(1, 2), seen.grid)
            self._report(COMPONENTS, self._below(few, colours, seen.grid), step)
        with self._surviving(SIMILARITY):
            whole = (seen.pooled if seen.cls is None else seen.cls).float()
            alike = F.cosine_similarity(seen.patches.float(), whole[:, None], dim=-1)
            if not bool(alike.isfinite().all()):
                raise ValueError("features are not finite")
            self._report(SIMILARITY, self._below(few, drawing.heat(alike), seen.grid), step)
        if seen.attention:
            with self._surviving(ATTENTION):
                looks = drawing.attention(seen.attention[0], seen.patches.shape[1], from_first=seen.cls is not None)
                self._report(ATTENTION, self._below(few, drawing.heat(looks), seen.grid), step)
        if len(pooled) < 2:
            return
        with self._surviving(NEAREST):
            _, index = nearest(pooled, pooled, NEIGHBOURS, exclude_self=True)
            small = drawing.scaled(drawing.as_rgb(pixels), drawing.zoom([self.run.image_size]))
            rows = [[small[i], *small[index[i]]] for i in range(len(few))]
            self._report(NEAREST, drawing.arranged(rows, lead=QUERY_GAP), step)

    # ---- What is shown.

    def _fixed_images(self) -> Tensor:
        """Training images (n, H, W, C) uint8, the same ones in the whole run; none where they cannot be read. Of other
        processes than the first only their number is used."""
        if self._pixels is None:
            self._pixels = torch.empty(0, *self.run.image_size, self.run.in_chans, dtype=torch.uint8)
            with self._surviving("pictures of features"):
                if self.world.first:
                    self._pixels = fixed_images(self.source, self.run)
            if self.sharded:
                count = distributed.from_first(len(self._pixels))
                if not self.world.first:
                    self._pixels = self._pixels.new_zeros(count, *self._pixels.shape[1:])
        return self._pixels

    def _encoded(self, pixels: Tensor) -> tuple[Tensor, Features]:
        """Vectors (n, D) float32 of all images by the exported encoder, on the host, and the Features of the first, with
        the attention of the last block where the encoder gives it."""
        run, vectors = self.run, []
        mean, std = (torch.tensor(each, device=self.world.device) for each in (run.mean, run.std))
        micro_batch = run.batch_size // (run.accumulate * self.world.size)  # fits into memory even in training
        first: Features | None = None
        with self._looking(), parallel.gathered(self.method):
            exported = self.method.exported()
            options: dict[str, Any] = {"attention_of": (-1,)} if "attention_maps" in exported.supports else {}
            for few in (pixels[:SHOWN], *pixels[SHOWN:].split(max(1, min(CHUNK, micro_batch)))):
                images = ((few.to(self.world.device).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
                if exported.image_size != run.image_size:  # a tokenizer whose patches have another size
                    images = F.interpolate(images, exported.image_size, mode="bicubic", antialias=True)
                features = exported(images, **({} if first else options))
                first = first or features
                vectors.append(features.pooled.float().cpu())
        assert first is not None
        return torch.cat(vectors), first

    def _views(self, batch: Batch, specs: tuple[ViewSpec, ...]) -> np.ndarray:
        """One column an image, one row a view, in the order of their declaration; small views stay smaller."""
        crops = [batch.views[s.name] for s in specs if s.stored is None]
        return self._rows([row for each in crops for row in (each if each.ndim == 5 else [each])])

    def _rows(self, images: list[Tensor]) -> np.ndarray:
        """A row for each of several normalised images (n, C, H, W)."""
        factor = drawing.zoom([(each.shape[-2], each.shape[-1]) for each in images])
        rows = [drawing.scaled(drawing.shown(each, self.run.mean, self.run.std), factor) for each in images]
        return drawing.arranged([list(row) for row in rows])

    def _below(self, pixels: Tensor, colours: Tensor, grid: tuple[int, int]) -> np.ndarray:
        """Images, and below each one its patches in these colours (n, N, 3)."""
        images = drawing.scaled(drawing.as_rgb(pixels), drawing.zoom([self.run.image_size]))
        maps = drawing.patches_scaled(colours, grid, (images.shape[1], images.shape[2]))
        return drawing.arranged([list(images), list(maps)])

    def _report(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.report.picture(name, pixels, step)

    # ---- How training is left as it was.

    def _set_up(self, batch: Batch, noise: Step) -> bool:
        """Call the whole method once, before parts of it: FSDP2 sets itself up in the first forward, and that must be one
        of the whole. Returns whether that worked."""
        with self._surviving("pictures before the first step"):
            with self._looking():
                self.method(batch, noise.restarted())
            return True
        return False

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """With the model as an evaluator would use it: eval mode, no gradients, and no compilation for other shapes."""
        self.method.eval()
        try:
            with torch.no_grad(), self.autocast, torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.method.train()

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """A picture that fails is left out, with one warning in a run."""
        try:
            yield
        except Exception as problem:
            if name not in self._failed:
                self._failed.add(name)
                self.report.warn(f"{name}: not drawn, and the run goes on: {type(problem).__name__}: {problem}")


def fixed_images(source: Source, run: Resolved) -> Tensor:
    """A few training images (n, H, W, C) uint8, chosen by the seed: the largest central part of the run's aspect ratio, at
    the run's image size. One that cannot be read is left out. Raises UserError where hardly any can be read."""
    count = min(len(source), MOST, max(FEWEST, 2 * run.batch_size))
    chosen = permute(np.arange(count), len(source), key(run.seed, "pictures"))
    ratio = run.image_size[1] / run.image_size[0]
    whole = ViewSpec(name="whole", size=run.image_size, scale=(1.0, 1.0), ratio=(ratio, ratio), hflip=0.0, fast=True)
    (raw,) = fixed_batches(
        Subset(source, chosen), (whole,), Share(count), seed=run.seed, channels=run.in_chans, policy="replace"
    )
    _, first = np.unique(raw.index, return_index=True)  # an unreadable image is replaced by another one of them
    return raw.views["whole"][np.sort(first)]


def of_first(batch: Batch, rows: slice, count: int = SHOWN) -> tuple[Batch, slice]:
    """Copies of the first images of a micro-batch that holds `rows` of the global batch, and their rows."""

    def few(tensors: dict[str, Tensor], trailing: int) -> dict[str, Tensor]:
        return {name: each.narrow(each.ndim - 1 - trailing, 0, taken).clone() for name, each in tensors.items()}

    taken = min(count, len(batch.index))
    chosen = dataclasses.replace(
        batch,
        views=few(batch.views, 3),
        geometry=few(batch.geometry, 1),
        index=batch.index[:taken],
        labels=None if batch.labels is None else batch.labels[:taken],
    )
    return chosen, slice(rows.start, rows.start + taken)
