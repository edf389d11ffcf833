"""Small data sets for tests: images that tell their number, in folders, tar shards and parquet files."""

import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

try:
    import pyarrow as pa
    import pyarrow.parquet as pq

    IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
except ImportError:  # the tests that need it skip
    pa = pq = IMAGE_TYPE = None


def png(seed: int) -> bytes:
    """A small image that tells its seed by its pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def fill(root: Path, files: dict) -> Path:
    """Write files by path (str or bytes) under root; the bytes of an int are png(int)."""
    for name, content in files.items():
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png(content) if isinstance(content, int) else content)
    return Path(root)


def pack(path: Path, members: dict) -> Path:
    """A tar of members by name, in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as archive:
        for name, content in members.items():
            data = png(content) if isinstance(content, int) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, columns: dict, features: dict | None = None, **options) -> Path:
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def structs(numbers: Iterable[int | None]) -> "pa.Array":
    values = [None if i is None else {"bytes": png(i), "path": f"{i}.png"} for i in numbers]
    return pa.array(values, IMAGE_TYPE)


def names_of(source: Any) -> set[str]:
    return {source.name(i).rpartition("/d/")[2] for i in range(len(source))}


def class_folders(*splits: str, images: int = 4) -> dict[str, int]:
    files = [f"{split}/{kind}/{i}.png" for split in splits for kind in ("a", "b") for i in range(images)]
    return {file: number for number, file in enumerate(files)}
