"""What the names of images say: the order of the samples, the split and the class of each. For folders and tar shards.

N samples in D folders. Names are bytes as the file system has them, kept back to back in one buffer with offsets, so a
million of them are a few arrays and not a million Python objects.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError
from .index import Index, Writer
from .left_out import EXAMPLES, NO_SPLIT, LeftOut

IMAGE_EXTENSIONS = frozenset(
    b"jpg jpeg jpe jfif png apng webp bmp gif tif tiff ppm pgm pbm pnm pfm mpo jp2 j2k j2c jpc jpf jpx avif avifs "
    b"npy".split()  # npy: a decoded (H, W, C) array of uint8 or uint16
)
# Image formats that a package of the extra `formats` reads: extension, package, the module that has it.
PLUGINS = {
    b"heic": ("pillow-heif", "pillow_heif"),
    b"heif": ("pillow-heif", "pillow_heif"),
    b"hif": ("pillow-heif", "pillow_heif"),
    b"jxl": ("pillow-jxl-plugin", "pillow_jxl"),
}
# Image files that nothing here reads, and what to do with them.
CONVERT = frozenset(b"cr2 cr3 nef arw dng raf orf rw2 psd exr hdr dcm dds tga svg eps ico".split())
COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
SPLIT_WORDS = ("train", "val", "validation", "valid", "test")
_SPLIT_IDS = {word.encode(): i + 1 for i, word in enumerate(SPLIT_WORDS)}  # 0: of no split
_SPELLINGS = {
    **{word: word for word in SPLIT_WORDS},
    "training": "train",
    "trainval": "train",
    "train_val": "train",
    "train-val": "train",
    "testing": "test",
    "tests": "test",
    "validating": "validation",
}
# Words that may mean images to test on. They are no splits, but pretraining does not take them for classes.
_PERHAPS = frozenset("eval evaluation dev devel holdout heldout hold_out held_out trn tst imagestr imagests".split())
_BESIDE = "(?:images?|imgs?|seg|data|dataset|set|split|folder|photos?)"  # words that say nothing more about a split
_SPLIT_NAME = re.compile(
    rf"(?:split=)?(?:{_BESIDE}[ _-]?)?({'|'.join(sorted(_SPELLINGS, key=len, reverse=True))})"
    rf"(?:[ _-]?{_BESIDE})?(?:[ _-]?\d{{1,4}})?",
    re.IGNORECASE,
)
SPLIT_DEPTH = 4  # folder levels that are looked through for splits: ILSVRC/Data/CLS-LOC/train is the deepest known
STRAY_SHARE = 20  # one image of so many (or a single one) may lie beside the class folders without taking their labels
MAX_CLASSES = 10_000_000
_CHUNK = 1 << 14  # names copied at a time


def extension(name: bytes) -> bytes:
    """What follows the last dot, in lower case."""
    return name.rpartition(b".")[2].lower()


def is_image(name: bytes) -> bool:
    """Whether a file is an image by its extension, of a format that can be read."""
    return b"." in name and extension(name) in (IMAGE_EXTENSIONS | readable_plugins())


@functools.cache
def readable_plugins() -> frozenset[bytes]:
    """Those extensions of PLUGINS whose package is installed."""
    return frozenset(ext for ext, (_, module) in PLUGINS.items() if importlib.util.find_spec(module) is not None)


def why_not(ext: bytes) -> str:
    """Why a file of this extension (lower case, no dot) is no image to us, as a reason of a LeftOut."""
    if ext in PLUGINS:
        return f".{ext.decode()}, which needs {PLUGINS[ext][0]}: pip install 'ssl-pretrain[formats]'"
    if ext in CONVERT:
        return f".{ext.decode()}, a format that is not read: convert to PNG, JPEG or .npy"
    return f".{printable(ext)}"


def stem(path: str) -> str:
    """A file's name without its folders and its extension."""
    return os.path.basename(path).rpartition(".")[0]


def printable(name: bytes) -> str:
    """A name for messages: one line, valid Unicode, whatever the bytes."""
    text = os.fsdecode(name)
    return text if text.isprintable() else repr(text)[1:-1]


def as_item(name: bytes, data: bytes) -> bytes | np.ndarray:
    """The sample in a file: its bytes, or for .npy the array (H, W, C) uint8 or uint16. Raises ValueError with the
    remedy for another array."""
    if extension(name) != b"npy":
        return data
    try:
        pixels = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a damaged header makes numpy raise nearly anything
        raise ValueError(f"damaged .npy: {one_line(error)}") from None
    if not isinstance(pixels, np.ndarray):
        raise ValueError("an .npz archive named .npy: save each image with numpy.save")
    if pixels.dtype not in (np.uint8, np.uint16) or pixels.ndim not in (2, 3):
        raise ValueError(
            f".npy of {pixels.dtype} {pixels.shape}: save images as uint8 or uint16 (height, width, channels), scaled "
            f"to the full range of the type"
        )
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def one_line(error: BaseException) -> str:
    """What an exception says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def split_of_name(name: str) -> int:
    """The split id that a folder's name spells ("Train", "training", "seg_test", "val2017", "test_images"), 0 for none."""
    spelled = _SPLIT_NAME.fullmatch(name)
    return _SPLIT_IDS[_SPELLINGS[spelled[1].lower()].encode()] if spelled else 0


def _words(name: str) -> list[str]:
    """The words of a name, in lower case: "asl_alphabet_train", "trainA" and "PublicTest" have several."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def split_among_words(name: str) -> int:
    """The split id that one word of a name is ("asl_alphabet_train", "trainA"), 0 for none, or for several that differ."""
    found = {split_of_name(word) for word in _words(name)} - {0}
    return found.pop() if len(found) == 1 else 0


def canonical_split(name: str) -> str:
    """The name by which a split is known that is spelled so ("training" is "train"); other names in lower case."""
    return ("", *SPLIT_WORDS)[split_of_name(name) or split_among_words(name)] or name.lower()


def split_like(names: Iterable[str]) -> list[str]:
    """Those of the names of folders or shards (all at one level) that may be splits: some are spelled as one, or half
    of all have a word of one in them."""
    names = sorted(set(names))
    exact = [name for name in names if split_of_name(name) or name.lower() in _PERHAPS]
    words = [name for name in names if split_among_words(name) or _PERHAPS & set(_words(name))]
    return exact or (words if 2 * len(words) >= len(names) else [])


def split_of_token(name: str) -> int:
    """The split id that a shard's file name says as a whole token ('x-train-000.tar'), 0 for none."""
    tokens = re.split(r"[-_. ]", name)
    return next((split for token in tokens if (split := split_of_name(token))), 0)


def split_of_shard(path: str) -> int:
    """The split id of a shard by its path within the data ("/" between the parts): of the innermost folder whose name
    spells one, else of a token of its file name, else of a word in a folder's name."""
    *folders, file = path.split("/")
    ways = (map(split_of_name, reversed(folders)), [split_of_token(file)], map(split_among_words, reversed(folders)))
    return next((split for way in ways for split in way if split), 0)


def with_splits(paths: Iterable[str]) -> list[tuple[int, str]]:
    """(split id, path) of shards, sorted by path."""
    return [(split_of_shard(path), path) for path in sorted(paths)]


def braces(path: str) -> list[str]:
    """The paths that a pattern with braces stands for, {000..003} or {a,b}; [] where there are none, or it is the path
    of something that is there."""
    if "{" not in path or os.path.exists(path):
        return []
    done, pending = [], [path]
    while pending:
        text = pending.pop(0)
        found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
        if found is None:
            done.append(text)
            continue
        if found[3] is not None:
            inner = found[3].split(",")
        else:
            first, last = int(found[1]), int(found[2])
            if last - first >= 1_000_000:
                raise UserError(f"{path} stands for {last - first + 1:,} files: 1,000,000 are supported")
            width = len(found[1]) if len(found[1]) == len(found[2]) or found[1].startswith("0") else 1
            inner = [f"{number:0{width}}" for number in range(first, last + 1)]
        pending += [text[: found.start()] + word + text[found.end() :] for word in inner]
    return done if done != [path] else []


def split_of_folders(folders: Sequence[bytes]) -> list[int]:
    """The split id of each folder (a path; it holds images itself); all 0 where there are no splits."""
    return split_and_class_path(folders)[0]


def split_and_class_path(folders: Sequence[bytes]) -> tuple[list[int], list[bytes]]:
    """The split id of each folder (a path; it holds images itself), and its path without the split's own folder.

    The splits are the first level, of SPLIT_DEPTH, whose names tell. A folder `train` alone beside others may be the class
    of railway vehicles: a level has the splits where every image lies in a folder named as a split there, or where there
    is `train` and at least one more (below the top: with half of the folders at least). A split's name within a longer one
    ("asl_alphabet_train") counts where every folder of the level has one, and train is among at least two.
    """
    parts = [folder.split(b"/") for folder in folders]
    names = {part: os.fsdecode(part) for path in parts for part in path[:SPLIT_DEPTH]}
    train = _SPLIT_IDS[b"train"]
    for spelled in (split_of_name, split_among_words):
        known = {part: spelled(name) for part, name in names.items()}
        if not any(known.values()):
            continue
        for depth in range(SPLIT_DEPTH):
            ids = [known[path[depth]] if len(path) > depth else 0 for path in parts]
            found = set(ids) - {0}
            outside = ids.count(0)
            pair = train in found and len(found) > 1
            exact = spelled is split_of_name and (
                (pair and (depth == 0 or 2 * outside <= len(ids))) or (bool(found) and not outside)
            )
            if exact or (pair and not outside):
                twice = _repeated(parts, ids, depth + 1)
                rest = [
                    b"/".join(p[:depth] + p[depth + 1 + (i in twice) :]) if i else f
                    for p, f, i in zip(parts, folders, ids, strict=True)
                ]
                return ids, rest
    return [0] * len(folders), list(folders)


def _repeated(parts: Sequence[Sequence[bytes]], ids: Sequence[int], depth: int) -> set[int]:
    """The splits whose images all lie in one folder at that depth that spells the split again (train/train)."""
    below: dict[int, set[bytes]] = {}
    for path, split in zip(parts, ids, strict=True):
        below.setdefault(split, set()).add(path[depth] if len(path) > depth else b"")
    return {
        split
        for split, names in below.items()
        if split and len(names) == 1 and split_of_name(os.fsdecode(min(names))) == split
    }


def unrecognised_splits(folders: Sequence[bytes]) -> list[str]:
    """Paths of folders that may be splits (`split_like`) at the first level that has several."""
    parts = [folder.split(b"/") for folder in folders if folder]
    for depth in range(SPLIT_DEPTH):
        level = {path[depth] for path in parts if len(path) > depth}
        if len(level) > 1:
            above = "".join(os.fsdecode(part) + "/" for part in parts[0][:depth])
            return [above + name for name in split_like(map(os.fsdecode, level))]
    return []


@dataclass
class FolderClasses:
    """What `classes_of_folders` found."""

    labels: np.ndarray  # (D,) int64, -1 for none
    classes: list[str] | None
    stray: np.ndarray  # (D,) bool: lies beside the class folders of a split that has labels


def classes_of_folders(folders: Sequence[bytes], splits: Sequence[int], counts: np.ndarray) -> FolderClasses:
    """The class of each of D folders.

    `folders` are paths under their split's own folder; `counts` (D,) says how many images lie in each. Classes are the
    first folder level that has at least two names. All splits count together, so that they agree on the classes. A split
    has none where more images than a few strays (one in STRAY_SHARE, or a single one) lie above that level, or where all
    of it lies in one folder that no split with several has (Tiny-ImageNet's val/images and test/images). Where the data
    is split, folders outside of it have none.
    """
    parts = [folder.split(b"/") if folder else [] for folder in folders]
    split_of = np.array(splits, np.int64)
    depths = np.array([len(part) for part in parts])
    deep = set(splits) - ({0} if any(splits) else set())  # the splits that may have classes
    for depth in range(int(depths.max(initial=0))):
        for split in list(deep):
            mine = split_of == split
            loose, rest = int(counts[mine & (depths <= depth)].sum()), int(counts[mine & (depths > depth)].sum())
            if loose > max(1, (loose + rest) // STRAY_SHARE) or 4 * loose > rest:
                deep.discard(split)
        at = [i for i, part in enumerate(parts) if splits[i] in deep and len(part) > depth]
        if len({parts[i][depth] for i in at}) < 2:
            continue
        of_split: dict[int, set[bytes]] = {}
        for i in at:
            of_split.setdefault(splits[i], set()).add(parts[i][depth])
        of_several = set().union(*(some for some in of_split.values() if len(some) > 1))
        for split, mine_names in of_split.items():
            if len(mine_names) == 1 and of_several and not mine_names & of_several:
                deep.discard(split)
        classes = sorted({parts[i][depth] for i in at if splits[i] in deep})
        number = {name: i for i, name in enumerate(classes)}
        labels, stray = np.full(len(parts), -1, np.int64), np.zeros(len(parts), bool)
        for i, part in enumerate(parts):
            if splits[i] in deep:
                stray[i] = len(part) <= depth
                labels[i] = -1 if stray[i] else number[part[depth]]
        return FolderClasses(labels, [os.fsdecode(name) for name in classes], stray)
    return FolderClasses(np.full(len(parts), -1, np.int64), None, np.zeros(len(parts), bool))


def one_folder(paths: Iterable[str], data: str, split: str | None) -> str | None:
    """The name of the folder that holds all these images, where it is neither the data nor one of a split; else None."""
    only: str | None = None
    for path in paths:
        folder = os.path.basename(os.path.dirname(path))
        if only is not None and folder != only:
            return None
        only = folder
    top = {os.path.basename(os.path.abspath(data)), (split or "").lower(), ""}
    return only if only and only not in top and only.lower() not in top and not split_of_name(only) else None


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

    def file_name(self, row: int) -> bytes:
        """The file name that was added as number `row`."""
        start = sum(self.lengths[:row])
        return bytes(self.flat[start : start + self.lengths[row]])

    def path(self, row: int) -> str:
        """The path of the file that was added as number `row`."""
        inside = self.folders[self.folder[row]]
        return os.fsdecode((inside + b"/" if inside else b"") + self.file_name(row))


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

    def left_out(self, split: str | None) -> LeftOut:
        """What the index says of everything, and how many images lie outside of the splits where one is open."""
        report = LeftOut.from_json(self.index.meta["left_out"])
        first, last = self.index.meta["rows"].get("", [0, 0])
        if split is not None and last > first:
            everything = Listing(self.index, None)
            examples = [printable(everything.path(row)) for row in range(first, min(last, first + EXAMPLES))]
            report.out[NO_SPLIT] = (last - first, examples)
        return report


def _slice(flat: np.ndarray, offsets: np.ndarray, i: int) -> bytes:
    return flat[int(offsets[i]) : int(offsets[i + 1])].tobytes()


def splits_of(index: Index) -> list[str]:
    """The splits of an index written by `store`."""
    return [word for word in index.meta["rows"] if word]
