"""Images in tar shards, read in place. An index of where each of N images lies is built once (data/index.py).

A sample is what shares a name up to the first dot (the WebDataset convention): its image by extension, and its class,
an integer or a word, in a member `.cls`. Archives of plain folders work too: without any .cls the folders are the
classes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
import warnings
from array import array
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np

from ..errors import UserError
from . import index, names
from .index import Index, Writer
from .source import Source, compressed

OPEN_SHARDS = 128  # file descriptors kept open by one source in one process
IMAGE_PREFERENCE = (b"jpg", b"jpeg", b"jfif", b"png", b"webp", b"bmp", b"tif", b"tiff", b"gif", b"ppm", b"pgm", b"npy")
_MAGIC_OF_PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


@final
class TarSource(Source):
    """The images of one .tar, or of a directory of them."""

    def __init__(self, path: str, split: str | None) -> None:
        self.path = path
        found = _index(path)
        self._listing = names.Listing(found, split)
        for shard, how in found.meta["damaged"]:
            warnings.warn(
                f"{os.path.join(path, shard)} {how}: what is whole in it is used, the rest is lost", stacklevel=3
            )
        self.labels = self._listing.labels()
        self.classes = tuple(found.meta["classes"]) if self.labels is not None else None
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


def splits(path: str) -> list[str]:
    """The splits of tar shards: words in their names, folders they lie in, or else the top folders inside of them."""
    return names.splits_of(_index(path))


def _index(path: str) -> Index:
    shards = names.list_shards(path, ".tar")
    beside = _info_file(path)
    state = [_state(path, name) for _, name in shards]
    info = _state(os.path.dirname(beside), os.path.basename(beside)) if os.path.isfile(beside) else None

    def current(known: Index) -> bool:
        return known.meta["shards"] == state and known.meta["info"] == info

    def build(writer: Writer) -> dict[str, Any]:
        return _build(path, shards, writer) | {"shards": state, "info": info}

    return index.cached("tar", path, current, build)


def _info_file(path: str) -> str:
    return os.path.join(os.path.dirname(path) if os.path.isfile(path) else path, "info.json")


def _state(path: str, name: str) -> list[Any]:
    """Name, length in bytes and time of the last change (ns) of a shard."""
    status = os.stat(os.path.join(path, name) if name else path)
    return [name, status.st_size, status.st_mtime_ns]


@dataclass
class _Places:
    """Where the gathered images lie and what their .cls says; rows as in names.Found."""

    shard: array[int] = field(default_factory=lambda: array("q"))
    start: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))
    word: list[str | None] = field(default_factory=list)


def _build(path: str, shards: list[tuple[int, str]], writer: Writer) -> dict[str, Any]:
    found, places = names.Found(), _Places()
    folders: dict[tuple[int, bytes], int] = {}  # by split of the shard and path in it
    damaged: list[tuple[str, str]] = []
    for number, (split, name) in enumerate(shards):
        where = os.path.join(path, name) if name else path
        members, damage = _members(where)
        if damage:
            damaged.append((name, damage))
        for inside, file, start, size, word in _samples(where, members):
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
        raise UserError(f"{path} holds no image in {len(shards)} tar file{'s' if len(shards) > 1 else ''}")

    split_ids, under = _split(list(folders))
    folder = np.frombuffer(found.folder, np.int64)
    labels: np.ndarray
    classes: list[str] | None
    if any(word is not None for word in places.word):
        labels, classes = _classes_of_words(places.word, _info_file(path))
    else:
        folder_labels, folder_classes = names.classes_of_folders(under, split_ids)
        labels, classes = folder_labels[folder], folder_classes
    columns: dict[str, np.ndarray] = {
        "shard": np.frombuffer(places.shard, np.int64).astype(np.int32),
        "start": np.frombuffer(places.start, np.int64),
        "size": np.frombuffer(places.size, np.int64),
    }
    split_of_sample = np.array(split_ids, np.int64)[folder]
    meta = names.store(writer, found, split=split_of_sample, under=under, labels=labels, columns=columns)
    return meta | {"classes": classes, "damaged": damaged}


def _split(folders: list[tuple[int, bytes]]) -> tuple[list[int], list[bytes]]:
    """The split of each folder, and its path under the split's own folder."""
    by_shard = [split for split, _ in folders]
    paths = [folder for _, folder in folders]
    if any(by_shard):
        return by_shard, paths
    inside = names.split_of_folders(paths)
    return inside, [path.partition(b"/")[2] if split else path for path, split in zip(paths, inside, strict=True)]


def _members(shard: str) -> tuple[list[tuple[bytes, int, int]], str | None]:
    """The whole regular files of an archive as (path, start, size), and what is wrong with the archive, if anything."""
    members: dict[bytes, tuple[int, int]] = {}
    length = os.path.getsize(shard)
    with open(shard, "rb") as file:
        head = file.read(8)
        file.seek(0)
        if any(head.startswith(magic) for magic in _MAGIC_OF_PACKED):
            raise UserError(compressed(shard))
        if not head:
            raise UserError(f"{shard} is empty (0 bytes): copy or download it again")
        cut = length % tarfile.BLOCKSIZE != 0
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
                try:
                    while (member := archive.next()) is not None:
                        archive.members.clear()  # type: ignore[attr-defined]  # it keeps every header otherwise
                        place = (member.offset_data, member.size)
                        path = os.fsencode(os.path.normpath(member.name))
                        if member.islnk():
                            place = members.get(os.fsencode(os.path.normpath(member.linkname)), (0, -1))
                        elif not member.isfile() or member.issparse():
                            continue
                        if place[0] + place[1] > length:
                            cut = True
                        elif place[1] >= 0:
                            members[path] = place
                except tarfile.ReadError:
                    cut = True
                file.seek(archive.offset)
                broken = not cut and bool(file.read(tarfile.BLOCKSIZE).strip(b"\0"))
        except tarfile.ReadError as error:
            raise UserError(f"{shard} is not a tar archive ({error})") from None
    damage = "is cut off in its last member" if cut else "has a damaged header in its middle" if broken else None
    return [(path, *place) for path, place in members.items()], damage


def _samples(shard: str, members: list[tuple[bytes, int, int]]) -> list[tuple[bytes, bytes, int, int, str | None]]:
    """The images among the members as (folder, file name, start, size, word in its .cls)."""
    groups: dict[bytes, list[tuple[bytes, bytes, int, int]]] = {}  # by path up to the first dot of the file name
    words: dict[bytes, str] = {}
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        for path, start, size in members:
            folder, _, file = path.rpartition(b"/")
            stem = file.partition(b".")[0]
            if not stem:  # hidden, or the shadow files of macOS
                continue
            key = folder + b"/" + stem
            if file == stem + b".cls":
                words[key] = os.pread(descriptor, min(size, 4096), start).decode("utf-8", "replace").strip()
            elif names.is_image(file):
                groups.setdefault(key, []).append((folder, file, start, size))
    finally:
        os.close(descriptor)
    samples = []
    for key, images in groups.items():
        # One image a sample: "a.jpg" beside "a.seg.png" or "a.png" is the image, they are maps of it. Without a plainly
        # named one, dots are part of the names and every file is an image of its own.
        plain = [image for image in images if image[1].count(b".") == 1]
        if plain:
            images = [min(plain, key=lambda image: IMAGE_PREFERENCE.index(names.extension(image[1])))]
        samples += [(*image, words.get(key)) for image in images]
    return samples


def _classes_of_words(words: list[str | None], info_file: str) -> tuple[np.ndarray, list[str]]:
    """Labels (N,) int64 of the words found in .cls (-1 without one), and the class names.

    Integers are labels, named by info.json beside the shards where it has "classes": [{"index", "name"}, ...]; other
    words are the names themselves.
    """
    given = {word for word in words if word is not None}
    if not all(word.isdecimal() for word in given):
        ordered = sorted(given)
        number = {word: i for i, word in enumerate(ordered)}
        return np.array([-1 if word is None else number[word] for word in words], np.int64), ordered
    labels = np.array([-1 if word is None else int(word) for word in words], np.int64)
    return labels, names.class_names(int(labels.max()), _named_classes(info_file))


def _named_classes(info_file: str) -> dict[int, str]:
    try:
        with open(info_file, encoding="utf-8") as file:
            classes = json.load(file)["classes"]
        return {int(entry["index"]): str(entry["name"]) for entry in classes}
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # no such file, or one that says something else
