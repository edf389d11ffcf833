"""The cache of indexes: what was found out about a data set once is kept in one file and memory-mapped afterwards.

An index file holds named arrays and a JSON description:

    magic | array | array | ... (each at a multiple of 64 bytes) | footer (JSON) | its BLAKE2b | its length | magic

The description comes last so that arrays of unknown length can be streamed. Files are written aside, synced and
renamed, so one is whole or absent; readers check the footer's digest, the file's length and the arrays' CRC (of arrays
up to `CHECKED_BYTES`: reading a cache must not cost reading the data), and anything amiss means that it is built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import mmap
import os
import shutil
import struct
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from ..files import cache_folder

MAGIC = b"SSLPIDX3"  # the last digit is the version of what the indexes hold
ALIGNMENT = 64
CHECKED_BYTES = 32 << 20
IN_MEMORY_BYTES = 1 << 30  # an index larger than this must have a file
_TRAILER = struct.Struct("<16sQ8s")  # digest of the footer, its length, magic


Ticket = tuple[Path | bytes, str]


class Damaged(Exception):
    """The bytes are not a whole index."""


class CacheUnwritable(Exception):
    """The cache could not be written; the data itself may be fine."""


class Index:
    """Named read-only arrays and `meta` (plain data), mapped from a file, or in memory. A mapped one holds a
    file descriptor, and pickles as its path.

    Raises Damaged where the bytes are not a whole index.
    """

    def __init__(self, source: Path | bytes) -> None:
        self._source = source
        buffer: bytes | mmap.mmap
        if isinstance(source, Path):
            with open(source, "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise Damaged("empty file")
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            buffer = source
        footer, self.identity = _footer(buffer)
        self.meta: dict[str, Any] = footer["meta"]
        self._arrays: dict[str, np.ndarray] = {}
        for name, (dtype, shape, offset, crc) in footer["arrays"].items():
            array = np.frombuffer(buffer, np.dtype(dtype), int(np.prod(shape)), offset).reshape(shape)
            if array.nbytes <= CHECKED_BYTES and zlib.crc32(array.data) != crc:
                raise Damaged(f"array {name!r} does not match its checksum")
            self._arrays[name] = array

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def ticket(self) -> Ticket:
        """What opens the same index again (`reopen`)."""
        return self._source, self.identity

    def __reduce__(self) -> tuple[Any, ...]:
        return reopen, self.ticket()


def reopen(source: Path | bytes, identity: str) -> Index:
    """The index that gave this ticket. Raises RuntimeError where it is no longer the same."""
    try:
        index = Index(source)
    except (OSError, Damaged) as error:
        raise RuntimeError(f"an index went away or was damaged while in use: {error}") from None
    if index.identity != identity:
        raise RuntimeError(f"{source!s} was built again while in use: the data changed during the run")
    return index


def _footer(buffer: bytes | mmap.mmap) -> tuple[dict[str, Any], str]:
    """The description at the end of an index, and a digest of it without the time of building."""
    if len(buffer) < len(MAGIC) + _TRAILER.size or buffer[: len(MAGIC)] != MAGIC:
        raise Damaged("too short, or not an index")
    digest, length, magic = _TRAILER.unpack(buffer[len(buffer) - _TRAILER.size :])
    start = len(buffer) - _TRAILER.size - length
    if magic != MAGIC or start < len(MAGIC):
        raise Damaged("cut off")
    text = buffer[start : start + length]
    if hashlib.blake2b(text, digest_size=16).digest() != digest:
        raise Damaged("the footer does not match its checksum")
    footer = json.loads(text)
    timeless = json.dumps([footer["arrays"], {k: v for k, v in footer["meta"].items() if k != "built_ns"}])
    return footer, hashlib.blake2b(timeless.encode(), digest_size=16).hexdigest()


class Writer:
    """Writes an index, array by array, in bounded memory. Raises CacheUnwritable where the file cannot take it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._arrays: dict[str, tuple[str, list[int], int, int]] = {}
        self._position = 0
        self._write(MAGIC)

    def _write(self, data: Any) -> None:
        with _cache_io():
            self._file.write(data)
        self._position += memoryview(data).nbytes

    def add(self, name: str, array: np.ndarray) -> None:
        """Keep an array of any shape under `name`."""
        array = np.ascontiguousarray(array)
        self.stream(name, array.dtype, [array.reshape(-1)])
        dtype, _, offset, crc = self._arrays[name]
        self._arrays[name] = (dtype, list(array.shape), offset, crc)

    def stream(self, name: str, dtype: np.dtype | type, chunks: Iterable[np.ndarray]) -> None:
        """Keep a 1-D array of `dtype` under `name` that comes in chunks."""
        self._write(bytes(-self._position % ALIGNMENT))
        offset, crc, dtype = self._position, 0, np.dtype(dtype)
        for chunk in chunks:
            chunk = np.ascontiguousarray(chunk, dtype)
            crc = zlib.crc32(chunk.data, crc)
            self._write(chunk.data.cast("B") if chunk.size else b"")
        count = (self._position - offset) // dtype.itemsize
        self._arrays[name] = (dtype.str, [count], offset, crc)

    def finish(self, meta: dict[str, Any]) -> None:
        """Write the description."""
        footer = json.dumps({"meta": meta, "arrays": self._arrays}).encode()
        self._write(footer)
        self._write(_TRAILER.pack(hashlib.blake2b(footer, digest_size=16).digest(), len(footer), MAGIC))


Build = Callable[[Writer], dict[str, Any]]  # writes the arrays, returns the meta
Current = Callable[[Index], bool]  # whether the data is still as the index says


def path_of(kind: str, data: str | bytes) -> Path:
    """The index file of the data at this path, by the absolute path without symlinks."""
    real = os.fsencode(os.path.realpath(data))
    return cache_folder() / f"{kind}-{hashlib.blake2b(MAGIC + real, digest_size=16).hexdigest()}.index"


def stored(kind: str, data: str | bytes, current: Current) -> Index | None:
    """The index of this data if there is a whole and current one, else None. Builds nothing."""
    try:
        index = Index(path_of(kind, data))
        return index if current(index) else None
    except (OSError, RuntimeError, Damaged, KeyError, ValueError):
        return None


def cached(kind: str, data: str | bytes, current: Current, build: Build, expected_bytes: int = 0) -> Index:
    """The index of this data: the stored one where it is whole and current, else built and stored.

    Processes that want the same index at once wait for the first to build it. Where nothing can be written the index is
    built in memory, with a warning; UserError where it is too large for that (`expected_bytes`).
    """
    if (index := stored(kind, data, current)) is not None:
        return index
    path = path_of(kind, data)
    try:
        with _cache_io():
            path.parent.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(path.parent).free) < expected_bytes:
                raise CacheUnwritable(
                    f"it takes {expected_bytes / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free"
                )
        with _locked(path) as alone:
            if (index := stored(kind, data, current)) is not None:
                return index
            if alone:
                for leftover in path.parent.glob(f"{path.name}.*.tmp"):  # of a builder that was killed
                    leftover.unlink(missing_ok=True)
            _write_aside(path, build)
        with _cache_io():
            return Index(path)
    except CacheUnwritable as error:
        reason = str(error)
    if expected_bytes > IN_MEMORY_BYTES:
        raise UserError(
            f"the index of {os.fsdecode(data)} takes about {expected_bytes / 1e9:.1f} GB, and the cache {path.parent} "
            f"cannot hold it ({reason}); set SSL_PRETRAIN_CACHE to a directory on a disk with room"
        )
    warnings.warn(
        f"the cache of indexes {path.parent} cannot be used ({reason}): {os.fsdecode(data)} is indexed in memory, "
        f"again in every process; set SSL_PRETRAIN_CACHE to a directory that can be written",
        stacklevel=2,
    )
    memory = io.BytesIO()
    writer = Writer(memory)
    writer.finish(build(writer))
    return Index(memory.getvalue())


@contextlib.contextmanager
def _cache_io() -> Iterator[None]:
    """Errors of the system in here are about the cache, not about the data that is read meanwhile."""
    try:
        yield
    except (OSError, Damaged) as error:
        raise CacheUnwritable(str(error)) from error


def _write_aside(path: Path, build: Build) -> None:
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with _cache_io():
        file = open(aside, "xb", buffering=1 << 20)  # noqa: SIM115 -- closed below, on each way out
    try:
        writer = Writer(file)
        writer.finish(build(writer))
        with _cache_io():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what is still buffered may not fit either
            file.close()
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of an index file; yields False on a file system without locks."""
    with _cache_io():
        lock = open(path.with_suffix(".lock"), "wb")  # noqa: SIM115 -- closed below; only the opening is the cache's matter
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
