"""What a person sees of a run: the progress bar, metrics.jsonl, the list of bad images, warnings, and the loggers, of
which TensorBoard is one.

Only the first process reports; the others hold a silent Report.
"""

import contextlib
import copy
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .. import loggers
from ..files import json_line, read_lines, write_text
from .logger_thread import SECONDS_TO_BEGIN, SECONDS_TO_END, Call, LoggerThread


class Report:
    """Opens the run's logs at `step`, dropping what an earlier process logged past it; close with `close`. As a context
    it tells the loggers how the run failed, where `close` was not reached.

    names: the loggers beside TensorBoard; all get `config` (plain data) at the start.
    """

    def __init__(
        self,
        out: Path,
        *,
        step: int,
        steps: int,
        silent: bool = False,
        names: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.out, self.steps, self.silent = out, steps, silent
        left_out: list[str] = []  # lines of earlier processes that cannot be read
        self.bad_images = _listed(out, left_out)
        self._bad_known = {line["index"] for line in self.bad_images}
        self._bad_size = 0  # of the list when it was last read
        if silent:
            return
        self.console = Console(stderr=True, soft_wrap=True)
        lines = read_lines(out / "metrics.jsonl", left_out)
        kept = [line for line in lines if step and isinstance(at := line.get("step"), int | float) and at <= step]
        write_text(out / "metrics.jsonl", "".join(map(json_line, kept)))
        self._metrics = open(out / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115 (open as long as the run is)
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
        self._loggers: list[LoggerThread] = []
        self._thread: int | None = None  # that tells the loggers; none before all have begun
        self._untold: list[str] = []  # warnings that the loggers have not got
        for name in dict.fromkeys(("tensorboard", *names)):
            self._begin(name, copy.deepcopy(dict(config or {})), step)
        latest = time.monotonic() + SECONDS_TO_BEGIN
        for each in self._loggers:  # loader workers are forked after this, not while a library is imported
            each.wait(latest - time.monotonic())
        self._thread = threading.get_ident()
        for text in left_out:
            self.warn(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not self.silent:
            self._end_loggers(f"failed: {error or type(error).__name__}")
            self._close_own()

    def metrics(self, line: dict[str, Any], seconds_left: float) -> None:
        """Log one line (plain numbers; must hold step, loss, images_per_s, data_wait)."""
        if self.silent:
            return
        self._metrics.write(json_line(line))
        logged = dict(line)
        self._tell(lambda logger: logger.metrics(dict(logged)))
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
        self._metrics.write(json_line({"step": step, **named}))
        logged = dict(values)
        self._tell(lambda logger: logger.scores(group, dict(logged), step))
        self.say(f"step {step}/{self.steps}  " + "  ".join(f"{name} {value:.4g}" for name, value in named.items()))

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Log a picture (H, W, 3) uint8."""
        if not self.silent:
            logged = pixels.copy()
            self._tell(lambda logger: logger.picture(name, logged.copy(), step), pixels.nbytes)

    def bad_image(self, index: int, name: str, reason: str) -> None:
        """Count and list an unreadable image, once a run, in bad_images.jsonl. Every process may call this."""
        if index in self._bad_known:
            return
        self._bad_known.add(index)
        self.bad_images.append({"index": index, "name": name, "reason": reason})
        line = json_line(self.bad_images[-1])
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
            self._bad_known |= {line["index"] for line in _listed(self.out)}
        return len(self._bad_known)

    def merge_bad_images(self) -> int:
        """List each bad image once, whichever processes met it; returns how many there are. For one process."""
        merged = {line["index"]: line for line in _listed(self.out)}
        if merged:
            lines = [json_line(merged[index]) for index in sorted(merged)]
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
            self._keep(text)
            self._untold.append(text)
            if threading.get_ident() == self._thread:
                self._tell()

    def say_for_all(self, text: str) -> None:
        """A warning about the whole run, also of a process that is silent otherwise: the first may not be able to."""
        if not self.silent:
            self.warn(text)
            return
        try:
            self._keep(text)  # first: who reads the line may end this process
        finally:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def _keep(self, text: str) -> None:
        with open(self.out / "warnings.log", "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def close(self, state: str) -> None:
        """Flush and close everything; safe where the disk is full. state: how the run stands, for the loggers."""
        if self.silent:
            return
        self._close_own()
        self._end_loggers(state)

    def _close_own(self) -> None:
        if self._bar:
            self._bar.stop()
        with contextlib.suppress(OSError):
            self._metrics.close()

    def _begin(self, name: str, config: dict[str, Any], step: int) -> None:
        try:
            logger = loggers.load(name)()
        except Exception as problem:
            self.warn(f"the logger {name} failed and is left out from here on: {type(problem).__name__}: {problem}")
            return
        self._loggers.append(LoggerThread(name, logger, self.warn))
        self._loggers[-1].call(lambda logger: logger.begin(self.out, config, step))

    def _tell(self, call: Call | None = None, size: int = 0) -> None:
        """Make a call to every logger, after the warnings that came before it. size: bytes that it holds."""
        while self._untold:
            text = self._untold.pop(0)
            for each in self._loggers:
                each.call(methodcaller("warning", text))
        if call is not None:
            for each in self._loggers:
                each.call(call, size)

    def _end_loggers(self, state: str) -> None:
        with contextlib.suppress(OSError):  # of a warning
            self._tell()
            deadline = time.monotonic() + SECONDS_TO_END  # for all of them together: a stopped run has little time
            for each in self._loggers:
                each.end(lambda logger: logger.end(state))
            for each in self._loggers:
                each.join(deadline)
        self._loggers = []


def _listed(out: Path, left_out: list[str] | None = None) -> list[dict[str, Any]]:
    """The lines of bad_images.jsonl that are whole."""
    lines = read_lines(out / "bad_images.jsonl", left_out)
    return [line for line in lines if isinstance(line.get("index"), int) and {"name", "reason"} <= line.keys()]


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{s:02d}"
