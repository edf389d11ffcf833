"""A logger in a thread of its own: whatever it waits for (a server, a slow disk), training does not wait.

What a slow logger has not taken is kept in a queue of bounded length. What does not fit is left out, counted and reported.
"""

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import final

from ..loggers import Logger

MOST_CALLS = 10_000  # waiting, about 10 MB
MOST_BYTES = 64 << 20  # of pictures waiting
SECONDS_TO_BEGIN = 15.0  # for importing a library and opening a file or a connection, before the first step
SECONDS_TO_END = 30.0  # for what is still waiting, after the last checkpoint is saved

Call = Callable[[Logger], None]


@final
class LoggerThread:
    """Makes the calls of one logger, in their order. The thread is a daemon: it does not keep the process from ending.

    A call that raises ends the thread; nothing of the logger is called again. warn: gets each message, in any thread.
    """

    def __init__(self, name: str, logger: Logger, warn: Callable[[str], None]) -> None:
        self.name, self.logger, self.warn = name, logger, warn
        self.failed = False
        self.left_out = 0  # calls that did not fit into the queue
        self._waiting: deque[tuple[Call, int]] = deque()
        self._bytes = 0
        self._last = False  # no more calls come
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def call(self, call: Call, size: int = 0) -> None:
        """Make this call after those before it. size: bytes that it holds. Returns at once."""
        with self._changed:
            if self.failed or self._last:
                return
            full = len(self._waiting) >= MOST_CALLS or (size > 0 and self._bytes + size > MOST_BYTES)
            if not full:
                self._waiting.append((call, size))
                self._bytes += size
                self._changed.notify_all()
            else:
                self.left_out += 1
        if full and self.left_out == 1:
            self.warn(f"the logger {self.name} is too slow: what it has no room for is left out until it catches up")

    def wait(self, seconds: float) -> bool:
        """Wait until all calls so far are made, but no longer than this. Returns whether they are."""
        with self._changed:
            return self._changed.wait_for(lambda: self.failed or not self._waiting, seconds)

    def end(self, call: Call) -> None:
        """Make this last call. Returns at once."""
        with self._changed:
            if not self.failed:
                self._waiting.append((call, 0))
                self._last = True
                self._changed.notify_all()

    def join(self, deadline: float) -> None:
        """Wait for the last call until `deadline` (time.monotonic()) at most, and report what was not done."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.warn(f"the logger {self.name} has not ended in time: {len(self._waiting)} calls were not finished")
        if self.left_out:
            self.warn(f"the logger {self.name} was too slow: {self.left_out} calls were left out")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                call, size = self._waiting[0]
                last = self._last and len(self._waiting) == 1
            try:
                call(self.logger)
            except BaseException as problem:  # a SystemExit, too, would end the thread
                with self._changed:
                    self.failed = True
                    self._waiting.clear()
                    self._changed.notify_all()
                why = without_secrets(f"{type(problem).__name__}: {problem}")
                with suppress(OSError):  # of a full disk, which the run meets itself
                    self.warn(f"the logger {self.name} failed and is left out from here on: {why}")
                return
            with self._changed:
                self._waiting.popleft()  # not before: wait() asks whether it was made
                self._bytes -= size
                self._changed.notify_all()
            if last:
                return


def without_secrets(text: str) -> str:
    """A message without what an address holds before its @, and without the values of environment variables that hold
    keys: libraries put the address of a server and its answer into their errors."""
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("KEY|TOKEN|PASSWORD|SECRET", name):
            text = text.replace(value, "...")
    return re.sub(r"://[^/@\s]+@", "://...@", text)
