"""What is measured now and then while training: feature statistics, pictures, validation loss, kNN accuracy.

Shapes: n images, D features.
"""

import math
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from .. import distributed
from ..config import Resolved
from ..data.loader import Share, fixed_batches, to_batch
from ..data.source import Source
from ..data.views import ViewSpec
from ..distributed import World
from ..errors import UserError
from ..pretext import Batch, Method, Step
from ..randomness import key
from . import parallel
from .guard import HELD_OUT, Guard
from .monitor import CollapseMonitor, feature_statistics
from .networks import open_teacher, teachers_of
from .pictures import Pictures, of_first
from .report import Report
from .saver import Saver
from .score import KnnScore, from_weights, share

IMAGES = 256  # the first of the global batch, whose features are looked at for collapse


@final
class Probes:
    """Measures what is due after a step, and reports it. All processes call it at the same steps."""

    def __init__(
        self,
        run: Resolved,
        method: Method,
        world: World,
        report: Report,
        monitor: CollapseMonitor,
        saver: Saver,
        knn: Mapping[str, KnnScore],
        guard: Guard,
        source: Source,
        held_out: Source | None,
        specs: tuple[ViewSpec, ...],
        autocast: Any,
    ) -> None:
        """knn: the kNN scores that are asked for, on the first process; guard: is told all scores; source: the training
        images; held_out: validation images, seen with `specs`."""
        self.run, self.method, self.world, self.report, self.monitor = run, method, world, report, monitor
        self.saver, self.knn, self.guard, self.held_out = saver, knn, guard, held_out
        self.specs, self.autocast = specs, autocast
        self._teacher_top1: dict[str, dict[str, float]] = {}  # by group of scores and name of the teacher
        # Micro-batches to look at for collapse: the first of this process's rows in the global batch, and images of them
        self._watched: list[tuple[int, Tensor]] = []
        self._pictures = Pictures(run, method, world, report, source, autocast, saver.sharded)
        # The first images of this process's first micro-batch, and their rows in the global batch
        self._pictured: tuple[Batch, slice] | None = None

    def see(self, step: int, rows: slice, batch: Batch, specs: tuple[ViewSpec, ...]) -> None:
        """Keep what will be looked at after `step` steps of a micro-batch that holds `rows` of the global batch. Before a
        run's first step, its pictures are made."""
        run = self.run
        if (is_due(step, run.picture_every) or (run.picture_every and step in (1, run.steps))) and not self._pictured:
            self._pictured = of_first(batch, rows)
            if step == 1:
                self._draw(0, specs)
        if not is_due(step, run.monitor_every):
            return
        wanted = max(0, min(IMAGES - rows.start, rows.stop - rows.start))
        # Processes that share the model must call it equally often: one without images to look at takes its first one.
        if wanted or self.saver.sharded:
            images = batch.views[specs[0].name]
            images = images[0] if specs[0].count > 1 else images
            self._watched.append((rows.start, images[: max(1, wanted)]))

    def at_start(self, step: int) -> bool:
        """Score the start weights (--init-from, --init-state) before the first step; whether they are to be kept as the
        best so far."""
        if step != 0 or not from_weights(self.run) or not self.run.knn_every:
            return False
        self._knn(0)
        return self._is_best(0)

    def __call__(self, step: int, specs: tuple[ViewSpec, ...]) -> bool:
        """After `step` steps, the last one with views as `specs` declare them. Returns, the same on all processes, whether
        this step is to be kept as the best so far (--keep-best)."""
        run = self.run
        if is_due(step, run.monitor_every):
            self._feature_statistics(step)
        if is_due(step, run.picture_every) or (run.picture_every and step == run.steps):
            self._draw(step, specs)
        self._pictured = None
        if self.held_out is not None and (is_due(step, run.val_every) or step == run.steps):
            with parallel.gathered(self.method):
                scores = validate(run, self.method, self.held_out, self.specs, self.autocast, self.world)
            self.report.scores(HELD_OUT, scores, step)
            self._judge(HELD_OUT, scores["loss"], step)
        if is_due(step, run.knn_every):
            self._knn(step)
        return self._is_best(step)

    def _feature_statistics(self, step: int) -> None:
        """Of the same images, whatever processes and micro-batches they came in."""
        with parallel.gathered(self.method):
            own = [
                (start, exported_features(self.method, images, self.autocast).cpu()) for start, images in self._watched
            ]
        self._watched.clear()
        parts = sorted((part for each in distributed.from_all(own) for part in each), key=lambda part: part[0])
        features = torch.cat([part for start, part in parts if start < IMAGES])
        if len(features) < 2:
            return
        statistics = feature_statistics(features)
        self.report.scores("features", statistics, step)
        for warning in self.monitor.features(statistics, len(features)):
            self.report.warn(warning)

    def _draw(self, step: int, specs: tuple[ViewSpec, ...]) -> None:
        """Pictures of the state after `step` steps, with the images and the noise of the last step, or of the first."""
        if self._pictured is not None and (self.world.first or self.saver.sharded):
            images, rows = self._pictured
            self._pictures(step, images, specs, step_of(self.run, max(0, step - 1), rows, self.world))

    def _knn(self, step: int) -> None:
        self.saver.settle(wait=True)  # it exports from the same copy
        encoder = self.saver.copy_encoder()
        if encoder is not None:
            for group, score in self.knn.items():
                top1 = score(encoder.to(self.world.device).eval())
                self.report.scores(group, {"top1": top1, **self._beside_teacher(group, score, top1)}, step)
                self._judge(group, top1, step)
            encoder.cpu()
        distributed.barrier()

    def _beside_teacher(self, group: str, score: KnnScore, top1: float) -> dict[str, float]:
        """Each teacher's score, taken once in this process, and the share of it that the encoder reaches; nothing in a run
        without a teacher."""
        known = self._teacher_top1.setdefault(group, {})
        found: dict[str, float] = {}
        for name in teachers_of(self.run, self.run.out):
            if name not in known:
                try:
                    known[name] = score(open_teacher(self.run, self.run.out, name))
                except UserError as problem:  # only this process scores, and the others do not fail with it
                    self.report.warn(f"the {name} could not be scored: {problem}")
                    continue
            found |= {f"{name}_top1": known[name], f"{name}_share": share(top1, known[name])}
        return found

    def _judge(self, group: str, score: float, step: int) -> None:
        if self.world.first:
            for warning in self.guard.judge(group, score, step):
                self.report.warn(warning)

    def _is_best(self, step: int) -> bool:
        """Whether the score of --keep-best that was taken at this step, if one was, is the best so far."""
        run, best = self.run, self.guard.best
        if run.keep_best is None:
            return False
        every = run.val_every if run.keep_best == HELD_OUT else run.knn_every
        if not (is_due(step, every) or step == run.steps):
            return False
        return distributed.from_first(best is not None and best.best_step == step)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def step_of(run: Resolved, number: int, rows: slice, world: World) -> Step:
    """Optimiser step `number` (from 0) for the micro-batch that holds `rows` of the global batch."""
    return Step(
        step=number,
        total=run.steps,
        noise=key(run.seed, "step", number),
        rows=rows,
        batch_size=run.batch_size,
        device=world.device,
    )


def exported_features(method: Method, images: Tensor, autocast: Any) -> Tensor:
    """The exported encoder's vectors (n, D) float32 of a few images (n, C, H, W), as an evaluator would see them."""
    exported = method.exported()
    exported.eval()
    with torch.no_grad(), autocast:
        pooled = exported(images).pooled
    method.train()
    return pooled.float()


def validate(
    run: Resolved, method: Method, held_out: Source, specs: tuple[ViewSpec, ...], autocast: Any, world: World
) -> dict[str, float]:
    """The mean loss over the held-out images, always with the same views and the same noise."""
    # Batches of one size, no larger than in training, that leave out fewer images than they are.
    batches_needed = math.ceil(len(held_out) / run.batch_size)
    each = max(1, len(held_out) // (batches_needed * world.size)) * world.size
    share = Share(each, 1, world.rank, world.size)
    total, count = torch.zeros((), device=world.device), 0
    method.eval()
    with torch.no_grad():
        for raw in fixed_batches(held_out, specs, share, seed=run.seed, channels=run.in_chans, policy=run.bad_images):
            step = Step(
                step=run.steps - 1,
                total=run.steps,
                noise=key(run.seed, "validation", raw.step),
                rows=share.rows(0),
                batch_size=share.batch_size,
                device=world.device,
            )
            with autocast:
                total += method(to_batch(raw, specs, run.mean, run.std, world.device), step).total
            count += 1
    method.train()
    return {"loss": float(distributed.all_reduce_(total)) / (count * world.size)}
