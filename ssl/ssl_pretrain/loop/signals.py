"""Requests to stop: signals, and the end of the job's time. They are noted when they come, obeyed between two steps."""

import signal
import time
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
TIME_LIMIT = "the time limit"


def stopping() -> list[signal.Signals]:
    """The signals that stop a run: not a hang-up that was ignored when it started (nohup)."""
    return [each for each in STOPPING if each != signal.SIGHUP or signal.getsignal(each) is not signal.SIG_IGN]


class StopRequest:
    """While entered, the stopping signals are noted and do nothing else; a second Ctrl-C ends at once.

    Entered inside another one, it takes over what that one noted and its deadline, so that a command can listen from
    its first moment on and a loop inside it obeys.
    """

    def __init__(self, deadline: float | None = None) -> None:
        """deadline: the time (seconds since 1970) from which on the run shall stop by itself."""
        self.deadline = deadline
        self._noted: str | None = None

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
        self._noted = signal.Signals(number).name
