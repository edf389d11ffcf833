"""Requests to stop: signals, and the end of the job's time. They are noted and acknowledged when they come, and obeyed
between two steps."""

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType

from ..distributed import environment

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
TIME_LIMIT = "the time limit"


def stopping() -> list[signal.Signals]:
    """The signals that stop a run: not a hang-up that was ignored when it started (nohup)."""
    return [each for each in STOPPING if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]


class StopRequest:
    """While entered, the stopping signals are noted and acknowledged in a line on stderr; a second Ctrl-C ends at once.

    Entered inside another one, it takes over what that one noted and its deadline, so that a command can listen from
    its first moment on and a loop inside it obeys.
    """

    def __init__(self, deadline: float | None = None) -> None:
        """deadline: the time (seconds since 1970) from which on the run shall stop by itself."""
        self.deadline = deadline
        self._noted: str | None = None
        self._tells = environment.find().rank == 0

    @property
    def signal(self) -> str | None:
        """The name of the signal that came, or "the time limit"; None as long as the run may go on."""
        if self._noted is None and self.deadline is not None and time.time() >= self.deadline:
            return TIME_LIMIT
        return self._noted

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._note) for number in stopping()}
        outer = getattr(self._before[signal.SIGTERM], "__self__", None)
        if isinstance(outer, StopRequest):
            self._noted = self._noted or outer._noted
            self.deadline = self.deadline or outer.deadline
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._noted == "SIGINT":
            raise KeyboardInterrupt
        first, self._noted = self._noted is None, signal.Signals(number).name
        if first and self._tells:
            _tell(self._noted)


def _tell(name: str) -> None:
    """One line, at once: a step may take minutes. Not by print, which the signal may have interrupted."""
    again = "; Ctrl-C again ends at once and loses the steps since the last checkpoint" if name == "SIGINT" else ""
    line = f"{name}: stopping after this step, then the run is saved and the same command continues it{again}\n"
    with suppress(OSError, ValueError):  # the terminal is gone
        os.write(sys.stderr.fileno(), (("\n" if sys.stderr.isatty() else "") + line).encode())
