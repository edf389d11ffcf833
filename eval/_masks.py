"""Images with segmentation masks: pairs images and masks in folders and tar archives, and reads masks.

A mask is an image file with one class number for each pixel: palette indices or grey values. It is found by its name:

    X.jpg beside X.seg.png, X.mask.png or X.png
    images/.../X.jpg and masks/.../X.png, anywhere in the path; the folder names are those of IMAGE_TREES and MASK_TREES

So ADE20K (images, annotations), VOC (JPEGImages, SegmentationClass), DAVIS (JPEGImages, Annotations) and Cityscapes
(leftImg8bit, gtFine; labelTrainIds if they exist, else labelIds) can be read without changes.

Splits are folders named train (training), val (validation) or test, the same words in the names of tar shards, or VOC's
lists ImageSets/Segmentation/*.txt. Shapes: an image and its mask are H x W pixels.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, final

import numpy as np
from PIL import Image

from ssl_pretrain.data import names
from ssl_pretrain.data.decode import BadImage, Picture
from ssl_pretrain.data.source import Source
from ssl_pretrain.data.walk import list_shards
from ssl_pretrain.errors import UserError, nearest

IMAGE_TREES = frozenset({"images", "image", "imgs", "img", "jpegimages", "leftimg8bit"})
MASK_TREES = frozenset({"masks", "mask", "annotations", "annotation", "labels", "label", "segmentationclass", "gtfine"})
# Before the extension. If a mask exists with both of the last two endings, the last one is used, because it is read
# later.
IMAGE_ENDING = "_leftimg8bit"
MASK_ENDINGS = (".seg", ".mask", "_gtfine_labelids", "_gtfine_labeltrainids")
SPLIT_ALIASES = {"training": "train", "testing": "test"}
LISTS = "imagesets/segmentation/"
LAYOUTS = (
    "put X.seg.png (or X.png) beside each X.jpg, or masks/X.png for each images/X.jpg (annotations/ and "
    "SegmentationClass/ with JPEGImages/ also work), with class numbers as pixel values"
)
_GREY = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # Pillow's modes of one number a pixel
_LOSSLESS = ("PNG", "BMP", "TIFF", "GIF", "PPM")


@dataclass(frozen=True)
class _File:
    """A file on the disk, or a member of an archive."""

    path: str
    start: int
    size: int

    def read(self) -> bytes:
        """Its bytes. Raises OSError, also if the file has become shorter."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        if len(data) != self.size:
            raise OSError(f"{self.path}: {len(data)} of {self.size} bytes could be read at {self.start}")
        return data


@dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    folder: str  # of both, without the folder names for images and masks; frames of one video share it
    image: str  # names within the data
    mask: str
    split: str  # "" if the data is not split


@final
class Masked(Source):
    """Images with masks, in the order of their names. The constructor reads all masks once.

    Attributes: `pairs`; `values`, the number of masks that contain each value. Raises UserError for a mask that is not
    a map of class numbers or has another size than its image, and if no mask can be read. An image whose mask cannot be
    read counts as unreadable.
    """

    def __init__(self, data: str, pairs: list[Pair], files: dict[str, _File]) -> None:
        self.data, self.pairs, self.files = data, pairs, files
        self.labels = self.classes = None
        self.description = f"{len(pairs):,} images of {data} with masks"
        digest = hashlib.blake2b(digest_size=16)
        for pair in pairs:
            for name in (pair.image, pair.mask):
                digest.update(f"{name} {files[name].size}\n".encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()
        self.unreadable: dict[int, str] = {}
        self.values: Counter[int] = Counter()
        for i in range(len(pairs)):
            self._look(i)
        if not self.values:
            raise UserError(f"{data}: none of {len(pairs)} masks can be read; {pairs[0].image}: {self.unreadable[0]}")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> bytes | np.ndarray:
        if index in self.unreadable:
            raise ValueError(self.unreadable[index])
        return self._image(index)

    def name(self, index: int) -> str:
        """The image's name within the data."""
        return names.printable(os.fsencode(self.pairs[index].image))

    def mask(self, index: int) -> np.ndarray:
        """Class numbers (H, W) int64, as in the file."""
        return read_mask(self.files[self.pairs[index].mask].read(), self.pairs[index].mask)

    def folders(self) -> dict[str, list[int]]:
        """The images of each folder, in the order of their names."""
        found: dict[str, list[int]] = {}
        for i, pair in enumerate(self.pairs):
            found.setdefault(pair.folder, []).append(i)
        return found

    def _image(self, index: int) -> bytes | np.ndarray:
        name = self.pairs[index].image
        return names.as_item(os.fsencode(name), self.files[name].read())

    def _look(self, index: int) -> None:
        """Record the values of a mask and check that it fits its image."""
        pair = self.pairs[index]
        try:
            mask = self.mask(index)
        except (BadImage, OSError) as problem:
            self.unreadable[index] = f"its mask {pair.mask} cannot be read: {problem}"
            return
        self.values.update(np.unique(mask).tolist())
        try:
            image = self._image(index)
            picture = image if isinstance(image, np.ndarray) else Picture(image, 3)
        except (BadImage, OSError, ValueError):
            return  # reading the image reports this error
        height, width = picture.shape[:2] if isinstance(picture, np.ndarray) else (picture.height, picture.width)
        if mask.shape != (height, width):
            raise UserError(
                f"{self.data}: the mask {pair.mask} is {mask.shape[0]} x {mask.shape[1]} pixels (height x width) and its "
                f"image {pair.image} {height} x {width}: resize the masks to their images, without interpolation"
            )


@dataclass(frozen=True)
class Found:
    """The images and masks that were found."""

    data: str
    files: dict[str, _File]  # by name within the data
    pairs: list[Pair]  # sorted by folder and name
    alone: list[Pair]  # images without a mask, `mask` ""

    @property
    def splits(self) -> list[str]:
        """The splits of the data; [] if the data is not split."""
        present = {pair.split for pair in self.pairs} - {""}
        return [word for word in names.SPLIT_WORDS if word in present]

    def open(self, split: str | None) -> tuple[Masked, int]:
        """The images with masks of a split, or of all data; and the number of images without a mask. Raises UserError
        for an unknown split."""
        if split is not None and split not in self.splits:
            known = nearest(split, self.splits) if self.splits else ": it is not split"
            raise UserError(f"{self.data} has no images with masks in a split {split!r}{known}")
        pairs, alone = ([p for p in some if split in (None, p.split)] for some in (self.pairs, self.alone))
        return Masked(self.data, pairs, self.files), len(alone)


def find(data: str) -> Found:
    """The images and masks of a folder, a .tar, or a folder of .tar shards. Raises UserError if there are none."""
    files = _files(data)
    images: dict[tuple[str, str], list[str]] = {}  # by folder and name without ending
    masks: dict[tuple[str, str], str] = {}
    in_trees: set[str] = set()
    for name in sorted(files):
        *folders, file = name.split("/")
        stem, _, extension = file.rpartition(".")
        if not stem or extension.lower().encode("utf-8", "surrogateescape") not in names.IMAGE_EXTENSIONS:
            continue
        tree = next((i for i, word in enumerate(folders) if word.lower() in IMAGE_TREES | MASK_TREES), None)
        is_mask = tree is not None and folders[tree].lower() in MASK_TREES
        if tree is not None:
            del folders[tree]
        if ending := next((e for e in MASK_ENDINGS if stem.lower().endswith(e)), None):
            stem, is_mask = stem[: -len(ending)], True
        elif stem.lower().endswith(IMAGE_ENDING):
            stem = stem[: -len(IMAGE_ENDING)]
        key = "/".join(folders), stem
        if is_mask:
            masks[key] = name
        else:
            images.setdefault(key, []).append(name)
            if tree is not None:
                in_trees.add(name)
    chosen: dict[tuple[str, str], str] = {}
    for key, candidates in images.items():
        image, *others = sorted(candidates, key=lambda name: name.lower().endswith(".png"))
        if others and key not in masks:
            masks[key] = others[-1]
        if not in_trees or image in in_trees:  # if image folders exist, pictures outside them are not used
            chosen[key] = image
    if not masks or not chosen.keys() & masks.keys():
        raise UserError(_no_pairs(data, list(chosen.values()), list(masks.values())))
    split = _splits(files, sorted(chosen))
    both = [Pair(key[0], chosen[key], masks.get(key, ""), split[key]) for key in sorted(chosen)]
    if any(pair.split for pair in both):
        both = [pair for pair in both if pair.split]
    return Found(data, files, [pair for pair in both if pair.mask], [pair for pair in both if not pair.mask])


def read_mask(data: bytes, name: str) -> np.ndarray:
    """The class numbers (H, W) int64 in an image file: a palette's indices, or grey values of 1, 8 or 16 bits.

    Raises BadImage if it cannot be read, UserError if it contains colours instead of numbers or is a lossy format
    (JPEG).
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in _LOSSLESS:
                raise UserError(
                    f"the mask {name} is a {image.format} file, and lossy compression changes class numbers: save masks "
                    f"as PNG"
                )
            if image.mode not in _GREY:
                raise UserError(
                    f"the mask {name} holds colours (mode {image.mode}), not class numbers: save masks as PNG with a "
                    f"palette or in grey, a pixel's value its class"
                )
            return np.asarray(image).astype(np.int64)
    except UserError:
        raise
    except Exception as problem:  # codecs raise many kinds of errors for damaged files; all of them mean unreadable
        raise BadImage(f"{type(problem).__name__}: {problem}") from problem


def class_names(data: str) -> dict[int, str]:
    """Names of class numbers, from "classes" in an info.json in or next to the data (names in order, or objects with
    "index" and "name"); {} if there is no such file."""
    path = Path(data)
    try:
        given = json.loads(((path if path.is_dir() else path.parent) / "info.json").read_text(encoding="utf-8"))
        return dict(map(_named, enumerate(given["classes"])))
    except (OSError, ValueError, TypeError, KeyError):
        return {}  # no such file, or another format


def _named(entry: tuple[int, Any]) -> tuple[int, str]:
    number, given = entry
    return (int(given["index"]), str(given["name"])) if isinstance(given, dict) else (number, str(given))


def _files(data: str) -> dict[str, _File]:
    """Every file by its name within the data, with "/" between folders. Files of a shard that is named after a split
    are below that split's name."""
    path = os.path.abspath(os.path.expanduser(data))
    if not os.path.exists(path):
        raise UserError(f"{data} has no masks: there is no such folder or archive")
    if os.path.isfile(path) and not path.lower().endswith(".tar"):
        raise UserError(f"{data} cannot be read as masks: give a folder of images and masks, or a .tar of one")
    shards = list_shards(path, ".tar")
    if os.path.isfile(path) or shards:
        found: dict[str, _File] = {}
        for split, shard in shards:
            prefix = f"{names.SPLIT_WORDS[split - 1]}/" if split else ""
            found |= {prefix + name: file for name, file in _members(os.path.join(path, shard) if shard else path)}
        return found
    found = {}
    for folder, inner, files in os.walk(path, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            full = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(full):
                found[os.path.relpath(full, path).replace(os.sep, "/")] = _File(full, 0, os.path.getsize(full))
    return found


def _members(shard: str) -> list[tuple[str, _File]]:
    try:
        with tarfile.open(shard, "r:") as archive:
            return [
                (os.path.normpath(member.name), _File(shard, member.offset_data, member.size))
                for member in archive
                if member.isfile() and not os.path.basename(member.name).startswith(".")
            ]
    except (tarfile.TarError, OSError) as problem:
        raise UserError(f"{shard} cannot be read as a plain .tar: {problem}") from None


def _splits(files: dict[str, _File], keys: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The split of each image, by folder and name; "" for images that are in no split."""
    lists = {
        PurePosixPath(name).stem: set(file.read().decode("utf-8", "replace").split())
        for name, file in files.items()
        if LISTS in f"/{name.lower()}" and PurePosixPath(name).stem in names.SPLIT_WORDS
    }
    if lists:
        return {key: next((word for word, stems in lists.items() if key[1] in stems), "") for key in keys}
    folders = sorted({folder for folder, _ in keys})
    paths = []
    for folder in folders:
        first, _, rest = folder.partition("/")
        paths.append(f"{SPLIT_ALIASES.get(first.lower(), first)}/{rest}".encode("utf-8", "surrogateescape"))
    words = ("", *names.SPLIT_WORDS)
    ids = dict(zip(folders, names.split_of_folders(paths), strict=True))
    return {key: words[ids[key[0]]] for key in keys}


def _no_pairs(data: str, images: list[str], masks: list[str]) -> str:
    if not masks:
        return f"{data} holds {len(images)} images and no masks: {LAYOUTS}"
    if not images:
        return f"{data} holds {len(masks)} masks and no images: {LAYOUTS}"
    return f"{data}: no mask is named as an image is ({images[0]}, ...; {masks[0]}, ...): {LAYOUTS}"
