"""Features on their way into the cache: arrays on the disk that any number of processes fill together, and that outlive
them.

A pass over N images is cut into blocks of BLOCK images. A process takes the next block that nobody has, fills its rows, and
marks it done; the marks are a file beside the arrays. Who works holds a lock on a file of its own: a mark whose lock
anybody can take is a dead process's, and its block is free again. So a pass that was killed goes on where it was, and
processes of one machine, or of several that share the folder, help one another without a word.

Where the file system has no locks, everybody takes whatever is not done: work may be done twice, with the same result.
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
FREE, DONE = 0, 255  # marks; any other is the number of the process at work
PREFIX = ".part-"  # of the folder of a pass; what is in it may be deleted while nobody works in it


@dataclass(frozen=True)
class Bad:
    """An image that could not be read."""

    index: int  # in the source
    name: str
    reason: str


def join(
    folder: Path, key: str, widths: Mapping[str, int], count: int, there: Callable[[], bool] = lambda: False
) -> "Pass | None":
    """The pass `key` in `folder` that others are at or have left, else a new one: arrays by name with their F, and N. None
    where `there` says that what it is for has been put meanwhile. Passes that nobody works at are removed. Raises OSError
    where there is no room."""
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
            # A name of its own: who is at an earlier pass must never take this one's files for those that it filled.
            place = folder / f"{PREFIX}{key}-{secrets.token_hex(8)}"
            _begin(place, widths, count)
        return Pass(place, widths, count)


def _begin(place: Path, widths: Mapping[str, int], count: int) -> None:
    place.mkdir(parents=True)
    try:
        for name, width in widths.items():
            path = place / f"{name}.npy"
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, width))
            # The room is taken first: a disk that is full under a memory map ends the process without a word.
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
        """Of `join`, which holds the lock."""
        self.folder, self.widths, self.count = folder, widths, count
        self.number, self._mine = _sign_in(self.folder)
        self.marks = np.memmap(self.folder / "marks", mode="r+", dtype=np.uint8, shape=(_blocks(count),))
        self.marks[self.marks == self.number] = FREE  # of a dead process that had our number
        self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r+") for name in widths}

    def claim(self) -> Iterator[range]:
        """The images of one free block after another, until there is none."""
        block = self._next()
        while block is not None:
            yield range(block * BLOCK, min((block + 1) * BLOCK, self.count))
            block = self._next()

    def _next(self) -> int | None:
        with contextlib.ExitStack() as locks:
            try:
                locks.enter_context(_locked(self.folder / "marks.lock"))
            except FileNotFoundError:  # somebody else has just finished the pass
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
        """All rows of a block are filled but those of the bad images."""
        block = images.start // BLOCK
        if bad:
            try:
                (self.folder / f"bad-{block}.json").write_text(json.dumps([asdict(one) for one in bad]))
            except FileNotFoundError:  # without locks somebody else may have filled this block, and finished the pass
                return
        for array in self.arrays.values():
            array.flush()
        self.marks[block] = DONE

    @property
    def finished(self) -> int:
        """How many images are in blocks that are done."""
        return min(self.count, BLOCK * int((self.marks == DONE).sum()))

    @property
    def whole(self) -> bool:
        """Whether all blocks are done."""
        return bool((self.marks == DONE).all())

    @property
    def gone(self) -> bool:
        """Whether another process has finished the pass, and its folder is no more."""
        return not (self.folder / "marks").exists()

    def finish(self, put: Callable[[dict[str, Path], list[Bad]], None]) -> None:
        """Once the pass is whole, by the first that comes: the rows of readable images first, and the files handed to
        `put`, which must take them away."""
        with _locked(self.folder.parent / "lock"):
            if self.gone:
                return
            if (self.folder / "finishing").exists():  # by one who died of it: some rows have moved, others have not
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
                        array[start : start + len(rows)] = array[rows]  # never ahead of what is read
                    array.flush()
            put({name: self.folder / f"{name}.npy" for name in self.widths}, bad)
            (self.folder / "marks").unlink()
            shutil.rmtree(self.folder, ignore_errors=True)

    def abandon(self) -> None:
        """Remove the pass, unless others work at it."""
        self.leave()
        with contextlib.suppress(OSError), _locked(self.folder.parent / "lock"):
            if not _anyone(self.folder):
                shutil.rmtree(self.folder, ignore_errors=True)

    def leave(self) -> None:
        """Blocks that were claimed and not done are free for others from here on."""
        self._mine.close()


def _sign_in(folder: Path) -> tuple[int, BinaryIO]:
    """A number that no living process has, and the file whose lock says that we live."""
    for number in range(1, DONE):
        file = open(folder / f"worker-{number}", "wb")  # noqa: SIM115 -- open for as long as we live
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number, file
        except BlockingIOError:
            file.close()
        except OSError:  # no locks here
            return number, file
    raise OSError(f"{DONE - 1} processes work in {folder} already")


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
