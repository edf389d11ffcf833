"""Images in parquet files, as the Hugging Face hub has them: a column of encoded images and maybe one of classes.

Parquet is compressed by pages, so one row cannot be read alone. Each file's images are therefore unpacked once, a batch
of rows at a time, into the cache of indexes (data/index.py) and read from there by memory-mapping.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, final

import numpy as np

from ..errors import UserError
from . import index, names
from .index import Index, Writer
from .source import Source

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:
    pa = None

BATCH_ROWS = 64  # rows unpacked at a time
READ_BYTES = 1 << 20  # of a file read at a time
OPEN_FILES = 128  # unpacked files kept mapped (each holds a file descriptor) by one source in one process
IMAGE_COLUMNS = ("image", "img", "jpg", "png")  # preferred names, where the metadata does not tell
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


@final
class ParquetSource(Source):
    """The images of one .parquet, or of a directory of them, in the order of the files' names and of their rows."""

    def __init__(self, path: str, split: str | None) -> None:
        self.path = path
        files = _files(path)
        columns = _Columns(files[0][1])
        wanted = [file for word, file in files if split is None or word == split]
        self._files = wanted
        self._tickets: list[index.Ticket] = []
        rows, filled = [], False
        for file in wanted:
            part = _unpacked(file, columns.image)
            self._tickets.append(part.ticket())
            rows.append(len(part["offsets"]) - 1)
            filled = filled or bool(part["offsets"][-1])
        self._ends = np.cumsum(rows)
        self._part = _reopener(self._tickets)
        if len(self) == 0:
            raise UserError(f"{path} holds no rows")
        if not filled:
            raise UserError(
                f"the images of {path} are not in its column {columns.image!r} (every value is empty; it may hold "
                f"paths of files elsewhere): give the folder of those files, or embed them in the parquet"
            )
        self.labels: np.ndarray | None = None
        self.classes: tuple[str, ...] | None = None
        if columns.label is not None:
            self.labels, self.classes = _labels(columns, wanted, [file for _, file in files])
        classes = f" in {len(self.classes):,} classes" if self.classes else ""
        files_text = "1 parquet file" if len(wanted) == 1 else f"{len(wanted):,} parquet files"
        self.description = f"{files_text} of {len(self):,} images{classes}"
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        """Of the files' names, sizes and row counts."""
        facts = [
            [os.path.basename(file), os.path.getsize(file), end]
            for file, end in zip(self._files, self._ends.tolist(), strict=True)
        ]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_part"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._part = _reopener(self._tickets)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[int, int]:
        """Which file, and which row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)

    def __getitem__(self, index: int) -> bytes:
        part, row = self._place(index)
        unpacked = self._part(part)
        start, stop = unpacked["offsets"][row : row + 2].tolist()
        return unpacked["images"][start:stop].tobytes()

    def name(self, index: int) -> str:
        """file:row, counted from 0."""
        part, row = self._place(index)
        return names.printable(os.fsencode(f"{self._files[part]}:{row}"))


def _reopener(tickets: list[index.Ticket]) -> Callable[[int], Index]:
    """Opens the unpacked file of a number, and keeps the last few open."""
    return functools.lru_cache(OPEN_FILES)(lambda part: index.reopen(*tickets[part]))


def splits(path: str) -> list[str]:
    """The splits of parquet files: words in their names ('train-00000-of-00001.parquet') or folders they lie in."""
    found = {word for word, _ in _files(path)}
    return [word for word in names.SPLIT_WORDS if word in found]


def _files(path: str) -> list[tuple[str, str]]:
    """(split or "", path) of every file."""
    words = ("", *names.SPLIT_WORDS)
    return [
        (words[split], os.path.join(path, name) if name else path)
        for split, name in names.list_shards(path, ".parquet")
    ]


class _Columns:
    """What the schema of the first file says: the column of the images, that of the classes, and the classes' names."""

    def __init__(self, file: str) -> None:
        schema = _schema(file)
        features = _features(schema)
        images = [name for name in schema.names if _is_image(schema.field(name).type)]
        declared = [name for name in images if features.get(name, {}).get("_type") == "Image"]
        if not images:
            listed = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
            raise UserError(
                f"{file} has no column of images (binary, or a struct with binary 'bytes'): it has {listed}"
            )
        self.image: str = (declared or sorted(images, key=lambda name: _preference(name, IMAGE_COLUMNS)))[0]
        declared = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
        likely = [name for name in LABEL_COLUMNS if name in schema.names and _is_label(schema.field(name).type)]
        self.label = next(iter(sorted(declared, key=lambda name: _preference(name, LABEL_COLUMNS)) or likely), None)
        self.names = features.get(self.label, {}).get("names") if self.label else None


def _preference(name: str, preferred: tuple[str, ...]) -> int:
    return preferred.index(name) if name in preferred else len(preferred)


def _schema(file: str) -> pa.Schema:
    if pa is None:
        raise UserError(f"{file} is parquet, which needs pyarrow: pip install 'ssl-pretrain[parquet]'")
    try:
        return pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{file} is not a whole parquet file: {error}") from None


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """The Hugging Face features by column, {} where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_label(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _labels(columns: _Columns, wanted: list[str], every: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (N,) int64 of the wanted files, -1 for null, and the classes that all the files agree on."""
    assert columns.label is not None
    values = {file: _read_label(file, columns.label) for file in every}
    column = pa.chunked_array([chunk for file in wanted for chunk in values[file].chunks], values[wanted[0]].type)
    if pa.types.is_integer(column.type):
        labels = pc.fill_null(column.cast(pa.int64()), -1).to_numpy()
        largest = max((pc.max(value).as_py() or 0 for value in values.values()), default=0)
        named = dict(enumerate(columns.names or ()))
        return labels, tuple(names.class_names(largest, named))
    known = sorted({word for value in values.values() for word in pc.unique(value).to_pylist() if word is not None})
    return pc.fill_null(pc.index_in(column, pa.array(known, column.type)), -1).cast(pa.int64()).to_numpy(), tuple(known)


def _read_label(file: str, column: str) -> pa.ChunkedArray:
    try:
        return pq.read_table(file, columns=[column]).column(0)
    except (KeyError, pa.ArrowInvalid) as error:
        raise UserError(f"{file} has no column {column!r} that can be read, as the first file has: {error}") from None


def _unpacked(file: str, column: str) -> Index:
    """The images of a file back to back ("images", bytes) and where each begins ("offsets", N + 1)."""
    status = os.stat(file)
    state = [status.st_size, status.st_mtime_ns, column]

    def build(writer: Writer) -> dict[str, Any]:
        lengths: list[np.ndarray] = []
        writer.stream("images", np.uint8, _image_bytes(file, column, lengths))
        writer.add("offsets", np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64))
        return {"state": state}

    return index.cached(
        "parquet", file, lambda known: known.meta["state"] == state, build, _unpacked_size(file, column)
    )


def _unpacked_size(file: str, column: str) -> int:
    """About how many bytes the images of a file take."""
    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def _image_bytes(file: str, column: str, lengths: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The images of a file, some rows at a time, as (bytes,) uint8; puts each batch's lengths (n,) into `lengths`.
    A null is an image of no bytes."""
    try:
        with pq.ParquetFile(file, buffer_size=READ_BYTES) as rows:
            for group in range(rows.num_row_groups):  # one at a time: asked for all, pyarrow keeps many in memory
                for batch in rows.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False):
                    images = batch.column(0)
                    if pa.types.is_struct(images.type):
                        images = pc.struct_field(images, "bytes")
                    images = pc.fill_null(images, b"")
                    wide = np.int64 if pa.types.is_large_binary(images.type) else np.int32
                    _, ends, values = images.buffers()
                    offsets = np.frombuffer(ends, wide)[images.offset : images.offset + len(images) + 1]
                    lengths.append(np.diff(offsets))
                    if values is not None:
                        yield np.frombuffer(values, np.uint8)[offsets[0] : offsets[-1]]
    except (KeyError, IndexError, pa.ArrowInvalid) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
