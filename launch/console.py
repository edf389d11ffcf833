"""What a command prints, and what becomes of it where nobody reads it any more.

A run outlives its console: `| head`, a killed `tee`, a closed terminal and `2>&-` take the output away, and nothing else.
"""

import errno
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

import ssl_pretrain

# What is not a place to write to any more: no reader, no terminal, closed
GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESHUTDOWN, errno.ECONNRESET})
# This package's folders, where it is installed and in its sources
OWN = (
    Path(ssl_pretrain.__file__).parent,
    *(Path(__file__).parents[1] / name for name in ("launch", "eval", "methods")),
)


@contextmanager
def lasting_console(prog: str) -> Iterator[None]:
    """While entered, writing to stdout and stderr never fails, whatever is at their other end, and warnings of Python are
    lines like any other: this package's own; those of libraries are not shown (python -W shows all as they come).

    prog: the command's name, for those lines.
    """
    _open_closed()
    # What torch's C++ side prints of a lost connection is for its authors; the commands say it in their own words.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    before = sys.stdout, sys.stderr, warnings.showwarning, threading.excepthook
    sys.stdout, sys.stderr = (cast(TextIO, _Stream(stream)) for stream in (sys.stdout, sys.stderr))
    if not sys.warnoptions:
        warnings.showwarning = _shown(prog)
    threading.excepthook = _quiet_about_full_disks
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(ValueError):  # closed by somebody
                stream.flush()
        sys.stdout, sys.stderr, warnings.showwarning, threading.excepthook = before


class _Stream:
    """A text stream that loses what cannot be written; all else is as the stream inside has it."""

    def __init__(self, inside: Any) -> None:
        self._inside = inside

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inside, name)

    def write(self, text: str) -> int:
        try:
            self._inside.write(text)
        except UnicodeEncodeError:
            encoding = self._inside.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as problem:
            self._lost(problem)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._inside.flush()
        except OSError as problem:
            self._lost(problem)

    def _lost(self, problem: OSError) -> None:
        """Let what is gone for good be nowhere, what is still in the buffer included: Python writes it at its end."""
        if problem.errno not in GONE:
            return  # a log on a full disk may have room again
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._inside.fileno())
            os.close(nowhere)


def _open_closed() -> None:
    """Give what was closed before the start (`>&-`) a place: else the next file that is opened gets its number, and what
    libraries print goes into it."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            os.set_inheritable(number, True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def _shown(prog: str) -> Any:
    said: set[str] = set()

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        text = " ".join(str(message).split())
        if text not in said and any(Path(filename).is_relative_to(folder) for folder in OWN):
            said.add(text)
            print(f"{prog}: warning: {text}", file=sys.stderr, flush=True)

    return show


def _quiet_about_full_disks(args: threading.ExceptHookArgs) -> None:
    """A writer's thread that fails leaves its error for the main thread, which says it once and better."""
    if args.exc_type is not None and not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)
