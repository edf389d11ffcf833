"""Images in parquet files, as the Hugging Face hub has them, and in the Arrow files of `datasets.save_to_disk`: a column of
encoded images and maybe one of classes.

Parquet is compressed by pages, so one row cannot be read alone. Each file's images are therefore unpacked once, a batch
of rows at a time, into the cache of indexes (data/index.py) and read from there by memory-mapping.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from .. import plugins
from ..errors import UserError, of_the_machine
from . import index, left_out, names
from .index import Index, Writer
from .left_out import LeftOut
from .source import Source
from .walk import Walk, list_shards, walk

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except Exception:  # whatever it is, it is said where a parquet file is met
    pa = None

BATCH_ROWS = 64  # rows unpacked at a time
READ_BYTES = 1 << 20  # of a file read at a time
OPEN_FILES = 128  # unpacked files kept mapped (each holds a file descriptor) by one source in one process
IMAGE_COLUMNS = ("image", "img", "jpg", "png")  # preferred names, where the metadata does not tell
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")


@final
class ParquetSource(Source):
    """The images of one .parquet or .arrow, or of a directory of them, in the order of the files' names and of their
    rows."""

    def __init__(self, path: str, split: str | None, walked: Walk | None = None) -> None:
        """walked: what a walk has just found at `path`, where there was one."""
        self.path = path
        files, self.left_out = _files(path, walked)
        every = [(word, file, _Columns(file)) for word, file in files]
        wanted = [(file, columns) for word, file, columns in every if split is None or word == split]
        if split is not None and (outside := [file for word, file, _ in every if not word]):
            names_ = [names.printable(os.fsencode(os.path.basename(file))) for file in outside]
            self.left_out.out[f"file of {left_out.NO_SPLIT}s"] = (len(outside), names_[: left_out.EXAMPLES])
        for file, columns in wanted:
            if columns.not_read is not None:
                self.left_out.note(columns.not_read, names.printable(os.fsencode(os.path.basename(file))))
        self._files = [file for file, _ in wanted]
        self._tickets: list[index.Ticket] = []
        rows, filled = [], False
        for file, columns in wanted:
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
                f"the images of {path} are not in its column {wanted[0][1].image!r} (every value is empty; it may hold "
                f"paths of files elsewhere): give the folder of those files, or embed them in the parquet"
            )
        self.labels: np.ndarray | None = None
        self.classes: tuple[str, ...] | None = None
        if any(columns.label is not None for _, _, columns in every):
            self._read_labels(every, set(self._files), rows)
        classes = f" in {len(self.classes):,} classes" if self.classes else ""
        ending = "arrow" if self._files[0].lower().endswith(".arrow") else "parquet"
        files_text = f"1 {ending} file" if len(wanted) == 1 else f"{len(wanted):,} {ending} files"
        self.description = f"{files_text} of {len(self):,} images{classes}"
        self.fingerprint = self._fingerprint()

    def _read_labels(self, every: list[tuple[str, str, _Columns]], wanted: set[str], rows: list[int]) -> None:
        values = [_Labels.read(file, columns) for _, file, columns in every]
        classes, numbers = _common_classes(values)
        mine = [
            labels for (_, file, _), labels in zip(every, numbers, strict=True) if file in wanted
        ]  # None: the file has no labels
        for file, count, of in zip(self._files, rows, mine, strict=True):
            if of is not None and len(of) != count:
                raise UserError(
                    f"{file} is damaged: {count:,} images and {len(of):,} labels: copy or download it again"
                )
        labels = np.concatenate(
            [np.full(count, -1, np.int64) if of is None else of for count, of in zip(rows, mine, strict=True)]
        )
        bare = int((labels < 0).sum())
        if bare == len(labels):
            return
        self.labels, self.classes = labels, classes
        self.labels_from = f"the column {next(v.column for v in values if v.column)!r}"
        if bare:
            self.left_out.note(left_out.NO_LABEL, self.name(int(np.argmax(labels < 0))), bare)

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


def splits(path: str, walked: Walk | None = None) -> list[str]:
    """The splits of parquet files: words in their names ('train-00000-of-00001.parquet') or folders they lie in."""
    found = {word for word, _ in _files(path, walked)[0]}
    return [word for word in names.SPLIT_WORDS if word in found]


def split_like(path: str) -> list[str]:
    """Names of files that may be splits but were not recognised as such."""
    files = _files(path, None)[0]
    if len(files) < 2 or any(word for word, _ in files):
        return []
    within = [os.path.relpath(file, path).split(os.sep) for _, file in files]
    return names.split_like(names.stem(parts[-1]) for parts in within) or names.split_like(
        parts[0] for parts in within if len(parts) > 1
    )


def holds_images(file: str) -> bool:
    """Whether a file has a column of images; true where that cannot be told."""
    try:
        _Columns(file)
    except NoImages:
        return False
    except UserError:
        return True
    return True


ENDINGS = (".parquet", ".arrow")


def _files(path: str, walked: Walk | None) -> tuple[list[tuple[str, str]], LeftOut]:
    """(split or "", path) of every file, and what else there is."""
    words = ("", *names.SPLIT_WORDS)
    report = LeftOut()
    if walked is None and not os.path.isdir(path):
        shards = list_shards(path, ENDINGS[0])
    else:
        walked = walked or walk(path)
        report.merge(walked.report)
        for known in ("dataset_info.json", "dataset_dict.json", "state.json"):  # of datasets.save_to_disk
            for name in report.out.get(names.why_not(b"json"), (0, []))[1]:
                if os.path.basename(name) == known:
                    report.discard(names.why_not(b"json"), name)
        for name in walked.shards:
            if not name.lower().endswith(ENDINGS):
                report.add(left_out.OTHER_DATA, names.printable(os.fsencode(name)))
        if walked.found.lengths:
            report.add(left_out.LOOSE, names.printable(walked.found.file_name(0)), len(walked.found.lengths))
        found = [name for name in walked.shards if name.lower().endswith(ENDINGS)]
        if (kept := [name for name in found if not _is_cache(name)]) and len(kept) < len(found):
            for name in set(found) - set(kept):
                report.add("cache file of datasets", names.printable(os.fsencode(name)))
            found = kept
        shards = names.with_splits(found)
    return [(words[split], os.path.join(path, name) if name else path) for split, name in shards], report


def _is_cache(name: str) -> bool:
    """Whether it is what `datasets` writes for a map or filter beside the data."""
    return os.path.basename(name).startswith(("cache-", "tmp")) and name.lower().endswith(".arrow")


class NoImages(UserError):
    """A file without a column of images."""


class _Columns:
    """What the schema of a file says: the column of the images, that of the classes, and the classes' names."""

    def __init__(self, file: str) -> None:
        with _reading(file):  # a name in a damaged schema need not be UTF-8
            self._read(file)

    def _read(self, file: str) -> None:
        schema = _schema(file)
        features = _features(schema)
        images = [name for name in schema.names if _is_image(schema.field(name).type)]
        declared = [name for name in images if features.get(name, {}).get("_type") == "Image"]
        if not images:
            listed = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names)
            raise NoImages(
                names.printable(
                    os.fsencode(
                        f"{file} has no column of images (binary, or a struct with binary 'bytes'): it has {listed}"
                    )
                )
            )
        self.image: str = (declared or sorted(images, key=lambda name: _preference(name, IMAGE_COLUMNS)))[0]
        declared = [
            name
            for name in schema.names
            if features.get(name, {}).get("_type") == "ClassLabel" and _is_label(schema.field(name).type)
        ]
        likely = [name for name in LABEL_COLUMNS if name in schema.names and _is_label(schema.field(name).type)]
        self.label = next(iter(sorted(declared, key=lambda name: _preference(name, LABEL_COLUMNS)) or likely), None)
        named_so = [name for name in LABEL_COLUMNS if name in schema.names and name != self.image]
        self.not_read = (
            f"file whose column {named_so[0]!r} ({schema.field(named_so[0]).type}) is no label, used without"
            if self.label is None and named_so
            else None
        )
        found = features.get(self.label, {}).get("names") if self.label else None
        self.names = [str(name) for name in found] if isinstance(found, list) else None


def _preference(name: str, preferred: tuple[str, ...]) -> int:
    return preferred.index(name) if name in preferred else len(preferred)


@contextlib.contextmanager
def _reading(file: str) -> Iterator[None]:
    """Whatever pyarrow raises in here means that the file is damaged or away. Raises UserError, of one line."""
    if pa is None:
        kind = "parquet" if file.lower().endswith(".parquet") else "Arrow"
        plugins.optional("pyarrow.parquet", f"{file} is {kind}, which", "'ssl-pretrain[parquet]'")  # raises UserError
    try:
        yield
    except (UserError, index.CacheUnwritable):
        raise
    except FileNotFoundError:
        raise UserError(f"there is no {file}") from None
    except PermissionError:
        raise UserError(f"{file} cannot be read: permission denied") from None
    except Exception as error:  # for damage pyarrow raises nearly anything: ArrowException, OSError, UnicodeError
        if of_the_machine(error) is not None:  # too many open files, for one: the file is not to blame
            raise
        said = names.printable(names.one_line(error).encode("utf-8", "replace"))
        raise UserError(
            f"{file} is not a whole {os.path.splitext(file)[1][1:].lower()} file ({said[:300]}): copy or download it again"
        ) from None


def _is_arrow(file: str) -> bool:
    return file.lower().endswith(".arrow")


@contextlib.contextmanager
def _arrow(file: str) -> Iterator[Any]:
    """A reader of an Arrow file, of the stream format (as `datasets` writes) or of the file format."""
    with pa.memory_map(file) as mapped:
        try:
            reader = pa.ipc.open_stream(mapped)
        except pa.ArrowInvalid:
            mapped.seek(0)
            reader = pa.ipc.open_file(mapped)
        yield reader


def _arrow_batches(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader


def _schema(file: str) -> pa.Schema:
    with _reading(file):
        if _is_arrow(file):
            with _arrow(file) as reader:
                return reader.schema
        return pq.read_schema(file)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """The Hugging Face features by column, {} where there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or str(kind) == "binary_view"


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or str(kind) == "string_view"
    )


@dataclass
class _Labels:
    """The labels of a file: numbers or words, whichever the column holds."""

    column: str | None
    numbers: np.ndarray | None = None  # (n,) int64, -1 where unknown
    words: np.ndarray | None = None  # (n,) int64 into `names`, -1 where unknown
    names: tuple[str, ...] = ()  # of words, or of numbers where the metadata names them

    @classmethod
    def read(cls, file: str, columns: _Columns) -> _Labels:
        """Raises UserError where the column cannot be read, or a number in it is no label."""
        if columns.label is None:
            return cls(None)
        with _reading(file):
            column = _read_label(file, columns.label)
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if pa.types.is_boolean(column.type):
                named = columns.names if columns.names and len(columns.names) == 2 else ["False", "True"]
                return cls(columns.label, pc.fill_null(column.cast(pa.int64()), -1).to_numpy(), names=tuple(named))
            if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
                numbers = _numbers(file, columns.label, column)
                return cls(columns.label, numbers, names=tuple(columns.names or ()))
            known = [word for word in pc.unique(column).to_pylist() if word]  # neither null nor empty
            words = pc.fill_null(pc.index_in(column, pa.array(known, column.type)), -1).cast(pa.int64()).to_numpy()
            return cls(columns.label, words=words, names=tuple(known))


def _numbers(file: str, name: str, column: pa.ChunkedArray) -> np.ndarray:
    """Numbers as labels (n,) int64: null, NaN and negative ones -1. Raises UserError for one that is no class number."""
    if pa.types.is_floating(column.type):
        values = pc.fill_null(column.cast(pa.float64()), -1.0).to_numpy()
        values = np.where(np.isnan(values), -1.0, values)
        odd = values[(values != np.floor(values)) | (values > names.MAX_CLASSES)].tolist()
    else:
        largest = pc.max(column).as_py()
        odd = [largest] if largest is not None and largest > names.MAX_CLASSES else []
        values = None if odd else pc.fill_null(column.cast(pa.int64()), -1).to_numpy()
    if odd:
        raise UserError(
            f"{file}: the value {odd[0]} of column {name!r} is no class number (whole, and at most "
            f"{names.MAX_CLASSES:,}): remove or rename the column, or number the classes from 0"
        )
    assert values is not None
    return np.maximum(values, -1).astype(np.int64)


def _common_classes(values: list[_Labels]) -> tuple[tuple[str, ...], list[np.ndarray | None]]:
    """The classes of all files together, by name where they are named, and the labels of each file in them (None: it has
    none)."""
    with_words = any(v.words is not None for v in values)
    named = {v.names for v in values if v.numbers is not None and v.names}
    if not with_words and len(named) < 2:
        largest = max((int(v.numbers.max(initial=-1)) for v in values if v.numbers is not None), default=-1)
        classes = names.class_names(largest, dict(enumerate(named.pop() if named else ())))
        return tuple(classes), [v.numbers for v in values]
    own: list[list[str]] = []  # the names of each file's classes, by its own numbers
    for v in values:
        largest = -1 if v.numbers is None else int(v.numbers.max(initial=-1))
        own.append(list(v.names) if v.numbers is None else names.class_names(largest, dict(enumerate(v.names))))
    # Numbered classes keep the order of the first file that has them; words are sorted.
    every = [name for some in own for name in some]
    ordered = sorted(set(every)) if with_words else list(dict.fromkeys(every))
    number = {name: i for i, name in enumerate(ordered)}
    found: list[np.ndarray | None] = []
    for v, mine in zip(values, own, strict=True):
        labels = v.words if v.numbers is None else v.numbers
        to = np.array([number[name] for name in mine] + [-1], np.int64)  # the last: -1 stays -1
        found.append(None if labels is None else to[labels])
    return tuple(ordered), found


def _read_label(file: str, column: str) -> pa.ChunkedArray:
    if not _is_arrow(file):
        with pq.ParquetFile(file) as rows:
            return rows.read(columns=[column]).column(0)
    with _arrow(file) as reader:
        chunks = [batch.column(column) for batch in _arrow_batches(reader)]
        return pa.chunked_array(chunks, reader.schema.field(column).type)


def _unpacked(file: str, column: str) -> Index:
    """The images of a file back to back ("images", bytes) and where each begins ("offsets", N + 1)."""
    with _reading(file):
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
    if _is_arrow(file):
        return os.path.getsize(file)
    with _reading(file):
        metadata = pq.read_metadata(file)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] == column)


def _image_bytes(file: str, column: str, lengths: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The images of a file, some rows at a time, as (bytes,) uint8; puts each batch's lengths (n,) into `lengths`.
    A null is an image of no bytes."""
    batches = _column(file, column)
    is_struct = is_view = None
    with _reading(file):
        images = next(batches, None)
        if images is not None:
            is_struct = pa.types.is_struct(images.type)
            is_view = str(images.type.field("bytes").type if is_struct else images.type) == "binary_view"
    while images is not None:
        with _reading(file):  # not around the yield, whose errors are of the cache
            if is_struct:
                images = pc.struct_field(images, "bytes")
            if images.null_count:
                images = pc.fill_null(images, b"")
            if is_view:
                images = images.cast(pa.large_binary())
            wide = np.int64 if pa.types.is_large_binary(images.type) else np.int32
            _, ends, values = images.buffers()
            offsets = np.frombuffer(ends, wide)[images.offset : images.offset + len(images) + 1]
            sizes = np.diff(offsets)
            content = None
            if len(sizes):
                first, last = int(offsets[0]), int(offsets[-1])
                if first < 0 or last > (0 if values is None else values.size) or sizes.min() < 0:
                    raise ValueError("offsets that lead out of the data")
                lengths.append(sizes)
                content = None if values is None else np.frombuffer(values, np.uint8)[first:last]
        if content is not None:
            yield content
        with _reading(file):
            images = next(batches, None)


def _column(file: str, column: str) -> Iterator[Any]:
    """A column of a file, some rows at a time."""
    if _is_arrow(file):
        with _arrow(file) as reader:
            yield from (batch.column(column) for batch in _arrow_batches(reader))
        return
    with pq.ParquetFile(file, buffer_size=READ_BYTES) as rows:
        for group in range(rows.num_row_groups):  # one at a time: asked for all, pyarrow keeps many in memory
            for batch in rows.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False):
                yield batch.column(0)
