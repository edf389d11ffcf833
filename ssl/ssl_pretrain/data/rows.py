"""Rows of numbers in a folder, one for each place of a run's stream of images or for each image of a data set: what a
frozen network gave for it (`loop/teacher_cache.py`, `tokenizer/token_data.py`).

A folder has `rows.json`, which says what the rows are and what they depend on, and `part-00000.npy`, `part-00001.npy`, ...:
NumPy arrays of records, each with the index of its image and the values of every field. A part is written aside, synced and
renamed, so it is whole or absent, and a killed writer continues with the parts that are missing. Headers are compared with
the expected bytes and never parsed, and sizes are compared with those of the files before memory is mapped.

Shapes: n rows.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import sync, write_text

Kind = Literal["float32", "float16", "bfloat16", "uint16", "int32"]
HEAD = "rows.json"
MOST_HEAD_BYTES = 1 << 20
PART_BYTES = 1 << 26  # of a part, about
MOST_PARTS = 1_000_000
_STORED = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "uint16": "<u2",
    "int32": "<i4",
}  # bfloat16 as its bits
_MOST_ROW_BYTES = 1 << 31


@dataclass(frozen=True)
class Layout:
    """What a record holds, and how many there are."""

    fields: tuple[tuple[str, Kind, tuple[int, ...]], ...]  # name, type and shape of each
    count: int  # records in all
    part: int  # records of each part but the last

    @property
    def record(self) -> np.dtype:
        """NumPy's type of a record: `index`, of the image, then the fields by their numbers, f0, f1, ..."""
        values = [(f"f{i}", _STORED[kind], shape) for i, (_, kind, shape) in enumerate(self.fields)]
        return np.dtype([("index", "<i8"), *values])

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-self.count // self.part)

    @property
    def total(self) -> int:
        """Size of all parts on the disk."""
        return (self.parts - 1) * self.size(0) + self.size(self.parts - 1)

    def rows(self, part: int) -> range:
        """The records of a part."""
        return range(part * self.part, min(self.count, (part + 1) * self.part))

    def header(self, part: int) -> bytes:
        """The bytes in front of a part's records."""
        text = io.BytesIO()
        described = {"descr": self.record.descr, "fortran_order": False, "shape": (len(self.rows(part)),)}
        np.lib.format.write_array_header_1_0(text, described)
        return text.getvalue()

    def size(self, part: int) -> int:
        """Bytes of a part's file."""
        return len(self.header(part)) + len(self.rows(part)) * self.record.itemsize


@final
class Rows:
    """Reads the records of a folder, whose parts are memory-mapped when they are first read. Picklable, safe to fork."""

    def __init__(self, folder: Path, layout: Layout, remedy: str) -> None:
        """remedy: what to do where a part is damaged, for messages."""
        self.folder, self.layout, self.remedy = folder, layout, remedy
        self._open: tuple[int, np.ndarray] | None = None  # the part that was read last

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

    def row_bytes(self, field: int) -> int:
        """Bytes of a field in a record."""
        return int(self.layout.record[f"f{field}"].itemsize)

    def read(self, field: int, start: int, index: np.ndarray) -> Tensor:
        """The values of records start, start + 1, ..., (n, *shape) in the type they are stored in.

        index: (n,) int64, the images that they must be of. Raises UserError where they are of others, and where a part is
        missing or damaged.
        """
        _, kind, shape = self.layout.fields[field]
        if not 0 <= start <= self.layout.count - len(index):
            raise UserError(f"{self.folder} has {self.layout.count:,} rows, and more are needed: {self.remedy}")
        out, done = np.empty((len(index), *shape), self.layout.record[f"f{field}"].base), 0
        while done < len(index):
            part, row = divmod(start + done, self.layout.part)
            records = self._part(part)[row : row + len(index) - done]
            wanted = index[done : done + len(records)]
            if not np.array_equal(records["index"], wanted):
                place = int(np.flatnonzero(records["index"] != wanted)[0])
                raise UserError(
                    f"{self.folder}: row {start + done + place:,} is of image {int(records['index'][place])}, and this run "
                    f"sees image {int(wanted[place])} there: images have become readable or unreadable; {self.remedy}"
                )
            out[done : done + len(records)] = records[f"f{field}"]
            done += len(records)
        return as_tensor(out, kind)

    def index(self) -> np.ndarray:
        """The images (count,) int64 that the records are of. Reads all parts."""
        return np.concatenate([self._part(part)["index"] for part in range(self.layout.parts)])

    def _part(self, part: int) -> np.ndarray:
        if self._open is None or self._open[0] != part:
            path, header = part_path(self.folder, part), self.layout.header(part)
            try:
                with open(path, "rb") as file:
                    if os.fstat(file.fileno()).st_size != self.layout.size(part) or file.read(len(header)) != header:
                        raise UserError(f"{path} is damaged or cut off: {self.remedy}")
                records = np.memmap(path, self.layout.record, "r", len(header), (len(self.layout.rows(part)),))
            except OSError as problem:
                raise UserError(f"{path} cannot be read ({problem.strerror}): {self.remedy}") from None
            self._open = part, records
        return self._open[1]


def as_tensor(values: np.ndarray, kind: Kind) -> Tensor:
    """Stored values as a tensor of their type."""
    if kind == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def as_array(values: Tensor, kind: Kind) -> np.ndarray:
    """Values to store, rounded to the type. Raises OverflowError where a finite one does not fit."""
    values = values.detach().cpu()
    rounded = values.to(getattr(torch, kind))
    if kind in ("float16", "bfloat16") and bool((rounded.isinf() & values.isfinite()).any()):
        raise OverflowError(f"{values.abs().max():.3g}")
    if kind == "bfloat16":
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return rounded.numpy()


def part_path(folder: Path, part: int) -> Path:
    """The file of a part."""
    return folder / f"part-{part:05d}.npy"


def missing(folder: Path, layout: Layout) -> list[int]:
    """The parts that are not there, or not of their size."""
    with os.scandir(folder) as entries:
        there = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    whole, last = layout.size(0), layout.parts - 1
    wanted = ((part, whole if part < last else layout.size(last)) for part in range(layout.parts))
    return [part for part, size in wanted if there.get(part_path(folder, part).name) != size]


def write_part(folder: Path, layout: Layout, part: int, records: Iterable[np.ndarray]) -> None:
    """Write a part from arrays of its records, in order. Raises OSError if the disk has no room; no file is left then."""
    path = part_path(folder, part)
    aside = path.with_name(f".{path.name}")
    try:
        with open(aside, "wb") as file:
            file.write(layout.header(part))
            for each in records:
                file.write(np.ascontiguousarray(each).tobytes())
            file.flush()
            os.fsync(file.fileno())
            assert file.tell() == layout.size(part), f"{path} has other records than its layout says"
        os.replace(aside, path)
        sync(folder)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_array(folder: Path, values: np.ndarray) -> None:
    """Write an array, float32 or int32, into a folder of its own, as the only record. Raises OSError."""
    layout = _alone("float32" if values.dtype == np.float32 else "int32", values.shape)
    record = np.zeros(1, layout.record)
    record["f0"] = values
    folder.mkdir(exist_ok=True)
    write_part(folder, layout, 0, [record])


def read_array(folder: Path, kind: Kind, shape: tuple[int, ...], remedy: str) -> Tensor:
    """An array that `write_array` wrote. Raises UserError where it is missing, damaged, or of another type or shape."""
    return Rows(folder, _alone(kind, shape), remedy).read(0, 0, np.zeros(1, np.int64))[0]


def _alone(kind: Kind, shape: tuple[int, ...]) -> Layout:
    return Layout((("values", kind, shape),), 1, 1)


def clear(folder: Path) -> None:
    """Remove what a killed writer left. For a process that holds the folder's lock."""
    for path in folder.glob(".part-*.npy"):
        path.unlink(missing_ok=True)


def check_room(folder: Path, layout: Layout, smaller: str) -> int:
    """The bytes that are still to be written. Raises UserError where the disk has less room. smaller: what needs less, for
    the message."""
    absent = missing(folder, layout)
    last = layout.parts - 1
    need = len(absent) * layout.size(0) - (layout.size(0) - layout.size(last)) * (last in absent[-1:])
    if need > 0.98 * free(folder):
        raise UserError(f"{in_units(need)} are needed and {folder} has {in_units(free(folder))} free: {smaller}")
    return need


def free(folder: Path) -> int:
    """Free bytes on the disk of a folder."""
    return shutil.disk_usage(folder).free


def in_units(size: float) -> str:
    """Bytes for people: "3.2 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def write_head(folder: Path, layout: Layout, facts: Mapping[str, Any]) -> None:
    """Write rows.json: the layout and other facts (plain data). Raises OSError."""
    described = {"fields": layout.fields, "count": layout.count, "part": layout.part}
    write_text(folder / HEAD, json.dumps({**facts, "layout": described}, indent=1) + "\n")


def read_head(folder: Path, kind: str) -> tuple[Layout, dict[str, Any]]:
    """The layout and the facts of a folder that holds `kind` ("teacher cache"). Raises UserError where it holds none, or
    rows.json is not what was written."""
    path = folder / HEAD
    try:
        if path.stat().st_size > MOST_HEAD_BYTES:
            raise ValueError("it is too large")
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["kind"] != kind:
            raise UserError(f"{folder} holds a {facts['kind']}, not a {kind}")
        stored = facts["layout"]
        fields = tuple((str(name), _kind(word), tuple(map(_count, shape))) for name, word, shape in stored["fields"])
        layout = Layout(fields, _count(stored["count"]), _count(stored["part"]))
        if not 0 < len(fields) <= 64 or layout.parts > MOST_PARTS:
            raise ValueError("its sizes are impossible")
        bounded(*(shape for _, _, shape in fields))
    except OSError as problem:
        raise UserError(f"{folder} holds no {kind} ({path.name}: {problem.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise UserError(f"{path} is damaged ({problem!r}): write the {kind} again in another folder") from None
    return layout, facts


def bounded(*shapes: tuple[int, ...]) -> None:
    """Raise ValueError for the shapes of a record's fields that no record can have."""
    if any(side < 1 for shape in shapes for side in shape) or sum(4 * math.prod(s) for s in shapes) > _MOST_ROW_BYTES:
        raise ValueError("its sizes are impossible")


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 62:
        raise ValueError(f"{value!r} is no number of things")
    return value


def _kind(word: Any) -> Kind:
    if word not in get_args(Kind):
        raise ValueError(f"{word!r} is no type of values")
    return word
