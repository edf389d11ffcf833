"""A folder of images, flat or nested: N images in D folders. One walk makes its index, which is kept (index.py)."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections import Counter
from typing import Any, final

import numpy as np

from ..errors import UserError
from . import index, names
from .index import Index, Writer
from .source import Source

FINGERPRINT_FILES = 1000
# A folder that changed this shortly before it was walked may change again in the same tick of the file system's clock.
CLOCK_TICK_NS = 100_000_000
_SUFFIXES = frozenset(b"." + case for word in names.IMAGE_EXTENSIONS for case in (word, word.upper()))  # the usual ones


@final
class FolderSource(Source):
    """Every image file at or below `path`. The folders are the classes where they can be, see names.py."""

    def __init__(self, path: str, split: str | None) -> None:
        self.path = path
        found = _index(path)
        self._listing = names.Listing(found, split)
        self.labels = self._listing.labels()
        self.classes = tuple(found.meta["classes"]) if self.labels is not None else None
        classes = f" in {len(self.classes):,} classes" if self.classes else ""
        self.description = f"folder of {len(self):,} images{classes}"
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        """Of all relative paths, and of the sizes of up to FINGERPRINT_FILES files evenly spaced among them."""
        digest = hashlib.blake2b(self._listing.digest.encode(), digest_size=16)
        for i in np.linspace(0, len(self) - 1, min(len(self), FINGERPRINT_FILES)).astype(int).tolist():
            try:
                size = os.stat(self._file(i)).st_size
            except OSError:
                size = -1
            digest.update(b"%d," % size)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._listing)

    def _file(self, i: int) -> bytes:
        return os.path.join(os.fsencode(self.path), self._listing.path(i))

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        path = self._file(index)
        with open(path, "rb") as file:
            return names.as_item(path, file.read())

    def name(self, index: int) -> str:
        """The path of the file."""
        return names.printable(self._file(index))


def splits(path: str) -> list[str]:
    """The splits of a folder: subfolders train/, val/, ... in any case."""
    return names.splits_of(_index(path))


def stored(path: str) -> Index | None:
    """The index of the folder where one was built before and no folder in it has changed since."""
    return index.stored("folder", path, lambda known: _current(path, known))


def _index(path: str) -> Index:
    return index.cached("folder", path, lambda known: _current(path, known), lambda writer: _build(path, writer))


def _current(path: str, known: Index) -> bool:
    """Whether no walked folder has changed: one stat a folder."""
    top, built = os.fsencode(path), known.meta["built_ns"]
    offsets, flat = known["walked_offsets"].tolist(), known["walked"].tobytes()
    for i, changed in enumerate(known["changed_ns"].tolist()):
        now = os.stat(os.path.join(top, flat[offsets[i] : offsets[i + 1]])).st_mtime_ns
        if now != changed or abs(built - changed) < CLOCK_TICK_NS:
            return False
    return True


def _build(path: str, writer: Writer) -> dict[str, Any]:
    built_ns = time.time_ns()
    found = names.Found()
    walked, changed, others = _walk(os.fsencode(path), found)
    if not found.lengths:
        raise UserError(_nothing(path, others))
    split_ids = names.split_of_folders(found.folders)
    under = [f.partition(b"/")[2] if i else f for f, i in zip(found.folders, split_ids, strict=True)]
    folder_labels, classes = names.classes_of_folders(under, split_ids)
    folder = np.frombuffer(found.folder, np.int64)
    meta = names.store(
        writer,
        found,
        split=np.array(split_ids, np.int64)[folder],
        under=under,
        labels=folder_labels[folder],
        columns={},
    )
    writer.add("walked", np.frombuffer(b"".join(walked), np.uint8))
    writer.add("walked_offsets", np.cumsum([0, *map(len, walked)]))
    writer.add("changed_ns", np.array(changed, np.int64))
    return meta | {"classes": classes, "built_ns": built_ns}


def _walk(top: bytes, found: names.Found) -> tuple[list[bytes], list[int], Counter[str]]:
    """Gather the images below `top`, without a stat of any file that is not a symlink.

    Links are followed, except to a folder that the path already passes through. Hidden files and folders are left out.
    Returns the walked folders, when each changed last (ns), and how many other files there are by extension.
    """
    walked: list[bytes] = []
    changed: list[int] = []
    others: Counter[str] = Counter()
    pending: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset())]
    while pending:
        folder, passed = pending.pop()
        where = os.path.join(top, folder)
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in passed:
            continue
        images: list[bytes] = []
        inner: list[bytes] = []
        walked.append(folder)
        changed.append(status.st_mtime_ns)
        try:
            with os.scandir(where) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(b"."):
                        continue
                    if entry.is_dir():
                        inner.append(name)
                    elif name[name.rfind(b".") :] in _SUFFIXES or names.is_image(name):
                        if entry.is_file() or entry.is_symlink():  # a dangling link is a bad image, a pipe is none
                            images.append(name)
                    else:
                        others[names.printable(names.extension(name)) if b"." in name else "no extension"] += 1
        except PermissionError:
            changed[-1] = -1  # never current: permissions change without a trace in the folder's time
            warnings.warn(f"{names.printable(where)}: permission denied, its images are left out", stacklevel=2)
        if images:
            found.folders.append(folder)
            found.add(len(found.folders) - 1, images)
        if inner:
            ancestors = passed | {(status.st_dev, status.st_ino)}
            pending += [(folder + b"/" + name if folder else name, ancestors) for name in sorted(inner, reverse=True)]
    return walked, changed, others


def _nothing(path: str, others: Counter[str]) -> str:
    known = ", ".join(sorted(e.decode() for e in names.IMAGE_EXTENSIONS))
    if not others:
        return f"{path} holds no files at all; it should hold images ({known}), tar or parquet shards"
    listed = ", ".join(
        f"{count:,} {ext if ext == 'no extension' else '.' + ext}" for ext, count in others.most_common(5)
    )
    return f"{path} holds no image; it holds {listed}. Images end in {known}"
