"""What a run logs as rows, one for each step, for loggers whose server or database keeps what it once got.

A continued run repeats the steps since its checkpoint. A row is handed on once all the same: the run folder notes the
last step that was. Rows that an earlier start did not hand on (it was killed, or had another logger) are taken from
metrics.jsonl.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from ..files import read_lines, write_text

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Row:
    """What was logged at a step."""

    step: int
    time: float = 0.0  # seconds since 1970
    numbers: dict[str, float] = field(default_factory=dict)  # finite or not, by names like train/loss and knn/top1
    pictures: dict[str, np.ndarray] = field(default_factory=dict)  # (H, W, 3) uint8


@final
class Rows:
    """Collects rows and hands each on when the next one begins."""

    def __init__(self, out: Path, note: Path) -> None:
        """out: the run folder; note: the file that says what was handed on. Its content is in `run` and `last`."""
        self.out, self.note = out, note
        try:
            found = json.loads(note.read_text())
            run, last = found["run"], found["step"]
            fits = isinstance(run, str) and isinstance(last, int)
        except (OSError, ValueError, TypeError, KeyError):  # none yet, or of a machine that lost its power
            fits = False
        self.run: str | None = run if fits else None  # the name of the run at the server; it is no secret
        self.last = last if fits else -1  # the last step that was handed on; step 0 has pictures and scores
        self._row: Row | None = None

    def begin(self, run: str, step: int, send: Callable[[Row], None]) -> None:
        """Hand rows on to `send` from now on, at first those up to `step` in metrics.jsonl that are missing. run: kept for
        the next start; another one than before gets all rows."""
        if run != self.run:
            self.run, self.last = run, -1
            self._keep()
        self._send = send
        if (self.out / "metrics.jsonl").exists():
            for line in read_lines(self.out / "metrics.jsonl", []):
                if isinstance(at := line.get("step"), int) and at <= step:  # the file grows at this moment
                    self.metrics(line)
            self.flush()

    def metrics(self, line: dict[str, Any]) -> None:
        """Add a line of metrics.jsonl: of the loop, or of scores, whose names have a slash."""
        row = self._at(line["step"])
        if row is None:
            return
        row.time = line.get("time") or row.time
        for name, value in line.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                row.numbers[name if "/" in name else f"train/{name}"] = value

    def scores(self, group: str, values: dict[str, float], step: int) -> None:
        """Add scores."""
        if (row := self._at(step)) is not None:
            row.numbers.update({f"{group}/{name}": value for name, value in values.items()})

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add a picture."""
        if (row := self._at(step)) is not None:
            row.pictures[name] = pixels

    def flush(self) -> None:
        """Hand on the row that is being collected."""
        if self._row is not None:
            row, self._row = self._row, None
            self.last = row.step
            self._keep()  # before it is handed on: killed between the two, it is missing and not there twice
            self._send(row)

    def _at(self, step: int) -> Row | None:
        """The row of a step; None where it was handed on."""
        if self._row is not None and step != self._row.step:
            self.flush()
        if step <= self.last:
            return None
        if self._row is None:
            self._row = Row(step, time.time())
        return self._row

    def _keep(self) -> None:
        self.note.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.note, json.dumps({"run": self.run, "step": self.last}) + "\n")
