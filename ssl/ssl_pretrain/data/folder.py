"""A folder of images, flat or nested: N images in D folders. One walk makes its index, which is kept (index.py)."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from typing import Any, final

import numpy as np

from ..errors import UserError
from . import index, left_out, names
from .index import Index, Writer
from .source import Source
from .walk import Walk, walk

FINGERPRINT_FILES = 1000
# A folder that changed this shortly before it was walked may change again in the same tick of the file system's clock.
CLOCK_TICK_NS = 100_000_000


@final
class FolderSource(Source):
    """Every image file at or below `path`. The folders are the classes where they can be, see names.py."""

    def __init__(self, path: str, split: str | None, walked: Walk | None = None) -> None:
        """walked: what a walk has just found at `path`, where there was one."""
        self.path = path
        found = _index(path, walked)
        self._listing = names.Listing(found, split)
        self.labels = self._listing.labels()
        self.classes = tuple(found.meta["classes"]) if self.labels is not None else None
        self.labels_from = "the names of the folders" if self.classes else None
        self.left_out = self._listing.left_out(split)
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


def splits(path: str, walked: Walk | None = None) -> list[str]:
    """The splits of a folder: subfolders train/, val/, ... as names.py finds them."""
    return names.splits_of(_index(path, walked))


def split_like(path: str) -> list[str]:
    """Names of class folders that may be splits, but were not recognised as such."""
    found: list[str] = _index(path).meta["split_like"]
    return found


def stored(path: str) -> Index | None:
    """The index of the folder where one was built before and no folder in it has changed since."""
    return index.stored("folder", path, lambda known: _current(path, known))


def _index(path: str, walked: Walk | None = None) -> Index:
    return index.cached(
        "folder", path, lambda known: _current(path, known), lambda writer: _build(path, writer, walked)
    )


def _current(path: str, known: Index) -> bool:
    """Whether no walked folder has changed: one stat a folder."""
    if known.meta["plugins"] != sorted(map(os.fsdecode, names.readable_plugins())):
        return False
    top, built = os.fsencode(path), known.meta["built_ns"]
    offsets, flat = known["walked_offsets"].tolist(), known["walked"].tobytes()
    for i, changed in enumerate(known["changed_ns"].tolist()):
        now = os.stat(os.path.join(top, flat[offsets[i] : offsets[i + 1]])).st_mtime_ns
        if now != changed or abs(built - changed) < CLOCK_TICK_NS:
            return False
    return True


def _build(path: str, writer: Writer, known: Walk | None) -> dict[str, Any]:
    walked = known or walk(path)
    found, report = walked.found, walked.report
    if not found.lengths:
        raise UserError(_nothing(path, walked.others, report.out.get(left_out.HIDDEN, (0, []))[0]))
    for shard in walked.shards:
        report.add(left_out.OTHER_DATA, names.printable(os.fsencode(shard)))
    split_ids, under = names.split_and_class_path(found.folders)
    folder = np.frombuffer(found.folder, np.int64)
    counts = np.bincount(folder, minlength=len(found.folders))
    of_folders = names.classes_of_folders(under, split_ids, counts)
    for i in np.flatnonzero(of_folders.stray & (counts > 0)).tolist():
        first = found.file_name(int(np.argmax(folder == i)))
        where = found.folders[i] + b"/" if found.folders[i] else b""
        report.note(left_out.STRAY, names.printable(where + first), int(counts[i]))
    meta = names.store(
        writer,
        found,
        split=np.array(split_ids, np.int64)[folder],
        under=under,
        labels=of_folders.labels[folder],
        columns={},
    )
    writer.add("walked", np.frombuffer(b"".join(walked.folders), np.uint8))
    writer.add("walked_offsets", np.cumsum([0, *map(len, walked.folders)]))
    writer.add("changed_ns", np.array(walked.changed, np.int64))
    return meta | {
        "classes": of_folders.classes,
        "built_ns": walked.built_ns,
        "left_out": report.as_json(),
        "split_like": [] if any(split_ids) else names.unrecognised_splits(found.folders),
        "plugins": sorted(map(os.fsdecode, names.readable_plugins())),
    }


def _nothing(path: str, others: Counter[str], hidden: int) -> str:
    known = ", ".join(sorted(e.decode() for e in names.IMAGE_EXTENSIONS))
    if hidden and not others:
        return f"{path} holds no image; it holds {hidden:,} hidden files or folders (names with a dot in front)"
    if not others:
        return f"{path} holds no files at all; it should hold images ({known}), tar or parquet shards"
    listed = ", ".join(
        f"{count:,} {ext if ext == 'no extension' else '.' + ext}" for ext, count in others.most_common(5)
    )
    return f"{path} holds no image; it holds {listed}. Images end in {known}"
