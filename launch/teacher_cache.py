"""The verb `ssl-data cache-teacher`: stores the outputs of a run's frozen network, so that the run reads them instead."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ssl_pretrain import flags

PROG = "ssl-data cache-teacher"
DESCRIPTION = (
    "Store what the frozen network of a run gives for every image that the run will see. Takes the flags of the run "
    "(ssl-pretrain), which name the folder with --teacher-cache or --tokenizer-cache. The same command continues after "
    "a kill, and makes a cache longer where the run is longer."
)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The cache (beside the flags of ssl-pretrain)."""

    store: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the stored numbers. float32 is exact; the others take half the space."""
    check: int = 0
    """Then compute this number of steps again and compare; exit code 1 where they differ."""

    def __post_init__(self) -> None:
        flags.within(self, flags.NOT_NEGATIVE, "check")


def cache_teacher(argv: list[str]) -> int:
    """Run the verb with the words behind it; returns the exit code."""
    if {"-h", "--help"} & set(argv):
        flags.parse([Cache], ["--help"], {}, prog=PROG, description=DESCRIPTION)
    own, of_run = _parted(argv)
    (cache,) = flags.parse([Cache], own, {}, prog=PROG, description=DESCRIPTION)
    from .pretrain import read_launch  # torch

    run, launch, knobs, options = read_launch(of_run)
    from ssl_pretrain.loop.cache_writer import write

    fine = write(
        run,
        knobs,
        options,
        store=cache.store,
        processes=launch.nproc if isinstance(launch.nproc, int) else 1,
        check=cache.check,
        say=lambda text: print(text, flush=True),
        progress=_progress,
    )
    print("done: ssl-pretrain with the same flags reads it" if fine else "the check failed", flush=True)
    return 0 if fine else 1


def _parted(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words of this verb's own flags, and the others."""
    own: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word in ("--store", "--check"):
            own += [word, *([value] if (value := next(words, None)) is not None else [])]
        elif word.startswith(("--store=", "--check=")):
            own.append(word)
        else:
            rest.append(word)
    return own, rest


def _progress(parts: Iterator[int], total: int) -> Iterator[int]:
    """The same parts, with a progress bar if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield from parts
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(parts, total=total, console=Console(stderr=True), transient=True, description="parts")
