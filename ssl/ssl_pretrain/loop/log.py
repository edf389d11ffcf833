"""The log of a run: losses stay on the device until a line of metrics.jsonl is due, then the host reads them at once.

Shapes: S steps since the last line, T terms of the loss, B images of a forward.
"""

import time
from typing import final

import torch
from torch import Tensor

from .. import distributed
from ..config import Resolved
from ..data.sampler import samples
from ..data.source import Source
from ..distributed import World
from ..files import finite
from ..pretext import Losses
from .estimate import Estimate
from .monitor import CollapseMonitor
from .report import Report


@final
class Log:
    """Collects each step's losses; `write` turns them into a line and warns about what is wrong with them."""

    def __init__(
        self,
        run: Resolved,
        source: Source,
        report: Report,
        monitor: CollapseMonitor,
        world: World,
        skipped: int,
        estimate: Estimate,
    ) -> None:
        """skipped: how many steps of the run were not finite so far; estimate: gets to know what was no training, too."""
        self.run, self.source, self.report, self.monitor, self.world = run, source, report, monitor, world
        self.skipped, self._estimate = skipped, estimate
        self.bad_in_a_row = 0  # the last so many steps were not finite
        self._rows: list[Tensor] = []  # a step each, (3 + T,): not finite?, gradient norm, loss, its terms
        self._terms: list[str] = []
        self._sample_losses: list[tuple[int, Tensor, Tensor]] = []  # step, sample ids (B,), their losses (B,)
        self._steps = 0  # since the last line
        self._waited = 0.0  # seconds without images, since the last line
        self._since = time.perf_counter()

    def waited_for_data(self, seconds: float) -> None:
        """Count time without images."""
        self._waited += seconds

    def leave_out(self, seconds: float) -> None:
        """Leave time that was not spent on training out of the speed."""
        self._since += seconds
        self._estimate.leave_out(seconds)

    def add(self, step: int, results: list[tuple[Tensor, Losses]], mean: Tensor, bad: Tensor, norm: Tensor) -> None:
        """Add step number `step` (from 0): sample ids and losses of each forward, the mean (1 + T,) of the losses and their
        terms, whether the step was not finite (float, ()), and the gradient norm ()."""
        self._sample_losses += [
            (step, index, each.per_sample) for index, each in results if each.per_sample is not None
        ]
        self._rows.append(torch.cat([torch.stack([bad, norm]), mean]))
        self._terms = list(results[-1][1].terms)
        self._steps += 1

    def write(self, step: int, lr: float, weight_decay: float, seconds_blocked: float) -> None:
        """Write the line after `step` steps. All processes call this at the same steps; the host waits for the device."""
        table = torch.stack(self._rows)
        table[:, 2:] = distributed.all_reduce_(table[:, 2:].contiguous()) / self.world.size
        table = table.cpu()
        self._rows.clear()
        good = table[:, 0] == 0
        if not bool(good.all()):
            self._report_bad_steps(step, table, good)
        self._sample_losses.clear()
        trailing = len(table) if not bool(good.any()) else int(good.flip(0).float().argmax())
        self.bad_in_a_row = trailing + (self.bad_in_a_row if trailing == len(table) else 0)
        if self.bad_in_a_row >= self.run.bad_steps:
            return  # the run ends
        mean = table[good].mean(0) if bool(good.any()) else table.mean(0)
        now = time.perf_counter()
        steps_per_s = self._steps / (now - self._since)
        line = {
            "step": step,
            "loss": float(mean[2]),
            **{name: float(value) for name, value in zip(self._terms, mean[3:], strict=True)},
            "grad_norm": float(mean[1]),
            "lr": lr,
            "weight_decay": weight_decay,
            "images_per_s": steps_per_s * self.run.batch_size,
            "data_wait": min(1.0, self._waited / (now - self._since)),
            "checkpoint_wait": min(1.0, seconds_blocked / (now - self._since)),
            "epoch": step * self.run.batch_size / len(self.source),
            "skipped": self.skipped,
            "bad_images": self.report.count_bad_images(),
            "time": time.time(),
        }
        self.report.metrics(finite(line), (self.run.steps - step) / steps_per_s)
        warm = step > max(self.run.warmup_steps, self.run.steps // 20)
        for warning in self.monitor.losses(line, warm=warm):
            self.report.warn(warning)
        self._waited, self._steps, self._since = 0.0, 0, time.perf_counter()

    def diverged(self, step: int) -> str:
        """Why the run ends after `step` steps: too many steps in a row were not finite."""
        first = step - self.bad_in_a_row
        return (
            f"{self.bad_in_a_row} steps in a row were not finite ({self.run.bad_steps} allowed, --bad-steps), from step "
            f"{first}; the weights before it are kept in {self.run.out / 'checkpoints'}. "
            f"Lower --lr, lengthen --warmup-steps or set --clip-grad, with another --out"
        )

    def _report_bad_steps(self, step: int, table: Tensor, good: Tensor) -> None:
        """Count the steps that were skipped and warn: which, for which term, and on which images."""
        bad_steps = [step - len(table) + i for i in range(len(table)) if not good[i]]
        self.skipped += len(bad_steps)
        own = [
            i
            for number, index, losses in self._sample_losses
            if number in bad_steps
            for i in index[~losses.isfinite()].tolist()
        ]
        suspects = sorted({i for found in distributed.from_all(own) for i in found})
        columns = ["gradient norm", "loss", *self._terms]
        terms = [name for i, name in enumerate(columns) if not bool(torch.isfinite(table[~good][:, 1 + i]).all())]
        run = self.run
        if not suspects:  # all images of the first such step
            first = bad_steps[0] * run.batch_size
            suspects = samples(first, run.batch_size, len(self.source), run.seed)[1].tolist()
        self.report.warn(
            f"skipped step {_some(bad_steps)}: not finite: {', '.join(terms) or 'the loss of another process'}; "
            f"sample ids {_some(suspects)}"
        )


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (f", ... ({len(values)} in all)" if len(values) > 8 else "")
