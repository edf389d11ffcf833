"""Which images to pretrain on."""

from __future__ import annotations

import os

import numpy as np

from ..errors import UserError, nearest, reads_data
from .names import canonical_split
from .source import Source, open_source, pretraining_split, splits
from .subset import Subset

ALL = "all"  # --train-split all: every image, whatever split it may be of


@reads_data
def open_training(data: str, train_split: str | None = None) -> Source:
    """The images to pretrain on: those of `train_split` (a split, a folder beside others, or ALL), else of the split
    that `pretraining_split` finds. Raises UserError as that and `open_source`."""
    if train_split is None:
        return open_source(data, pretraining_split(data))
    if train_split == ALL:
        return open_source(data, None)
    known = splits(data)
    if canonical_split(train_split) in known:
        return open_source(data, train_split)
    path = os.path.abspath(os.path.expanduser(data))
    inside = os.path.join(path, train_split)
    if os.path.isdir(path) and os.path.exists(inside):
        return open_source(inside, None)
    if (part := _part(open_source(data, None), train_split)) is not None:
        return part
    folders = _folder_names(path)
    hint = nearest(train_split, [*known, *folders, ALL])
    raise UserError(f"{data} has no split and no folder {train_split!r} for --train-split{hint}")


def _part(source: Source, name: str) -> Source | None:
    """The samples of a shard, or of a folder in shards, of that name or path; None where there are none."""
    wanted = tuple(f"/{name}{ending}/" for ending in ("", ".tar", ".parquet", ".arrow"))
    paths = (source.name(i).replace(":", "/") for i in range(len(source)))
    chosen = [i for i, path in enumerate(paths) if any(word in path for word in wanted)]
    return Subset(source, np.array(chosen, np.int64)) if chosen else None


def _folder_names(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
