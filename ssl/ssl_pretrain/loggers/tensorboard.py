"""TensorBoard: curves and pictures in the folder `tensorboard/` of the run."""

import math
from pathlib import Path
from typing import Any, final

import numpy as np

from . import Logger


@final
class TensorBoard(Logger):
    """Event files that `tensorboard --logdir RUN/tensorboard` shows; the curves of metrics.jsonl are named train/..."""

    def begin(self, out: Path, config: dict[str, Any], step: int) -> None:
        """Open a new event file, and drop what an earlier start logged past `step`."""
        from torch.utils.tensorboard import SummaryWriter  # a second to import; only the first process needs it

        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=30)

    def metrics(self, line: dict[str, Any]) -> None:
        """See `Logger.metrics`."""
        for name, value in line.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                self._board.add_scalar(f"train/{name}", value, line["step"])

    def scores(self, group: str, values: dict[str, float], step: int) -> None:
        """See `Logger.scores`."""
        for name, value in values.items():
            if math.isfinite(value):  # what is not, it says in lines of its own
                self._board.add_scalar(f"{group}/{name}", value, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """See `Logger.picture`."""
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def end(self, state: str) -> None:
        """Write what is still to be written, and close the file."""
        self._board.close()
