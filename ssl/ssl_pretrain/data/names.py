"""What the names of images say: the order of the samples, the split and the class of each. For folders and tar shards.

N samples in D folders. Names are bytes as the file system has them, kept back to back in one buffer with offsets, so a
million of them are a few arrays and not a million Python objects.
"""

from __future__ import annotations

import hashlib
import io
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError
from .index import Index, Writer

IMAGE_EXTENSIONS = frozenset(
    b"jpg jpeg jfif png webp bmp gif tif tiff ppm pgm npy".split()  # npy: a decoded uint8 (H, W, C) array
)
SPLIT_WORDS = ("train", "val", "validation", "valid", "test")
_SPLIT_IDS = {word.encode(): i + 1 for i, word in enumerate(SPLIT_WORDS)}  # 0: of no split
MAX_CLASSES = 10_000_000
_CHUNK = 1 << 14  # names copied at a time


def extension(name: bytes) -> bytes:
    """What follows the last dot, in lower case."""
    return name.rpartition(b".")[2].lower()


def is_image(name: bytes) -> bool:
    """Whether a file is an image by its extension."""
    return b"." in name and extension(name) in IMAGE_EXTENSIONS


def printable(name: bytes) -> str:
    """A name for messages: one line, valid Unicode, whatever the bytes."""
    text = os.fsdecode(name)
    return text if text.isprintable() else repr(text)[1:-1]


def as_item(name: bytes, data: bytes) -> bytes | np.ndarray:
    """The sample in a file: its bytes, or for .npy the array (H, W, C) uint8. Raises ValueError for another array."""
    if extension(name) != b"npy":
        return data
    pixels = np.load(io.BytesIO(data), allow_pickle=False)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"{printable(name)} holds {pixels.dtype} {pixels.shape}, not uint8 (height, width, channels)")
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def split_of_token(name: str) -> int:
    """The split id that a shard's file name says as a whole token ('x-train-000.tar'), 0 for none."""
    tokens = name.lower().replace("_", "-").replace(".", "-").split("-")
    return next((_SPLIT_IDS[token.encode()] for token in tokens if token.encode() in _SPLIT_IDS), 0)


def list_shards(path: str, ending: str) -> list[tuple[int, str]]:
    """The shards at `path` (one file, or a directory with them at its top, in data/, or in folders named as splits), as
    (split id, path within the data; "" for one file), sorted by path."""
    if os.path.isfile(path):
        return [(split_of_token(os.path.basename(path)), "")]
    shards = []
    for name in sorted(os.listdir(path)):
        inner = os.path.join(path, name)
        folder_split = _SPLIT_IDS.get(os.fsencode(name.lower()), 0)
        if name.startswith("."):
            continue
        if (folder_split or name.lower() == "data") and os.path.isdir(inner):
            files = sorted(file for file in os.listdir(inner) if file.lower().endswith(ending) and file[0] != ".")
            shards += [(folder_split or split_of_token(file), f"{name}/{file}") for file in files]
        elif name.lower().endswith(ending) and os.path.isfile(inner):
            shards.append((split_of_token(name), name))
    return shards


def split_of_folders(folders: Sequence[bytes]) -> list[int]:
    """The split id of each folder (a path; it holds images itself) by its first part; all 0 where there are no splits.

    A folder `train` alone beside others may be the class of railway vehicles: the data is split where every image lies
    in a folder named as a split, or where there is `train` and at least one more.
    """
    ids = [_SPLIT_IDS.get(folder.split(b"/", 1)[0].lower(), 0) for folder in folders]
    found = set(ids) - {0}
    split = bool(found) and (0 not in ids or (_SPLIT_IDS[b"train"] in found and len(found) > 1))
    return ids if split else [0] * len(ids)


def classes_of_folders(folders: Sequence[bytes], splits: Sequence[int]) -> tuple[np.ndarray, list[str] | None]:
    """The class of each folder, (D,) int64 with -1 for none, and the class names.

    `folders` are paths under their split's own folder. Classes are the first folder level that has at least two names,
    provided every image lies that deep or deeper. All splits count together, so that they agree on the classes; a split
    with an image at its top has none. Where the data is split, folders outside of it have none.
    """
    parts = [folder.split(b"/") if folder else [] for folder in folders]
    flat = {split for split, part in zip(splits, parts, strict=True) if not part}
    if any(splits):
        flat.add(0)
    labelled = [split not in flat for split in splits]
    chosen = [part for part, ok in zip(parts, labelled, strict=True) if ok]
    depth = 0
    while chosen and all(len(part) > depth for part in chosen):
        classes = sorted({part[depth] for part in chosen})
        if len(classes) > 1:
            number = {name: i for i, name in enumerate(classes)}
            labels = [number[p[depth]] if ok else -1 for p, ok in zip(parts, labelled, strict=True)]
            return np.array(labels, np.int64), [os.fsdecode(name) for name in classes]
        depth += 1
    return np.full(len(folders), -1, np.int64), None


def class_names(largest: int, named: dict[int, str]) -> list[str]:
    """The names of classes 0..largest, or of as many as `named` has; a class without a name is called by its number."""
    count = max([largest, *named]) + 1
    if count > MAX_CLASSES:
        raise UserError(f"the label {largest} is no class number: more than {MAX_CLASSES:,} classes are not supported")
    return [named.get(i, str(i)) for i in range(count)]


@dataclass
class Found:
    """Names being gathered: append-only, compact."""

    folders: list[bytes] = field(default_factory=list)  # paths, "/" between the parts, "" for the top
    flat: bytearray = field(default_factory=bytearray)
    lengths: array[int] = field(default_factory=lambda: array("q"))  # (N,) of each file name
    stems: array[int] = field(default_factory=lambda: array("q"))  # (N,) bytes up to its first dot
    folder: array[int] = field(default_factory=lambda: array("q"))  # (N,) which folder

    def add(self, folder: int, names: list[bytes]) -> None:
        """Add files of one folder; every name has a dot."""
        self.flat += b"".join(names)
        self.lengths.extend(map(len, names))
        self.stems.extend([name.index(b".", 1) for name in names])
        self.folder.extend([folder] * len(names))


def store(
    writer: Writer,
    found: Found,
    *,
    split: np.ndarray,
    under: Sequence[bytes],
    labels: np.ndarray,
    columns: dict[str, np.ndarray],
) -> dict[str, Any]:
    """Write the samples in order: by split, then stem (the file name up to its first dot), then folder, then file name.

    split, labels: (N,) int64 ids (labels: -1 unknown); under: the path of each folder under its split's own folder;
    columns: more arrays (N,) to keep. Returns the meta: the rows of each split, and a digest of its names and columns.
    """
    stops = np.cumsum(np.frombuffer(found.lengths, np.int64))
    starts = stops - np.frombuffer(found.lengths, np.int64)
    folder = np.frombuffer(found.folder, np.int64)
    rank = np.unique(np.array(under, object), return_inverse=True)[1].astype(np.int64)
    order = _order(
        found.flat, starts, starts + np.frombuffer(found.stems, np.int64), stops, split=split, rank=rank[folder]
    )

    split, folder = split[order], folder[order]
    starts, stops = starts[order], stops[order]
    kept = {name: column[order] for name, column in columns.items()}
    rows: dict[str, list[int]] = {}
    digests: dict[str, str] = {}

    def parts() -> Iterator[np.ndarray]:
        """The names in order; notes the rows and the digest of each split on the way."""
        for number, word in enumerate(("", *SPLIT_WORDS)):
            first, last = np.searchsorted(split, [number, number + 1]).tolist()
            if first == last:
                continue
            rows[word] = [first, last]
            digest = hashlib.blake2b(digest_size=16)
            for chunk in _gather(found.flat, starts[first:last], stops[first:last]):
                digest.update(chunk.data)
                yield chunk
            digest.update((stops[first:last] - starts[first:last]).data)
            used, which = np.unique(folder[first:last], return_inverse=True)
            paths = [under[i] for i in used]
            by_path = np.argsort(np.array(paths, object), kind="stable")
            digest.update(np.argsort(by_path)[which].data)  # the folder of each name, numbered by path
            digest.update(b"\0".join(sorted(paths)))
            if "size" in kept:
                digest.update(kept["size"][first:last].data)
            digests[word] = digest.hexdigest()

    writer.stream("names", np.uint8, parts())
    writer.add("offsets", np.concatenate([[0], np.cumsum(stops - starts)]))
    writer.add("folder", folder.astype(np.int32))
    writer.add("folders", np.frombuffer(b"".join(found.folders), np.uint8))
    writer.add("folder_offsets", np.cumsum([0, *map(len, found.folders)]))
    writer.add("labels", labels[order])
    for name, column in kept.items():
        writer.add(name, column)
    return {"rows": rows, "digests": digests}


def _gather(flat: bytearray, starts: np.ndarray, stops: np.ndarray) -> Iterator[np.ndarray]:
    """The slices flat[start:stop], back to back, some thousands at a time: (bytes,) uint8."""
    buffer = np.frombuffer(flat, np.uint8)
    for at in range(0, len(starts), _CHUNK):
        lengths = stops[at : at + _CHUNK] - starts[at : at + _CHUNK]
        ends = np.cumsum(lengths)
        positions = np.arange(ends[-1]) + np.repeat(starts[at : at + _CHUNK] - (ends - lengths), lengths)
        yield buffer[positions]


def _order(
    flat: bytearray, starts: np.ndarray, stems: np.ndarray, stops: np.ndarray, *, split: np.ndarray, rank: np.ndarray
) -> np.ndarray:
    """The order (N,) by split, bytes [start, stem), rank of the folder, bytes [stem, stop).

    Strings are compared eight bytes at a time as big-endian integers, and only among those still tied, so the work is a
    few vectorised sorts whatever the length of the longest name.
    """
    order = np.argsort(split, kind="stable")
    first = np.ones(len(order), bool)  # whether a tie begins at this place of the order
    first[1:] = split[order][1:] != split[order][:-1]

    def refine(key: np.ndarray, places: np.ndarray) -> None:
        tie = np.cumsum(first)[places]
        by_key = np.lexsort((key, tie))
        order[places] = order[places][by_key]
        key = key[by_key]  # `tie` was sorted, and stays as it is
        first[places[1:]] |= (key[1:] != key[:-1]) & (tie[1:] == tie[:-1])

    def tied() -> np.ndarray:
        return np.flatnonzero(~(first & np.append(first[1:], True)))

    padded = bytes(flat) + bytes(8)
    words = np.ndarray(len(flat) + 1, ">u8", padded, strides=(1,))  # the eight bytes from every position on
    masks = np.array([0] + [(1 << 64) - (1 << (64 - 8 * n)) for n in range(1, 9)], np.uint64)

    def refine_bytes(begin: np.ndarray, end: np.ndarray) -> None:
        done = 0
        while len(places := tied()):
            left = np.clip(end[order[places]] - begin[order[places]] - done, 0, None)
            if not left.any():
                return
            at = np.minimum(begin[order[places]] + done, len(flat))
            refine(words[at].astype(np.uint64) & masks[np.minimum(left, 8)], places)
            done += 8

    refine_bytes(starts, stems)
    if len(places := tied()):
        refine(rank[order[places]], places)
    refine_bytes(stems, stops)
    return order


class Listing:
    """The rows of one split (None: all) in an index written by `store`."""

    def __init__(self, index: Index, split: str | None) -> None:
        self.index = index
        rows = index.meta["rows"]
        self.start: int = 0 if split is None else rows[split][0]
        self.stop: int = len(index["folder"]) if split is None else rows[split][1]
        digests = index.meta["digests"]
        parts = digests if split is None else {"": digests[split]}
        self.digest = "".join(parts.values()) if len(parts) == 1 else repr(sorted(parts.items()))

    def __len__(self) -> int:
        return self.stop - self.start

    def row(self, i: int) -> int:
        """The row in the index of sample i of the split. Raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self.start + i

    def path(self, i: int) -> bytes:
        """The path of sample i within the data."""
        row = self.row(i)
        folder = int(self.index["folder"][row])
        path = _slice(self.index["folders"], self.index["folder_offsets"], folder)
        return (path + b"/" if path else b"") + _slice(self.index["names"], self.index["offsets"], row)

    def labels(self) -> np.ndarray | None:
        """(N,) int64 with -1 where unknown; None where no sample has a label."""
        labels = np.array(self.index["labels"][self.start : self.stop])
        return labels if (labels >= 0).any() else None


def _slice(flat: np.ndarray, offsets: np.ndarray, i: int) -> bytes:
    return flat[int(offsets[i]) : int(offsets[i + 1])].tobytes()


def splits_of(index: Index) -> list[str]:
    """The splits of an index written by `store`."""
    return [word for word in index.meta["rows"] if word]
