"""What a user did wrong, said in one message with the remedy; the commands print it and exit with 2, no traceback.

Errors of the system (OSError) have one vocabulary for all commands here. Whether one came from reading the user's data or
from writing results is known where it happens: `reading` makes it a UserError with the name of the data.
"""

import errno
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# The disk has no room: whoever makes some can continue. EFBIG: a limit on the size of files (ulimit -f).
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Faults of the machine, not of the file that was asked for
OF_THE_MACHINE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_RIGHTS = "get the rights for it, or choose another place"
_REMEDIES = {
    **dict.fromkeys(NO_ROOM, "free some space there"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n), or use fewer --workers"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), _RIGHTS),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENXIO), "the disk or the network file system fails: check it"),
    errno.EROFS: "it is on a read-only file system: choose another place",
    errno.ELOOP: "a symbolic link leads back to itself: remove it",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EPIPE: "what read this output has ended",
    errno.ENOMEM: "the machine has too little memory",
    errno.ENOENT: "it is not there, or not any more",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENOTEMPTY: "the folder is not empty: choose another one",
    errno.EEXIST: "choose another name",
}


class UserError(Exception):
    """An error that the user can correct. The message says what is wrong, where, and what would be right.

    reported_elsewhere: whether another process prints the message, so that this one does not.
    """

    reported_elsewhere = False


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest known word, else '; known: a, b, c' (to append to a message)."""
    known = list(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


class Unreadable(UserError):
    """The system cannot read what the user gave. The message names it."""


def system_error(problem: OSError) -> str:
    """An error of the system in one line: what it is, the file, the remedy."""
    text = (problem.strerror or str(problem) or type(problem).__name__).splitlines()[0]
    if text.startswith("[Errno"):
        text = text.partition("] ")[2]
    where = ""
    if problem.filename is not None:
        name = problem.filename
        where = f" ({os.fsdecode(name) if isinstance(name, str | bytes) else name})"
    remedy = _REMEDIES.get(problem.errno or 0)
    return f"{text}{where}" + (f": {remedy}" if remedy else "")


def of_the_machine(problem: BaseException) -> str | None:
    """What to say where an image could not be read for a fault of the machine, not of the image; None where it is the
    image's."""
    if isinstance(problem, OSError) and problem.errno in OF_THE_MACHINE:
        return f"images cannot be read: {system_error(problem)}"
    return None


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Errors of the system in here are about reading `what`, the user's: raised as Unreadable, which names it."""
    try:
        yield
    except OSError as problem:
        raise Unreadable(f"{what} cannot be read: {system_error(problem)}") from problem


def reads_data(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function whose first argument names the data that it reads: see `reading`."""

    @functools.wraps(function)
    def reads(*args: P.args, **kwargs: P.kwargs) -> T:
        with reading(str(args[0] if args else next(iter(kwargs.values())))):
            return function(*args, **kwargs)

    return reads
