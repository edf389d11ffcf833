"""Packed images: a set decoded once and kept as raw uint8 pixels in one file a split, memory-mapped. Reading one costs a
copy, no decoding; the file is as large as the pixels are.

A folder holds packed.json (splits, classes, channels) and for each split SPLIT.pixels (one image after another), SPLIT.npz
(where each begins and its height and width; labels), and SPLIT.names (a line an image, for messages).

Shapes: N images of a split, H x W pixels, C channels (the same for all).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import numpy as np

from ..errors import UserError
from ..files import in_the_way, make_folder
from .left_out import LeftOut
from .source import Source

FORMAT = 1
HEAD = "packed.json"
WHOLE = "all"  # the name of data that is not split


@final
class PackedSource(Source):
    """The images of a split, or of all."""

    def __init__(self, folder: str, split: str | None) -> None:
        head = _head(folder)
        names = [split] if split else list(head["splits"])
        self.folder, self.channels = Path(folder), head["channels"]
        self._parts = [_Part(self.folder, name, self.channels) for name in names]
        self._ends = np.cumsum([len(part.places) for part in self._parts])
        known = [part.labels for part in self._parts]
        self.labels = None
        if any(labels is not None for labels in known):  # a split without labels does not take the others'
            sizes = [len(part.places) for part in self._parts]
            bare = [
                np.full(n, -1, np.int64) if labels is None else labels for n, labels in zip(sizes, known, strict=True)
            ]
            self.labels = np.concatenate(bare)
        self.classes = tuple(head["classes"]) if head["classes"] else None
        identity = json.dumps([head["fingerprint"], names, FORMAT])
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        self.labels_from = "the data that was packed" if self.labels is not None else None
        self.left_out = LeftOut.from_json(head.get("left_out", {}))
        self.description = f"{len(self):,} packed images of {head['from']}"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        part, row = self._place(index)
        return part[row]

    def name(self, index: int) -> str:
        """The name the image had where it was packed from."""
        part, row = self._place(index)
        return part.name(row)

    def _place(self, index: int) -> tuple[_Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[number], int(index - (self._ends[number - 1] if number else 0))


class _Part:
    """One split's files, opened when they are first read, so that they pickle."""

    def __init__(self, folder: Path, split: str, channels: int) -> None:
        self.path, self.channels = folder / f"{split}.pixels", channels
        try:
            with np.load(folder / f"{split}.npz", allow_pickle=False) as arrays:
                self.places = arrays["places"]  # (N, 3) int64: where it begins, height, width
                self.labels = arrays.get("labels")
            size = self.path.stat().st_size
        except (OSError, ValueError, KeyError) as problem:
            raise UserError(f"{folder}: split {split} is damaged ({problem}): pack it again") from None
        wanted = int((self.places[:, 1] * self.places[:, 2]).sum()) * channels
        if size != wanted:
            raise UserError(f"{self.path} has {size:,} bytes where {wanted:,} were packed: pack it again")
        self._pixels: np.ndarray | None = None
        self._names: list[str] | None = None

    def __getitem__(self, row: int) -> np.ndarray:
        if self._pixels is None:
            self._pixels = np.memmap(self.path, dtype=np.uint8, mode="r")
        begin, height, width = self.places[row].tolist()
        size = height * width * self.channels
        return self._pixels[begin : begin + size].reshape(height, width, self.channels)

    def name(self, row: int) -> str:
        if self._names is None:
            self._names = self.path.with_suffix(".names").read_text(encoding="utf-8").split("\n")
        return self._names[row]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pixels": None, "_names": None}


def is_packed(folder: str) -> bool:
    """Whether a folder is packed data."""
    return os.path.isfile(os.path.join(folder, HEAD))


def splits(folder: str) -> list[str]:
    """The splits of packed data; [] where it is not split."""
    return [name for name in _head(folder)["splits"] if name != WHOLE]


def _head(folder: str) -> dict[str, Any]:
    path = os.path.join(folder, HEAD)
    try:
        with open(path, encoding="utf-8") as file:
            head: dict[str, Any] = json.load(file)
        if head["format"] != FORMAT:
            raise UserError(f"{folder} was packed in format {head['format']}, and {FORMAT} is read here: pack it again")
        return head
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} cannot be read ({problem}): pack the data again") from None


@final
class Writer:
    """Packs splits into a folder that appears when all are there. Used as a context; leaving it early removes what was
    written."""

    def __init__(self, folder: Path, channels: int) -> None:
        """Raises UserError where the folder exists."""
        if folder.is_symlink() and not folder.exists():
            raise UserError(f"--out {folder} cannot be made: {in_the_way(folder)}; choose another folder")
        if folder.exists():
            raise UserError(f"{folder} exists: choose another folder with --out, or remove it")
        self.folder, self.channels = folder, channels
        self.aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        make_folder(self.aside.parent)
        self.aside.mkdir()
        self.counts: dict[str, int] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)

    def split(self, name: str, images: Iterable[tuple[np.ndarray, str, int | None]]) -> None:
        """Write a split: uint8 (H, W, C), the image's name, and its label or None for data without labels."""
        places, names, labels, begin = [], [], [], 0
        with open(self.aside / f"{name}.pixels", "wb") as file:
            for pixels, of, label in images:
                places.append((begin, *pixels.shape[:2]))
                names.append(of.replace("\n", " "))
                labels.append(label)
                begin += pixels.size
                file.write(np.ascontiguousarray(pixels).data)
            file.flush()
            os.fsync(file.fileno())
        arrays: dict[str, Any] = {"places": np.array(places, dtype=np.int64).reshape(-1, 3)}
        if labels and labels[0] is not None:
            arrays["labels"] = np.array(labels, dtype=np.int64)
        np.savez(self.aside / f"{name}.npz", **arrays)
        (self.aside / f"{name}.names").write_text("\n".join(names), encoding="utf-8")
        self.counts[name] = len(places)

    def finish(
        self, *, classes: tuple[str, ...] | None, fingerprint: str, source: str, left_out: LeftOut | None = None
    ) -> None:
        """Give the folder its name. fingerprint, source, left_out: of the data it was packed from."""
        head = {"format": FORMAT, "channels": self.channels, "splits": self.counts, "classes": classes,
                "fingerprint": fingerprint, "from": source, "left_out": (left_out or LeftOut()).as_json()}  # fmt: skip
        (self.aside / HEAD).write_text(json.dumps(head, indent=1))
        os.replace(self.aside, self.folder)
