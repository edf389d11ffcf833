"""What a person sees of a run: the progress bar, metrics.jsonl, TensorBoard, the list of bad images, warnings.

Only the first process reports; the others hold a silent Report.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ..files import read_lines, write_text


class Report:
    """Opens the run's logs at `step`, dropping what an earlier process logged past it; close with `close`."""

    def __init__(self, out: Path, *, step: int, steps: int, silent: bool = False) -> None:
        self.out, self.steps, self.silent = out, steps, silent
        self.bad_images = read_lines(out / "bad_images.jsonl")
        self._bad_known = {line["index"] for line in self.bad_images}
        self._bad_size = 0  # of the list when it was last read
        if silent:
            return
        self.console = Console(stderr=True, soft_wrap=True)
        kept = [line for line in read_lines(out / "metrics.jsonl") if line.get("step", 0) <= step]
        write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = open(out / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (open as long as the run is)
        from torch.utils.tensorboard import SummaryWriter  # a second to import; only this process needs it

        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=30)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.fields[name]}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[shown]}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=steps, completed=step, name=out.name, shown="")
            self._bar.start()
        self._last_line = 0.0

    def metrics(self, line: dict[str, Any], seconds_left: float) -> None:
        """Log one line (plain numbers; must hold step, loss, images_per_s, data_wait)."""
        if self.silent:
            return
        self._metrics.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                self._board.add_scalar(f"train/{name}", value, line["step"])
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.4f}"
        shown = (
            f"loss {loss}  {line['images_per_s']:.0f} images/s  data wait {line['data_wait']:.0%}  "
            f"{_duration(seconds_left)} left"
        )
        if self._bar:
            self._bar.update(self._task, completed=line["step"], shown=shown)
        elif time.monotonic() - self._last_line > 10 or line["step"] == self.steps:
            self._last_line = time.monotonic()
            self.say(f"step {line['step']}/{self.steps}  {shown}")

    def scores(self, group: str, values: dict[str, float], step: int) -> None:
        """Log numbers measured now and then (validation loss, kNN) as a line of their own: {"step", "group/name"...}."""
        if self.silent:
            return
        named = {f"{group}/{name}": value for name, value in values.items()}
        self._metrics.write(json.dumps({"step": step, **named}) + "\n")
        for name, value in named.items():
            self._board.add_scalar(name, value, step)
        self.say(f"step {step}/{self.steps}  " + "  ".join(f"{name} {value:.4g}" for name, value in named.items()))

    def pictures(self, images: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...], step: int) -> None:
        """Log pictures (n, C, H, W) in normalised colours: one column an image, one row a name."""
        if self.silent or not images:
            return
        rows = []
        for picture in images.values():
            channels = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
            x = (picture.float().cpu() * channels[0] + channels[1]).clamp(0, 1)
            x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
            rows.append(torch.cat(list(x), dim=-1))
        self._board.add_image(" | ".join(images), torch.cat(rows, dim=-2), step)

    def bad_image(self, index: int, name: str, reason: str) -> None:
        """Count and list an unreadable image, once a run, in bad_images.jsonl. Every process may call this."""
        if index in self._bad_known:
            return
        self._bad_known.add(index)
        self.bad_images.append({"index": index, "name": name, "reason": reason})
        line = json.dumps(self.bad_images[-1]) + "\n"
        # One write to a file opened for appending: lines of several processes do not mix.
        descriptor = os.open(self.out / "bad_images.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def count_bad_images(self) -> int:
        """How many unreadable images the run has met, whichever process did."""
        listed = self.out / "bad_images.jsonl"
        size = listed.stat().st_size if listed.exists() else 0
        if size != self._bad_size:
            self._bad_size = size
            self._bad_known |= {line["index"] for line in read_lines(listed)}
        return len(self._bad_known)

    def merge_bad_images(self) -> int:
        """List each bad image once, whichever processes met it; returns how many there are. For one process."""
        merged = {line["index"]: line for line in read_lines(self.out / "bad_images.jsonl")}
        if merged:
            lines = [json.dumps(merged[index]) + "\n" for index in sorted(merged)]
            write_text(self.out / "bad_images.jsonl", "".join(lines))
        return len(merged)

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        if not self.silent:
            self.console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        """A warning: on the terminal and, with its time, in warnings.log of the run."""
        if not self.silent:
            self.console.print(f"warning: {text}", markup=False, highlight=False, style="yellow")
            with open(self.out / "warnings.log", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def close(self) -> None:
        """Flush and close everything; safe where the disk is full."""
        if self.silent:
            return
        if self._bar:
            self._bar.stop()
        for close in (self._metrics.close, self._board.close):
            with contextlib.suppress(OSError):
                close()


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}"
