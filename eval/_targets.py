"""A table of targets: a CSV file with one line for each image, columns of yes/no labels and columns of numbers.

`file` names an image. `split` (if the data itself is not split) is train, val or test. Every other column is a target:
a label if it has only the values 0 and 1, else a number. An empty field means unknown.

Shapes: n images, T targets.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssl_pretrain.errors import UserError, nearest

FILE, SPLIT = "file", "split"
TRAIN, TEST = ("train",), ("test", "val", "validation")  # names of a split; the first with images is used


@dataclass(frozen=True)
class Targets:
    """The content of the file."""

    files: list[str]
    splits: list[str] | None  # None: the file has no such column
    names: tuple[str, ...]  # of the T targets
    values: np.ndarray  # (lines, T) float64, NaN if unknown
    labels: np.ndarray  # (T,) bool: whether a target is a yes/no label

    @classmethod
    def read(cls, path: Path, columns: Sequence[str] | None) -> "Targets":
        """Read the file, with all targets or only `columns`. Raises UserError for an invalid file."""
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                lines = list(csv.reader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as problem:
            raise UserError(
                f"--targets {path} cannot be read: {getattr(problem, 'strerror', None) or problem}"
            ) from None
        if len(lines) < 2:
            raise UserError(f"--targets {path}: it needs a line of column names and one line for each image")
        heads = [head.strip() for head in lines[0]]
        if FILE not in heads:
            raise UserError(
                f"--targets {path}: no column {FILE!r}, which names the image; there are {', '.join(heads)}"
            )
        if len(set(heads)) < len(heads):
            raise UserError(f"--targets {path}: two columns have the same name")
        existing = [head for head in heads if head not in (FILE, SPLIT)]
        names = tuple(columns or existing)
        if not names:
            raise UserError(f"--targets {path}: there is no column except {', '.join(heads)}: nothing to predict")
        for name in names:
            if name not in existing:
                raise UserError(f"--columns {name}: {path} has no such column{nearest(name, existing)}")
        places = [heads.index(name) for name in names]
        values = np.full((len(lines) - 1, len(names)), np.nan)
        for row, line in enumerate(lines[1:]):
            if len(line) != len(heads):
                raise UserError(f"--targets {path}, line {row + 2}: {len(line)} fields, not {len(heads)}")
            for column, place in enumerate(places):
                if line[place].strip():
                    values[row, column] = _number(path, row + 2, names[column], line[place])
        known = np.isfinite(values)
        if not known.any(0).all():
            raise UserError(f"--targets {path}: column {names[int(np.argmin(known.any(0)))]!r} is empty")
        labels = np.array([np.isin(values[known[:, t], t], (0, 1)).all() for t in range(len(names))])
        files = [line[heads.index(FILE)].strip() for line in lines[1:]]
        splits = [line[heads.index(SPLIT)].strip().lower() for line in lines[1:]] if SPLIT in heads else None
        return cls(files, splits, names, values, labels)

    def rows(self, images: Sequence[str], root: str) -> np.ndarray:
        """The line of each image (by its name in the source), (n,) int64, -1 for none. A file in the table is a path
        below `root`, a shard's member, or a base name that only one image has. Raises UserError if a name fits several
        images, if an image has two lines, or if no name fits an image."""
        found = np.full(len(images), -1)
        by_path: dict[str, list[int]] = {}
        by_name: dict[str, list[int]] = {}
        for i, image in enumerate(images):
            path = image.removeprefix(root).lstrip("/")
            for name in {image, path, path.rsplit(":", 1)[-1]}:
                by_path.setdefault(name, []).append(i)
            by_name.setdefault(Path(path.rsplit(":", 1)[-1]).name, []).append(i)
        for line, file in enumerate(self.files):
            hits = by_path.get(file) or by_path.get(file.removeprefix("./")) or by_name.get(file) or []
            if len(hits) > 1:
                raise UserError(
                    f"--targets, line {line + 2}: {file!r} is the name of {len(hits)} images: give their paths"
                )
            if hits and found[hits[0]] >= 0:
                raise UserError(f"--targets, line {line + 2}: {file!r} is also in line {found[hits[0]] + 2}")
            if hits:
                found[hits[0]] = line
        if not (found >= 0).any():
            raise UserError(
                f"--targets: none of its files is among the images: it has {self.files[0]!r}, an image is {images[0]!r}"
            )
        return found

    def split(self, wanted: Iterable[str]) -> np.ndarray:
        """Lines of that split, (lines,) bool."""
        assert self.splits is not None
        return np.isin(self.splits, list(wanted))


def _number(path: Path, line: int, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"--targets {path}, line {line}: {column} is {text!r}, not a number (leave it empty if unknown)"
        )
    return value
