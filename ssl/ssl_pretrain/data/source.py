"""Where images come from: the contract of a source, and finding out what kind of data a path holds.

A `data` string is the path of a folder of images, of tar or parquet shards (a directory of them or one file), of packed
pixels (`ssl-data pack`), 'fractals' with options (see data/fractals.py), or 'KIND:...', where another package's entry point
KIND (group `ssl_pretrain.sources`) names a PluginSource. A pattern like shards/{000..003}.tar stands for shards, too.
"""

from __future__ import annotations

import difflib
import os
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from .. import plugins
from ..errors import UserError, nearest, reads_data
from .left_out import LeftOut

if TYPE_CHECKING:
    from .walk import Walk

Kind = Literal["fractals", "folder", "tar", "parquet", "packed"]
GROUP = "ssl_pretrain.sources"  # the entry points of other packages


class Source(ABC):
    """N samples with random access. Picklable, and safe to fork: files are opened lazily and read by position."""

    labels: np.ndarray | None  # (N,) int64, -1 where unknown; None where the data has no labels
    classes: tuple[str, ...] | None  # class names by label
    # Hex; the same for the same data at another place, another one when files come, go, get other names or another size
    # (of a folder of more than folder.FINGERPRINT_FILES images: when one of that many among them does).
    fingerprint: str
    description: str  # one line for people
    labels_from: str | None = None  # what gives the labels, for people; None where there are none, or it is not known
    left_out: LeftOut = (
        LeftOut()
    )  # what of the data is not used, and why; the one of a class that says nothing is empty

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> bytes | np.ndarray:
        """An encoded image file, or a decoded array (H, W, C) uint8. Raises IndexError outside 0..N-1; OSError or
        ValueError where this one sample cannot be read. The bytes may be no image, or empty: decoding tells."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The sample's name for messages: its path, or shard:member."""


class PluginSource(Source, ABC):
    """A source of another package, opened as `--data KIND:REST`. A final subclass is what its entry point names."""

    @abstractmethod
    def __init__(self, data: str, split: str | None) -> None:
        """Open one split, or with None everything. data: REST, what follows the first colon; a relative path in it is
        relative to the working directory. split: one of `splits(data)`. Raises UserError for a user's mistake."""

    @classmethod
    def splits(cls, data: str) -> list[str]:
        """The splits of the data in lower case, e.g. ["train", "val"]; [] (the default) where it is not split."""
        return []

    @classmethod
    def example(cls, folder: Path) -> str:
        """Make a small data set in an empty folder and return the REST that opens it. For the conformance check."""
        raise NotImplementedError


def kinds() -> list[str]:
    """The kinds of data: ours, then those that other packages declare. Imports nothing."""
    mine: tuple[str, ...] = get_args(Kind)
    return [*mine, *(name for name in plugins.installed(GROUP) if name not in mine)]


def plugin(kind: str) -> type[PluginSource]:
    """The source that another package's entry point `kind` names. Raises TypeError where that is no PluginSource."""
    found = plugins.load_installed(GROUP, kind)
    if not (isinstance(found, type) and issubclass(found, PluginSource)):
        raise TypeError(
            f"the entry point {kind!r} must name a subclass of ssl_pretrain.data.source.PluginSource, not {found!r}"
        )
    return found


@reads_data
def splits(data: str) -> list[str]:
    """The splits of the data, e.g. ["train", "val"]; [] where it is not split. Raises UserError as `open_source`."""
    if (kind := _plugin_kind(data)) is not None:
        return plugin(kind).splits(data.partition(":")[2])
    return _splits(data, *_kind(data))


@reads_data
def open_source(data: str, split: str | None) -> Source:
    """The samples of one split, or with None everything.

    Raises UserError where there is no such data or split, or nothing in it that can be read.
    """
    if (installed := _plugin_kind(data)) is not None:
        if split is not None:
            split = _known_split(data, split, splits(data))
        return plugin(installed)(data.partition(":")[2], split)
    kind, walked = _kind(data)
    if split is not None:
        split = _known_split(data, split, _splits(data, kind, walked))
    match kind:
        case "fractals":
            from .fractals import FractalSource

            return FractalSource(data, split)
        case "folder":
            from .folder import FolderSource

            return FolderSource(_path(data), split, walked)
        case "tar":
            from .tar import TarSource

            return TarSource(_path(data), split, walked)
        case "parquet":
            from .parquet import ParquetSource

            return ParquetSource(_path(data), split, walked)
        case "packed":
            from .packed import PackedSource

            return PackedSource(_path(data), split)


def _splits(data: str, kind: Kind, walked: Walk | None) -> list[str]:
    match kind:
        case "fractals":
            from . import fractals

            return fractals.splits(data)
        case "folder":
            from . import folder

            return folder.splits(_path(data), walked)
        case "tar":
            from . import tar

            return tar.splits(_path(data), walked)
        case "parquet":
            from . import parquet

            return parquet.splits(_path(data), walked)
        case "packed":
            from . import packed

            return packed.splits(_path(data))


@reads_data
def pretraining_split(data: str) -> str | None:
    """The split to pretrain on: "train" where there is one, else None (everything).

    Raises UserError where that might take images to test on: there are splits, but none to train on, or folders or shards
    that are named like splits and are none for certain.
    """
    from .names import canonical_split

    if _plugin_kind(data) is not None:
        kind, known = None, splits(data)
    else:
        kind, walked = _kind(data)
        known = _splits(data, kind, walked)
    if "train" in known:
        return "train"
    if known:
        listed = ", ".join(known)
        raise UserError(
            f"{data} has the split{'s' if len(known) > 1 else ''} {listed}, and none to train on: say which images to "
            f"train on with --train-split NAME ({listed}), or --train-split all for all"
        )
    suspects = [] if kind is None else _split_like(data, kind)
    if suspects:
        shown = ", ".join(suspects[:5]) + (", ..." if len(suspects) > 5 else "")
        likely = next((name for name in suspects if canonical_split(os.path.basename(name)) == "train"), suspects[0])
        raise UserError(
            f"{data} has parts named like splits beside others ({shown}): say which to train on with --train-split NAME "
            f"(e.g. --train-split {likely}), or --train-split all if they are classes"
        )
    return None


def _split_like(data: str, kind: Kind) -> list[str]:
    match kind:
        case "folder":
            from . import folder

            return folder.split_like(_path(data))
        case "tar":
            from . import tar

            return tar.split_like(_path(data))
        case "parquet":
            from . import parquet

            return parquet.split_like(_path(data))
        case _:
            return []


@reads_data
def evaluation_splits(data: str) -> tuple[str, str]:
    """The splits to train and to test an evaluator on: train, and the first of test, val, validation, valid that has
    labels. Raises UserError where the names do not tell."""
    known = splits(data)
    found = [word for word in ("test", "val", "validation", "valid") if word in known]
    test = next(iter(found), None)
    if "train" in known and len(found) > 1:  # ImageNet's test images have no labels, its validation images do
        test = next((word for word in found if open_source(data, word).labels is not None), test)
    if "train" in known and test is not None:
        return "train", test
    if not known:
        raise UserError(
            f"{data} is not split into training and test images: sort them into folders train/ and val/ "
            f"(shards: 'train' and 'val' in their names), or point at data that is"
        )
    raise UserError(
        f"{data} has the split{'s' if len(known) > 1 else ''} {', '.join(known)}, which do not say what to train and "
        f"what to test on; name them with --train-split and --test-split"
    )


def _known_split(data: str, split: str, known: list[str]) -> str:
    from .names import canonical_split

    for name in (split.lower(), canonical_split(split)):
        if name in known:
            return name
    if not known:
        raise UserError(f"{data} has no split {split!r}: it is not split at all (looked for train, val, test in names)")
    raise UserError(f"{data} has no split {split!r}; it has {', '.join(known)}{nearest(split.lower(), known)}")


def _path(data: str) -> str:
    return os.path.abspath(os.path.expanduser(data))


def _plugin_kind(data: str) -> str | None:
    """The kind that another package adds, in front of the first colon; None for ours, which are looked at first."""
    kind, colon, _ = data.partition(":")
    return kind if colon and kind != "fractals" and kind in plugins.installed(GROUP) else None


def _kind(data: str) -> tuple[Kind, Walk | None]:
    """What the data is, found out by looking, and what was found on the way. A folder known from before is not walked
    again."""
    from . import folder, packed
    from .names import braces
    from .walk import walk

    if data.split(":", 1)[0] == "fractals":
        return "fractals", None
    if (nothing := missing(data)) is not None:
        raise UserError(nothing)
    path = _path(data)
    if pattern := braces(path):
        found = {_kind_of_file(name, name) for name in pattern}
        if len(found) > 1:
            raise UserError(f"{data} stands for tar and parquet files: give one kind")
        return found.pop(), None
    if os.path.isfile(path):
        return _kind_of_file(data, path), None
    if not os.path.isdir(path):
        raise UserError(f"{data} is neither a folder nor a file: give a folder of images, tar or parquet shards")
    if packed.is_packed(path):
        return "packed", None
    if folder.stored(path) is not None:
        return "folder", None
    walked = walk(path)
    return _kind_of_folder(data, path, walked), walked


def _download(scheme: str) -> str:
    tools = {"s3": "aws s3 sync", "gs": "gcloud storage rsync -r", "hf": "hf download --repo-type dataset"}
    return tools.get(scheme.lower(), "wget or curl")


def _kind_of_folder(data: str, path: str, walked: Walk) -> Kind:
    """What the data in a folder is, where there are shards and loose images: the images where they fill class folders or
    splits of their own (the shard is an archive of them, or a table beside them), else the shards (the images are
    pictures for people)."""
    shards = [name for name in walked.shards if name.lower().endswith((".tar", ".parquet", ".arrow"))]
    images = len(walked.found.lengths)
    if images and shards:
        from .parquet import holds_images

        tables = [name for name in shards if not name.lower().endswith(".tar")]
        if tables and not holds_images(os.path.join(path, tables[0])):
            shards = [name for name in shards if name.lower().endswith(".tar")]
    if not shards:
        if not images and walked.compressed:
            raise UserError(compressed(os.path.join(data, walked.compressed[0])))
        return "folder"
    if images and _loose_images_are_the_data(path, walked, shards):
        return "folder"
    tars = sum(name.lower().endswith(".tar") for name in shards)
    return "tar" if 2 * tars >= len(shards) else "parquet"


def _loose_images_are_the_data(path: str, walked: Walk, shards: list[str]) -> bool:
    found, images = walked.found, len(walked.found.lengths)
    of_shards = {os.path.dirname(name) for name in shards}
    apart = sum(os.fsdecode(folder) not in of_shards for folder in found.folders)
    if apart < 2 and images <= 10 * len(shards) and not (apart and images > 4 * len(shards)):
        return False
    # Pictures of a documentation are small beside the shards; an archive of the images is about as large as they are.
    sizes = [_size(os.path.join(path, found.path(row))) for row in range(0, images, max(1, images // 100))]
    of_images = images * sum(sizes) / len(sizes)
    return sum(_size(os.path.join(path, name)) for name in shards) <= 4 * of_images + (1 << 20)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _kind_of_file(data: str, path: str) -> Kind:
    from .names import COMPRESSED_TAR

    if path.lower().endswith(".tar"):
        return "tar"
    if path.lower().endswith((".parquet", ".arrow")):
        return "parquet"
    if path.lower().endswith(COMPRESSED_TAR):
        raise UserError(compressed(data))
    raise UserError(f"{data} is a file, and neither .tar nor .parquet: give a folder of images, tar or parquet shards")


def compressed(shard: str) -> str:
    """The message for a compressed archive."""
    return (
        f"{shard} is compressed, so no single image can be read from it: unpack it once to a plain .tar (gunzip, unxz)"
    )


def missing(data: str) -> str | None:
    """None where the data is there; else that it is not, and what has nearly its name, or what to do."""
    from .names import braces

    built_in, colon, options = data.partition(":")
    path = _path(data)
    if not data.strip():
        return "the data is an empty word: give a folder of images, tar or parquet shards (is a variable unset?)"
    if built_in == "fractals" or os.path.exists(path) or _plugin_kind(data) is not None:
        return None
    if scheme := re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*):/", data):
        return (
            f"{data} is not on this machine, and {scheme[1]}:// is not read: download it first "
            f"({_download(scheme[1])}), then give the local folder"
        )
    if pattern := braces(path):
        absent = [name for name in pattern if not os.path.isfile(name)]
        if absent:
            return f"{len(absent):,} of the {len(pattern):,} files of {data} are not there, the first: {absent[0]}"
        return None
    named = ["fractals", *(plugins.installed(GROUP) if colon else ())]  # kinds that are named, not found by looking
    if nearly := difflib.get_close_matches(built_in, named, 1, cutoff=0.8):
        return f"there is no {data}: did you mean {nearly[0]}{colon}{options}?"
    parent, name = os.path.split(path)
    below = ""  # what follows the first folder that is not there
    while not os.path.isdir(parent):
        below = os.path.join(name, below) if below else name
        parent, name = os.path.split(parent)
    try:
        close = difflib.get_close_matches(name, os.listdir(parent), n=1)
    except OSError:
        close = []
    if not close and colon and re.fullmatch(r"[\w.-]+", built_in):
        hint = nearest(built_in, named)
        return f"there is no {data}: it is no path, and no installed package adds the kind {built_in!r}{hint}"
    if not close:
        return f"there is no {data}: {parent} exists, and holds no {name}"
    other = os.path.join(parent, close[0])
    if below and os.path.exists(os.path.join(other, below)):
        other = os.path.join(other, below)
    return f"there is no {data}: did you mean {other}?"
