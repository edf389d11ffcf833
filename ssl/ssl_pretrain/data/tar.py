"""Images in tar shards, read in place. An index of where each of N images lies is built once (data/index.py).

Every image is a sample, but maps of another one (k.jpg or k.image.jpg beside k.mask.png). Its class, an integer or a word,
is in a member of its name with `.cls`, or of its name up to the first dot (the WebDataset convention). Archives of plain
folders work too: without any .cls the folders are the classes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np

from ..errors import UserError
from . import index, left_out, names
from .index import Index, Writer
from .left_out import LeftOut
from .source import Source, compressed
from .walk import Walk, list_shards, walk

OPEN_SHARDS = 128  # file descriptors kept open by one source in one process
IMAGE_WORDS = frozenset((b"", b"image", b"img", b"input", b"rgb"))  # k.jpg, k.image.jpg: the image of a sample
MAP_WORDS = frozenset((b"mask", b"seg", b"label", b"depth", b"target"))  # k.mask.png: a map of it
SIDECARS = frozenset(b"cls txt json caption xml csv".split())
_MAGIC_OF_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@final
class TarSource(Source):
    """The images of one .tar, or of a directory of them."""

    def __init__(self, path: str, split: str | None, walked: Walk | None = None) -> None:
        """walked: what a walk has just found at `path`, where there was one."""
        self.path = path
        shards_, self.left_out = _shards(path, walked)
        found = _index(path, shards_)
        self._listing = names.Listing(found, split)
        self.left_out.merge(self._listing.left_out(split))
        self.labels = self._listing.labels()
        self.classes = tuple(found.meta["classes"]) if self.labels is not None else None
        self.labels_from = found.meta["labels_from"] if self.classes else None
        if found.meta["labels_from"] == CLS and self.labels is not None and (bare := int((self.labels < 0).sum())):
            first = int(np.argmax(self.labels < 0))
            self.left_out.note(left_out.NO_LABEL, self.name(first), bare)
        self.fingerprint = hashlib.blake2b(self._listing.digest.encode(), digest_size=16).hexdigest()
        shards = len(np.unique(found["shard"][self._listing.start : self._listing.stop]))
        classes = f" in {len(self.classes):,} classes" if self.classes else ""
        self.description = f"{shards:,} tar shard{'s' if shards > 1 else ''} of {len(self):,} images{classes}"
        self._open = functools.lru_cache(OPEN_SHARDS)(_Shard)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open = functools.lru_cache(OPEN_SHARDS)(_Shard)

    def __len__(self) -> int:
        return len(self._listing)

    def _shard(self, row: int) -> tuple[str, int, int]:
        """The path of the shard of an index row, its length when indexed, and when it had changed last (ns)."""
        found = self._listing.index
        name, length, changed_ns = found.meta["shards"][int(found["shard"][row])]
        return os.path.join(self.path, name) if name else self.path, length, changed_ns

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        row, found = self._listing.row(index), self._listing.index
        data = self._open(*self._shard(row)).read(int(found["start"][row]), int(found["size"][row]))
        return names.as_item(self._listing.path(index), data)

    def name(self, index: int) -> str:
        """shard:member."""
        shard, _, _ = self._shard(self._listing.row(index))
        return names.printable(os.fsencode(shard) + b":" + self._listing.path(index))


class _Shard:
    """An open archive, read by position, so threads and forked processes may share it. Closed with its last reader."""

    def __init__(self, path: str, length: int, changed_ns: int) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != (length, changed_ns):
            raise OSError(f"{path} changed since it was indexed: do not write to data that is in use")

    def read(self, start: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, start)
        if len(data) != size:
            raise OSError(f"{self._path}: {len(data)} of {size} bytes could be read at {start}")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def splits(path: str, walked: Walk | None = None) -> list[str]:
    """The splits of tar shards: words in their names, folders they lie in, or else the folders inside of them."""
    return names.splits_of(_index(path, _shards(path, walked)[0]))


def split_like(path: str) -> list[str]:
    """Names of shards, or of class folders in them, that may be splits but were not recognised as such."""
    found: list[str] = _index(path, _shards(path, None)[0]).meta["split_like"]
    return found


def _shards(path: str, walked: Walk | None) -> tuple[list[tuple[int, str]], LeftOut]:
    """The shards as names.list_shards has them, and what else there is."""
    if walked is None and not os.path.isdir(path):
        return list_shards(path, ".tar"), LeftOut()
    walked = walked or walk(path)
    report = LeftOut()
    report.merge(walked.report)
    if os.path.isfile(_info_file(path)):
        report.discard(names.why_not(b"json"), "info.json")
    for name in walked.shards:
        if not name.lower().endswith(".tar"):
            report.add(left_out.OTHER_DATA, names.printable(os.fsencode(name)))
    if walked.found.lengths:
        report.add(left_out.LOOSE, names.printable(walked.found.file_name(0)), len(walked.found.lengths))
    return names.with_splits(name for name in walked.shards if name.lower().endswith(".tar")), report


def _index(path: str, shards: list[tuple[int, str]]) -> Index:
    beside = _info_file(path)
    state = [_state(path, name) for _, name in shards]
    info = _state(os.path.dirname(beside), os.path.basename(beside)) if os.path.isfile(beside) else None
    plugins = sorted(map(os.fsdecode, names.readable_plugins()))

    def current(known: Index) -> bool:
        meta = known.meta
        return bool(meta["shards"] == state and meta["info"] == info and meta["plugins"] == plugins)

    def build(writer: Writer) -> dict[str, Any]:
        return _build(path, shards, writer) | {"shards": state, "info": info, "plugins": plugins}

    return index.cached("tar", path, current, build)


def _info_file(path: str) -> str:
    return os.path.join(path if os.path.isdir(path) else os.path.dirname(path), "info.json")


def _state(path: str, name: str) -> list[Any]:
    """Name, length in bytes and time of the last change (ns) of a shard."""
    try:
        status = os.stat(os.path.join(path, name) if name else path)
    except OSError as error:
        raise UserError(f"{os.path.join(path, name)} cannot be read: {error.strerror}") from None
    return [name, status.st_size, status.st_mtime_ns]


@dataclass
class _Places:
    """Where the gathered images lie and what their .cls says; rows as in names.Found."""

    shard: array[int] = field(default_factory=lambda: array("q"))
    start: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))
    word: list[str | None] = field(default_factory=list)


CLS = "the .cls members"


def _build(path: str, shards: list[tuple[int, str]], writer: Writer) -> dict[str, Any]:
    found, places, report = names.Found(), _Places(), LeftOut()
    folders: dict[tuple[int, bytes], int] = {}  # by split of the shard and path in it
    for number, (split, name) in enumerate(shards):
        where = os.path.join(path, name) if name else path
        members = _members(where, name or os.path.basename(path), report)
        for inside, file, start, size, word in _samples(where, members, report):
            key = (split, inside)
            if key not in folders:
                folders[key] = len(folders)
                found.folders.append(inside)
            found.add(folders[key], [file])
            places.shard.append(number)
            places.start.append(start)
            places.size.append(size)
            places.word.append(word)
    if not places.size:
        told = f" ({report.sentence()})" if report else ""
        raise UserError(f"{path} holds no image in {len(shards)} tar file{'s' if len(shards) > 1 else ''}{told}")

    split_ids, under = _split(list(folders))
    of_folder = np.frombuffer(found.folder, np.int64)
    labels: np.ndarray
    classes: list[str] | None
    if any(word is not None for word in places.word):
        labels_from = CLS

        def called(i: int) -> str:
            shard = shards[places.shard[i]][1] or path
            return f"{shard}:{names.printable(found.file_name(i))}"

        labels, classes = _classes_of_words(places.word, _info_file(path), called)
    else:
        labels_from = "the names of the folders in the shards"
        counts = np.bincount(of_folder, minlength=len(folders))
        of_folders = names.classes_of_folders(under, split_ids, counts)
        for i in np.flatnonzero(of_folders.stray).tolist():
            first = found.file_name(int(np.argmax(of_folder == i)))
            report.note(left_out.STRAY, names.printable(found.folders[i] + b"/" + first), int(counts[i]))
        labels, classes = of_folders.labels[of_folder], of_folders.classes
    columns: dict[str, np.ndarray] = {
        "shard": np.frombuffer(places.shard, np.int64).astype(np.int32),
        "start": np.frombuffer(places.start, np.int64),
        "size": np.frombuffer(places.size, np.int64),
    }
    split_of_sample = np.array(split_ids, np.int64)[of_folder]
    meta = names.store(writer, found, split=split_of_sample, under=under, labels=labels, columns=columns)
    suspects: list[str] = []
    if not any(split_ids):
        suspects = names.split_like(names.stem(name) for _, name in shards if name) if len(shards) > 1 else []
        suspects = suspects or names.unrecognised_splits([inside for _, inside in folders])
    return meta | {
        "classes": classes,
        "labels_from": labels_from,
        "left_out": report.as_json(),
        "split_like": suspects,
    }


def _split(folders: list[tuple[int, bytes]]) -> tuple[list[int], list[bytes]]:
    """The split of each folder, and its path under the split's own folder."""
    by_shard = [split for split, _ in folders]
    paths = [folder for _, folder in folders]
    if any(by_shard):
        return by_shard, paths
    return names.split_and_class_path(paths)


def _members(shard: str, shown: str, report: LeftOut) -> list[tuple[bytes, int, int]]:
    """The whole regular files of an archive as (path, start, size). What is wrong with it goes into `report`, where it is
    called `shown`."""
    members: dict[bytes, tuple[int, int]] = {}
    try:
        length = os.path.getsize(shard)
        with open(shard, "rb") as file:
            head = file.read(8)
            file.seek(0)
            if any(head.startswith(magic) for magic in _MAGIC_OF_PACKED):
                raise UserError(compressed(shard))
            if not head:
                raise UserError(f"{shard} is empty (0 bytes): copy or download it again")
            cut = False
            offset = 0
            # tarfile raises other errors than its own for damaged headers: ValueError, OverflowError, UnicodeError
            try:
                with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
                    try:
                        while (member := archive.next()) is not None:
                            archive.members.clear()  # type: ignore[attr-defined]  # it keeps every header otherwise
                            place = (member.offset_data, member.size)
                            path = os.fsencode(os.path.normpath(member.name))
                            if member.islnk():
                                place = members.get(os.fsencode(os.path.normpath(member.linkname)), (0, -1))
                                if place[1] < 0:
                                    report.add(left_out.BROKEN_LINK, _told(shown, path))
                                    continue
                            elif member.isdir():
                                continue
                            elif not member.isfile() or member.issparse():
                                report.add("member that is no plain file", _told(shown, path))
                                continue
                            if place[1] < 0:
                                raise tarfile.ReadError("a member of negative size")
                            if place[0] + place[1] > length:
                                cut = True
                                continue
                            if path in members:
                                report.add(left_out.TWICE, _told(shown, path))
                            members[path] = place
                    except tarfile.ReadError:
                        cut = True
                    offset = archive.offset
            except tarfile.ReadError as error:
                raise UserError(f"{shard} is not a tar archive ({names.one_line(error)})") from None
            except (ValueError, OverflowError, RecursionError, EOFError, KeyError, IndexError, AttributeError) as error:
                raise UserError(f"{shard} is damaged ({names.one_line(error)}): copy or download it again") from None
            if damage := _damage(file, offset, length, cut):
                report.add(damage, shown)
    except OSError as error:
        raise UserError(f"{shard} cannot be read: {error.strerror or names.one_line(error)}") from None
    return [(path, *place) for path, place in members.items()]


def _damage(file: Any, offset: int, length: int, cut: bool) -> str | None:
    """What is wrong with an archive whose last header that could be read ends at `offset`; `cut`: it or its member was
    not whole."""
    if cut:
        return left_out.TRUNCATED
    file.seek(offset)
    end = file.read(2 * tarfile.BLOCKSIZE)
    if end[: tarfile.BLOCKSIZE].strip(b"\0"):
        return left_out.DAMAGED if len(end) >= tarfile.BLOCKSIZE else left_out.TRUNCATED
    if len(end) < 2 * tarfile.BLOCKSIZE:
        return left_out.TRUNCATED
    if end.strip(b"\0"):
        return left_out.BEHIND_END
    while more := file.read(1 << 20):
        if more.count(0) != len(more):
            return left_out.BEHIND_END
    return None


def _samples(
    shard: str, members: list[tuple[bytes, int, int]], report: LeftOut
) -> list[tuple[bytes, bytes, int, int, str | None]]:
    """The images among the members as (folder, file name, start, size, word in its .cls, "" where it is unreadable)."""
    images: list[tuple[bytes, bytes, int, int, bytes, bytes]] = []  # and its key and word
    words_of_key: dict[bytes, set[bytes]] = {}  # by path up to the first dot: the words before the extensions
    words: dict[bytes, str] = {}  # what a .cls says, by its path without the extension
    shown = os.path.basename(shard)
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        for path, start, size in members:
            folder_, _, file = path.rpartition(b"/")
            if (path.startswith(b".") or b"/." in path) and _is_hidden(path):
                report.add(left_out.HIDDEN, _told(shown, path))
                continue
            base, _, ext = path.rpartition(b".")
            ext = ext.lower()
            if ext == b"cls" and base:
                try:
                    word = os.pread(descriptor, min(size, 4096), start).decode().strip(" \t\r\n\0")
                except UnicodeDecodeError:
                    word = ""
                if not word or not word.isprintable():
                    report.note(left_out.BAD_LABEL, _told(shown, path))
                    word = ""
                words[base] = word
            elif names.is_image(file):
                key, word_ = _key(folder_, file)
                images.append((folder_, file, start, size, key, word_))
                words_of_key.setdefault(key, set()).add(word_)
            else:
                ext = ext if b"." in file else b""
                reason = f"{left_out.SIDECAR} .{ext.decode()}" if ext in SIDECARS else names.why_not(ext)
                report.add(reason if ext else "without an extension", _told(shown, path))
    finally:
        os.close(descriptor)
    samples = []
    for folder_, file, start, size, key, word_ in images:
        if word_ in MAP_WORDS and words_of_key[key] & IMAGE_WORDS:
            report.add(left_out.MAP, _told(shown, folder_ + b"/" + file if folder_ else file))
            continue
        inside = folder_ + b"/" if folder_ else b""
        label = words.get(inside + file.rpartition(b".")[0], words.get(key))
        samples.append((folder_, file, start, size, label))
    return samples


def _told(shard: str, path: bytes) -> str:
    return f"{shard}:{names.printable(path)}"


def _is_hidden(path: bytes) -> bool:
    """Whether a file, or a folder that it lies in, is hidden."""
    return any(part.startswith(b".") and part != b".." for part in path.split(b"/"))


def _key(folder_: bytes, file: bytes) -> tuple[bytes, bytes]:
    """The key of a sample in the WebDataset convention, with its folder, and the word before the file's extension (b""
    where the extension follows the key at once)."""
    stem, _, rest = file.partition(b".")
    return (folder_ + b"/" if folder_ else b"") + stem, rest.rpartition(b".")[0].lower()


def _classes_of_words(
    words: Sequence[str | None], info_file: str, called: Callable[[int], str]
) -> tuple[np.ndarray, list[str]]:
    """Labels (N,) int64 of the words found in .cls (-1 without one, or an unreadable one), and the class names.

    Integers are labels, the negative ones unlabelled; they are named by info.json beside the shards where it has
    "classes": [{"index", "name"}, ...]. Other words are the names themselves. called: the name of image i for messages.
    """
    given = {word for word in words if word}
    numbers = {word: _integer(word) for word in given}
    if any(number is None for number in numbers.values()):
        ordered = sorted(word for word in given if (number := numbers[word]) is None or number >= 0)
        number_of = {word: i for i, word in enumerate(ordered)}
        return np.array([number_of.get(word or "", -1) for word in words], np.int64), ordered
    largest = max((number for number in numbers.values() if number is not None), default=-1)
    try:
        classes = names.class_names(largest, _named_classes(info_file))
    except UserError as error:
        at = next(i for i, word in enumerate(words) if word and numbers[word] == largest)
        raise UserError(f"the .cls of {called(at)}: {error}") from None
    values = {word: max(-1, number) for word, number in numbers.items() if number is not None}
    return np.array([values[word] if word else -1 for word in words], np.int64), classes


def _integer(word: str) -> int | None:
    try:
        return int(word) if word.lstrip("+-").isdecimal() and len(word) < 1000 else None
    except ValueError:
        return None


def _named_classes(info_file: str) -> dict[int, str]:
    try:
        with open(info_file, encoding="utf-8") as file:
            classes = json.load(file)["classes"]
        return {int(entry["index"]): str(entry["name"]) for entry in classes}
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # no such file, or one that says something else
