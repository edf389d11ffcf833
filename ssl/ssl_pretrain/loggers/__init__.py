"""Where a run's numbers go beside metrics.jsonl: one file a logger, found by its name (`--logger NAME ...`). TensorBoard
gets them always.

Another package adds loggers by entry points of the group `ssl_pretrain.loggers`. Importing this package needs neither
NumPy nor torch.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..errors import UserError, nearest

if TYPE_CHECKING:
    import numpy as np

GROUP = __name__


class Logger(ABC):
    """Gets what a run logs. A file here holds one final subclass; it is made without arguments, once for each start.

    Only the first process of a run makes and calls it, in a thread of its own (`loop/logger_thread.py`): training waits
    for no call, except a limited time for `begin` and `end`. Where calls come faster than a logger takes them, some are
    left out in the end, and counted. All data is plain and a copy: nothing that a logger does to it changes the run. A
    method that raises ends this logger and not the run: one warning says why, and nothing of it is called again.
    """

    @abstractmethod
    def begin(self, out: Path, config: dict[str, Any], step: int) -> None:
        """The first call. out: the run folder; config: every flag of the run, the method and the encoder as config.yaml
        has them; step: optimiser steps done, above 0 where a run is continued. An earlier start may have logged past it:
        those steps are run again."""

    @abstractmethod
    def metrics(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl: its "step", and numbers by name, None for one that is not finite."""

    def scores(self, group: str, values: dict[str, float], step: int) -> None:  # noqa: B027 (optional)
        """Numbers measured now and then, by name: the group "features", "val" or "knn"."""

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:  # noqa: B027 (optional)
        """A picture (H, W, 3) uint8. name: what it shows, like "views"; of a picture that the method made, what its rows
        show, with " | " between them. The step is 0 before training."""

    def warning(self, text: str) -> None:  # noqa: B027 (optional)
        """A warning, as in warnings.log. One given by another thread comes with the next call."""

    @abstractmethod
    def end(self, state: str) -> None:
        """The last call: "finished", "stopped: SIGTERM at step 120", or "failed: why". A run that is killed makes none."""


def check(wanted: Iterable[str]) -> None:
    """Raise UserError, with the nearest name, for a logger that there is not, and for one whose library is not installed.
    Imports nothing."""
    mine = plugins.own(GROUP)
    for name in wanted:
        if name not in mine and name not in plugins.installed(GROUP):
            raise UserError(f"--logger: unknown logger {name!r}{nearest(name, plugins.names(GROUP))}")
        if name in mine and importlib.util.find_spec(name) is None:  # our files have the names of their libraries
            raise UserError(f"--logger {name} needs {name}: pip install 'ssl-pretrain[{name}]'")


def load(name: str) -> type[Logger]:
    """The logger of that name: the one subclass of Logger that our file of that name defines, or the class that another
    package's entry point names. Raises UserError for a name there is not, TypeError where it names no single Logger."""
    found = plugins.load(GROUP, name, "logger")
    if isinstance(found, ModuleType):
        classes = [c for c in vars(found).values() if isinstance(c, type) and issubclass(c, Logger)]
        classes = [c for c in classes if c.__module__ == found.__name__]
        if len(classes) != 1:
            raise TypeError(f"{found.__name__} must define exactly one Logger, it defines {len(classes)}")
        return classes[0]
    if not (isinstance(found, type) and issubclass(found, Logger)):
        raise TypeError(f"the entry point {name!r} must name a subclass of ssl_pretrain.loggers.Logger, not {found!r}")
    return found
