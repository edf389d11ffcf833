"""Writes features of images to files for other tools: NumPy arrays or parquet tables. Labels are not needed.

Shapes: N readable images, F floats a feature, P patches of D floats. Files, in the order of the images: `cls.npy`,
`pooled.npy`, ... (N, F); `patches.npy` (N, P, D), the grid row by row; `images.csv` (a header and N lines: name, label,
class; unlabelled images have the label -1 and an empty class). As parquet: `features.parquet` with one row for each
image: name, label, class, and one list of floats for each feature.
"""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ssl_pretrain import plugins
from ssl_pretrain.errors import UserError
from ssl_pretrain.features import NotFinite, Pixels, Tap, poolings
from ssl_pretrain.features.products import tf32
from ssl_pretrain.files import utf8

from ._results import Outcome
from ._task import UNKNOWN, Side, Task

IMAGES = "everything"
SHARED = True
CHUNK = 4096  # rows converted and written at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writing features."""

    features: tuple[str, ...] | None = None
    """Features to write: pooled, cls, mean, or of earlier blocks cls@-4, mean@-4 (default: cls and pooled, if the
    encoder has them)."""
    patches: bool = False
    """Also write every patch token of the last block, (N, P, D)."""
    format: Literal["npy", "parquet"] = "npy"
    """npy: NumPy arrays and images.csv; parquet: one table (needs pyarrow; without patches)."""
    dtype: Literal["float32", "float16"] = "float32"
    """Data type of the numbers in the files."""


def evaluate(task: Task, config: Config) -> Outcome:
    """Write the features of every readable image into `task.out`.

    Raises UserError for parquet without pyarrow or with patches, for values beyond the range of float16, if the folder
    cannot be written, and as `Task.single`.
    """
    assert task.out is not None  # there are no baselines
    if config.format == "parquet":
        if config.patches:
            raise UserError("--patches are written as npy only: use --format npy")
        plugins.optional("pyarrow.parquet", "--format parquet", "pyarrow, or use --format npy")
    names = tuple(dict.fromkeys(str(Tap.parse(name)) for name in config.features or ()))
    if isinstance(task.encoder.backbone, Pixels):
        names = ("pooled",)
    elif not names:
        names = tuple(name for name in ("cls", "pooled") if name in poolings(task.encoder, task.device))
    side = task.single(names)
    for name in names:
        _check_range(side.features[name], config.dtype, name)
    shapes = {name: list(side.features[name].shape) for name in names}
    try:
        if config.format == "parquet":
            files = [_parquet(task, side, names, config.dtype)]
        else:
            files = [_array(task.out / f"{name}.npy", side.features[name], config.dtype) for name in names]
            files.append(_table(task, side))
        if config.patches:
            shapes["patches"] = _patches(task, side, config.dtype)
            files.append("patches.npy")
    except OSError as problem:
        raise UserError(
            f"{task.out} cannot be written ({problem.strerror}): choose another folder with --out"
        ) from None
    descriptions = [f"{name}: {' x '.join(map(str, shape))} {config.dtype}" for name, shape in shapes.items()]
    return Outcome(
        {
            "n": len(side.index),
            "shapes": shapes,
            "files": files,
            "findings": [*descriptions, f"files: {', '.join(files)}"],
        },
        {
            "headline": f"features {', '.join(shapes)}",
            "features": list(shapes),
            "format": config.format,
            "dtype": config.dtype,
            **task.protocol(None, side),
        },
        [],
    )


def _check_range(rows: np.ndarray, dtype: str, name: str) -> None:
    limit = float(np.finfo(dtype).max)
    if any(float(np.abs(rows[start : start + CHUNK]).max()) > limit for start in range(0, len(rows), CHUNK)):
        raise UserError(f"feature {name} has values beyond {limit:g}, the largest {dtype}: use --dtype float32")


def _array(path: Path, rows: np.ndarray, dtype: str) -> str:
    """Write rows (N, F) in chunks to a temporary file, then rename it; returns the name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        array = np.lib.format.open_memmap(aside, mode="w+", dtype=np.dtype(dtype), shape=rows.shape)
        for start in range(0, len(rows), CHUNK):
            array[start : start + CHUNK] = rows[start : start + CHUNK]
        array.flush()
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path.name


def _described(task: Task, side: Side) -> Iterator[tuple[str, int, str]]:
    """Name, label and class of each row."""
    for i, label in zip(side.index.tolist(), side.labels.tolist(), strict=True):
        name = "" if label == UNKNOWN else task.data.classes[label]
        yield utf8(task.data.test.source.name(i)), label, utf8(name)


def _table(task: Task, side: Side) -> str:
    assert task.out is not None
    aside = task.out / f".images.csv.{os.getpid()}"
    try:
        with open(aside, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("name", "label", "class"))
            writer.writerows(_described(task, side))
        os.replace(aside, task.out / "images.csv")
    finally:
        aside.unlink(missing_ok=True)
    return "images.csv"


def _parquet(task: Task, side: Side, names: tuple[str, ...], dtype: str) -> str:
    import pyarrow
    from pyarrow import parquet

    assert task.out is not None
    kind = pyarrow.from_numpy_dtype(np.dtype(dtype))
    widths = {name: side.features[name].shape[1] for name in names}
    schema = pyarrow.schema(
        [("name", pyarrow.string()), ("label", pyarrow.int64()), ("class", pyarrow.string())]
        + [(name, pyarrow.list_(kind, width)) for name, width in widths.items()]
    )
    aside = task.out / f".features.parquet.{os.getpid()}"
    described = list(_described(task, side))
    try:
        with parquet.ParquetWriter(aside, schema) as writer:
            for start in range(0, len(described), CHUNK):
                part = described[start : start + CHUNK]
                columns: list[Any] = [[row[at] for row in part] for at in range(3)]
                for name in names:
                    flat = np.ascontiguousarray(side.features[name][start : start + CHUNK], dtype=dtype).ravel()
                    columns.append(pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(flat), widths[name]))
                writer.write_table(pyarrow.table(columns, schema=schema))
        os.replace(aside, task.out / "features.parquet")
    finally:
        aside.unlink(missing_ok=True)
    return "features.parquet"


@torch.inference_mode()
def _patches(task: Task, side: Side, dtype: str) -> list[int]:
    """Write patches.npy batch by batch; returns its shape. The images are decoded in this process."""
    assert task.out is not None
    source, n = task.data.test.source, len(side.index)
    path, aside = task.out / "patches.npy", task.out / f".patches.npy.{os.getpid()}"
    array: np.memmap | None = None
    try:
        for start in range(0, n, task.batch_size):
            batch = side.index[start : start + task.batch_size].tolist()
            images = task.encoder.preprocess([source[i] for i in batch]).to(task.device)
            with tf32(task.device), torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
                tokens = task.encoder(images).patches.float().cpu().numpy()
            if not np.isfinite(tokens).all():
                raise NotFinite("the encoder gives NaN or infinity for the patches of these images")
            _check_range(tokens, dtype, "patches")
            if array is None:
                shape = (n, *tokens.shape[1:])
                array = np.lib.format.open_memmap(aside, mode="w+", dtype=np.dtype(dtype), shape=shape)
            array[start : start + len(batch)] = tokens
            task.report("patches", start + len(batch), n)
        assert array is not None  # a source without readable images has raised an error before
        array.flush()
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return list(array.shape)
