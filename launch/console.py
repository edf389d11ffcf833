"""The output of a command, also after its console is closed.

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
    """A context in which writing to stdout and stderr never fails, also if the reader has gone. Python warnings of this
    package are printed as one line each; those of libraries are not shown (python -W shows all unchanged).

    prog: the command's name, for these lines.
    """
    _open_closed()
    # torch's C++ code prints details of a lost connection. The commands report it in their own words.
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
            with suppress(ValueError):  # already closed
                stream.flush()
        sys.stdout, sys.stderr, warnings.showwarning, threading.excepthook = before


class _Stream:
    """A text stream that drops what cannot be written. Everything else is passed to the stream inside."""

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
        """Replace a stream whose reader has gone by the null device, also for its buffer, which Python writes at exit."""
        if problem.errno not in GONE:
            return  # a log on a full disk may have room again
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._inside.fileno())
            os.close(nowhere)


def _open_closed() -> None:
    """Open the null device for each standard stream that was closed before the start (`>&-`). Otherwise the next file that
    is opened gets its number, and the output of libraries would go into that file."""
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
