"""Incomplete cache entries: arrays on the disk that any number of processes fill together, and that survive them.

A pass over N images is divided into blocks of BLOCK images. A process claims the next free block, fills its rows, and
marks it as done; the marks are in a file next to the arrays. Each working process holds a lock on its own file. A claim
whose lock is free belongs to a dead process, so its block is free again. So a killed pass continues where it stopped,
and processes of one machine, or of several that share the folder, divide the work without communication.

If the file system has no locks, every process takes all blocks that are not done: work may be done twice, with the same
result.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, final

import numpy as np

BLOCK = 1024  # images
FREE, DONE = 0, 255  # marks; any other value is the number of the process that works on the block
PREFIX = ".part-"  # of the folder of a pass; it may be deleted while no process works in it


@dataclass(frozen=True)
class Bad:
    """An image that could not be read."""

    index: int  # index in the source
    name: str
    reason: str


def join(
    folder: Path, key: str, widths: Mapping[str, int], count: int, there: Callable[[], bool] = lambda: False
) -> "Pass | None":
    """Join the pass `key` in `folder` that other processes work on or have left, or start a new one: arrays by name
    with their F, and N. None if `there` says that the result exists meanwhile. Other passes without a working process
    are removed. Raises OSError if there is no space."""
    with _locked(folder / "lock"):
        if there():
            return None
        place: Path | None = None
        for other in folder.glob(f"{PREFIX}*"):
            usable = (other / "marks").exists() and not (other / "finishing").exists()
            if usable and other.name.startswith(f"{PREFIX}{key}-"):
                place = other
            elif not _anyone(other):
                shutil.rmtree(other, ignore_errors=True)
        if place is None:
            # A unique name: a process of an earlier pass must never mistake this pass's files for its own.
            place = folder / f"{PREFIX}{key}-{secrets.token_hex(8)}"
            _begin(place, widths, count)
        return Pass(place, widths, count)


def _begin(place: Path, widths: Mapping[str, int], count: int) -> None:
    place.mkdir(parents=True)
    try:
        for name, width in widths.items():
            path = place / f"{name}.npy"
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
            # Space is reserved first: if a disk becomes full under a memory map, the process ends without an error
            # message.
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        (place / "marks").write_bytes(bytes(_blocks(count)))
    except OSError:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


@final
class Pass:
    """One pass: arrays (N, F) float32 by name, filled at the images' own rows."""

    def __init__(self, folder: Path, widths: Mapping[str, int], count: int) -> None:
        """Called by `join`, which holds the lock."""
        self.folder, self.widths, self.count = folder, widths, count
        self.number, self._mine = _sign_in(self.folder)
        self.marks = np.memmap(self.folder / "marks", mode="r+", dtype=np.uint8, shape=(_blocks(count),))
        self.marks[self.marks == self.number] = FREE  # of a dead process that had the same number
        self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r+") for name in widths}

    def claim(self) -> Iterator[range]:
        """Yields the images of one free block after another, until there is none."""
        block = self._next()
        while block is not None:
            yield range(block * BLOCK, min((block + 1) * BLOCK, self.count))
            block = self._next()

    def _next(self) -> int | None:
        with contextlib.ExitStack() as locks:
            try:
                locks.enter_context(_locked(self.folder / "marks.lock"))
            except FileNotFoundError:  # another process has just finished the pass
                return None
            gone: dict[int, bool] = {}
            for block, mark in enumerate(self.marks.tolist()):
                if mark not in (FREE, DONE, self.number) and mark not in gone:
                    gone[mark] = not _alive(self.folder / f"worker-{mark}")
                if mark == FREE or gone.get(mark):
                    self.marks[block] = self.number
                    return block
        return None

    def done(self, images: range, bad: list[Bad]) -> None:
        """Mark a block as done: all its rows are filled except those of the bad images."""
        block = images.start // BLOCK
        if bad:
            try:
                (self.folder / f"bad-{block}.json").write_text(json.dumps([asdict(one) for one in bad]))
            except FileNotFoundError:  # without locks another process may have filled this block and finished the pass
                return
        for array in self.arrays.values():
            array.flush()
        self.marks[block] = DONE

    @property
    def finished(self) -> int:
        """Number of images in blocks that are done."""
        return min(self.count, BLOCK * int((self.marks == DONE).sum()))

    @property
    def whole(self) -> bool:
        """Whether all blocks are done."""
        return bool((self.marks == DONE).all())

    @property
    def gone(self) -> bool:
        """Whether another process has finished the pass, so its folder does not exist any more."""
        return not (self.folder / "marks").exists()

    def finish(self, put: Callable[[dict[str, Path], list[Bad]], None]) -> None:
        """Called once the pass is complete; the first process does it: move the rows of readable images to the front
        and give the files to `put`, which must move them away."""
        with _locked(self.folder.parent / "lock"):
            if self.gone:
                return
            if (self.folder / "finishing").exists():  # a process died here: only some rows have moved
                shutil.rmtree(self.folder, ignore_errors=True)
                return
            found = (json.loads(path.read_text()) for path in self.folder.glob("bad-*.json"))
            bad = sorted((Bad(**one) for each in found for one in each), key=lambda one: one.index)
            (self.folder / "finishing").touch()
            if bad:
                kept = np.delete(np.arange(self.count), [one.index for one in bad])
                for array in self.arrays.values():
                    for start in range(0, len(kept), BLOCK):
                        rows = kept[start : start + BLOCK]
                        array[start : start + len(rows)] = array[rows]  # never overtakes the rows that are read
                    array.flush()
            put({name: self.folder / f"{name}.npy" for name in self.widths}, bad)
            (self.folder / "marks").unlink()
            shutil.rmtree(self.folder, ignore_errors=True)

    def abandon(self) -> None:
        """Remove the pass, unless other processes work on it."""
        self.leave()
        with contextlib.suppress(OSError), _locked(self.folder.parent / "lock"):
            if not _anyone(self.folder):
                shutil.rmtree(self.folder, ignore_errors=True)

    def leave(self) -> None:
        """Release blocks that were claimed but are not done."""
        self._mine.close()


def _sign_in(folder: Path) -> tuple[int, BinaryIO]:
    """A number that no living process has, and the file whose lock shows that this process is alive."""
    for number in range(1, DONE):
        file = open(folder / f"worker-{number}", "wb")  # noqa: SIM115 -- open for as long as we live
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number, file
        except BlockingIOError:
            file.close()
        except OSError:  # no locks here
            return number, file
    raise OSError(f"already {DONE - 1} processes work in {folder}")


def _alive(path: Path) -> bool:
    """Whether a process holds the lock of that file."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _anyone(folder: Path) -> bool:
    return any(_alive(path) for path in folder.glob("worker-*"))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        with contextlib.suppress(OSError):  # no locks here
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
