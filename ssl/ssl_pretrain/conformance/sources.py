"""What every source of images keeps to (`data.source.Source`). Ours are checked on a few small pictures that are written
as files of that kind, another package's on what its `PluginSource.example` makes.

Shapes: N samples, H x W pixels, C channels.
"""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import packed, source
from ..data.decode import BadImage, decode
from ..data.loader import Share, batches
from ..data.source import PluginSource, Source, open_source
from ..data.views import ViewSpec
from ..errors import UserError
from . import Fault
from ._common import contents, expect, item_bytes, own_folder, picture, with_cache

TRAIN, TEST = 6, 3  # pictures of each of three classes
THREADS = 4
PATIENCE = 60  # seconds that a forked process is waited for
OWN = ("fractals", "folder", "tar", "parquet", "packed")
# What a new process says of a source: its fingerprint, and a hash of its names, labels and items.
REOPEN = """
import json, sys
from ssl_pretrain.conformance._common import contents
from ssl_pretrain.data.source import open_source
data, split = json.loads(sys.argv[1])
opened = open_source(data, split)
print(json.dumps([opened.fingerprint, contents(opened)]))
"""


def names() -> list[str]:
    """The kinds of data: ours and those of other packages."""
    return source.kinds()


def checks(name: str) -> list[Callable[[], None]]:
    """The checks of the kind of data `name`."""
    one = _Checks(name)
    every = [
        one.class_is_final,
        one.example_can_be_opened,
        one.splits_are_parts_of_the_whole,
        one.unknown_split_is_refused,
        one.names_are_unique,
        one.items_are_images,
        one.labels_are_classes,
        one.labels_belong_to_their_images,
        one.index_outside_is_refused,
        one.items_do_not_depend_on_the_order,
        one.pickled_copy_is_the_same,
        one.fingerprint_is_stable,
        one.threads_read_the_same,
        one.forked_processes_read_the_same,
        one.loader_workers_give_the_same,
    ]
    return with_cache(lambda: one.folder, every)


class _Checks:
    """The checks, and what several of them need."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    # ---- What is checked.

    @cached_property
    def folder(self) -> Path:
        """A place for the example; gone with the checks."""
        return own_folder(self)

    @cached_property
    def data(self) -> str:
        """The `--data` of the example."""
        if self.kind in OWN:
            return _example(self.kind, self.folder)
        (self.folder / "example").mkdir()
        try:
            rest = source.plugin(self.kind).example(self.folder / "example")
        except NotImplementedError:
            raise Fault(
                f"{source.plugin(self.kind).__name__} has no example(folder): without a small data set there is nothing to "
                f"check"
            ) from None
        expect(isinstance(rest, str), f"example(folder) gives {rest!r}, not the text behind {self.kind}:")
        return f"{self.kind}:{rest}"

    @cached_property
    def splits(self) -> list[str]:
        """The splits of the example."""
        return source.splits(self.data)

    @cached_property
    def whole(self) -> Source:
        """All of the example."""
        return open_source(self.data, None)

    @cached_property
    def part(self) -> Source:
        """A split of the example, or all where it is not split."""
        return open_source(self.data, self.splits[0]) if self.splits else self.whole

    # ---- The checks.

    def class_is_final(self) -> None:
        """One final subclass; another package's derives from PluginSource."""
        kind = type(self.whole) if self.kind in OWN else source.plugin(self.kind)
        expect(getattr(kind, "__final__", False), f"{kind.__name__} must be @final")
        base = Source if self.kind in OWN else PluginSource
        expect(kind.__mro__[1] is base, f"{kind.__name__} must derive from {base.__name__} and nothing else")

    def example_can_be_opened(self) -> None:
        """It opens, and says what it is in one line."""
        opened = self.whole
        expect(isinstance(opened, Source), f"opening gives {type(opened).__name__}, which is no Source")
        for part in ("labels", "classes", "fingerprint", "description"):
            expect(hasattr(opened, part), f"a source must have {part}")
        expect(len(opened) > 3, f"the example has {len(opened)} samples; at least 4 are needed to check anything")
        text = opened.description
        expect(
            isinstance(text, str) and text.strip() != "" and "\n" not in text, f"description is {text!r}, not one line"
        )

    def splits_are_parts_of_the_whole(self) -> None:
        """Splits are words in lower case; what is in one is in the whole, with the same bytes and labels."""
        splits = self.splits
        expect(
            isinstance(splits, list)
            and all(isinstance(word, str) and word and word == word.lower() for word in splits),
            f"splits are {splits!r}; they must be a list of words in lower case",
        )
        expect(len(set(splits)) == len(splits), f"splits are {splits!r}: one is there twice")
        where = {self.whole.name(i): i for i in range(len(self.whole))}
        total = 0
        for word in splits:
            opened = open_source(self.data, word)
            total += len(opened)
            for i in range(len(opened)):
                name = opened.name(i)
                expect(name in where, f"{name} is in split {word}, and not in the whole (split None)")
                j = where[name]
                same = item_bytes(opened[i]) == item_bytes(self.whole[j])
                expect(
                    same,
                    f"{name} has other bytes in split {word} than in the whole: items and names do not belong together",
                )
                if opened.labels is not None and self.whole.labels is not None:
                    same = int(opened.labels[i]) == int(self.whole.labels[j])
                    expect(same, f"{name} has another label in split {word} than in the whole")
        expect(total <= len(self.whole), f"the splits have {total} samples together, the whole {len(self.whole)}")

    def unknown_split_is_refused(self) -> None:
        """A split that there is not gets an answer in words."""
        try:
            open_source(self.data, "no-such-split")
        except UserError:
            return
        raise Fault("a split that there is not is opened")

    def names_are_unique(self) -> None:
        """Each sample has a name of its own, of one line."""
        found: dict[str, int] = {}
        for i in range(len(self.whole)):
            name = self.whole.name(i)
            expect(isinstance(name, str) and name != "" and name.isprintable(), f"name({i}) is {name!r}, not one line")
            expect(name not in found, f"samples {found.get(name)} and {i} have the same name, {name!r}")
            found[name] = i

    def items_are_images(self) -> None:
        """Bytes of an image file, or arrays (H, W, C) uint8; and they can be decoded."""
        for i in range(len(self.whole)):
            item = self.whole[i]
            if isinstance(item, np.ndarray):
                expect(
                    item.dtype == np.uint8 and item.ndim == 3,
                    f"item {i} is {item.dtype} {item.shape}, not uint8 (H, W, C)",
                )
            else:
                expect(isinstance(item, bytes), f"item {i} is {type(item).__name__}, neither bytes nor an array")
            channels = item.shape[2] if isinstance(item, np.ndarray) else 3
            try:
                pixels = decode(item, channels)
            except BadImage as problem:
                raise Fault(f"item {i} of the example, {self.whole.name(i)}, is no image: {problem}") from None
            expect(pixels.size > 0, f"item {i} has no pixels")

    def labels_are_classes(self) -> None:
        """(N,) int64, -1 or a class; class names go with labels."""
        for opened in (self.whole, self.part):
            labels, classes = opened.labels, opened.classes
            if labels is None:
                expect(classes is None, "there are classes, and no labels")
                continue
            expect(
                isinstance(labels, np.ndarray) and labels.dtype == np.int64 and labels.shape == (len(opened),),
                f"labels are {getattr(labels, 'dtype', type(labels).__name__)} {getattr(labels, 'shape', '')}, not int64 "
                f"({len(opened)},)",
            )
            expect(
                int(labels.min()) >= -1, f"a label is {int(labels.min())}; -1 stands for unknown, classes count from 0"
            )
            if classes is not None:
                expect(
                    isinstance(classes, tuple) and all(isinstance(name, str) for name in classes),
                    f"classes are {classes!r}, not a tuple of names",
                )
                expect(len(set(classes)) == len(classes), "two classes have the same name")
                most = int(labels.max())
                expect(most < len(classes), f"a label is {most}, and there are {len(classes)} class names")
        expect(self.part.classes == self.whole.classes, "a split has other classes than the whole")

    def labels_belong_to_their_images(self) -> None:
        """Seen where this made the pictures: the strongest channel is the class."""
        if self.kind not in OWN or self.kind == "fractals":
            return
        for opened in (self.whole, self.part):
            assert opened.labels is not None
            for i in range(len(opened)):
                strongest = int(decode(opened[i], 3).reshape(-1, 3).mean(0).argmax())
                expect(strongest == int(opened.labels[i]), f"the label of {opened.name(i)} is that of another image")

    def index_outside_is_refused(self) -> None:
        """IndexError outside 0..N-1, so that iterating ends and a wrong number does not give another image."""
        for index in (len(self.part), len(self.part) + 7, -1, -len(self.part) - 1):
            what = f"sample {index} of {len(self.part)}"
            try:
                self.part[index]
            except IndexError:
                continue
            except Exception as problem:
                raise Fault(f"{what} raises {type(problem).__name__}, not IndexError") from problem
            raise Fault(f"{what} is given, where an IndexError belongs")

    def items_do_not_depend_on_the_order(self) -> None:
        """Any order, and again, gives the same items; what is done to one does not change it."""
        first = self._items(self.part)
        for i in reversed(range(len(self.part))):
            expect(
                item_bytes(self.part[i]) == first[i], f"item {i} is another one when it is read again, in another order"
            )
        item = self.part[0]
        if isinstance(item, np.ndarray) and item.flags.writeable:
            item[:] = 255 - item
            expect(item_bytes(self.part[0]) == first[0], "changing an item's array changes the sample: give a copy")

    def pickled_copy_is_the_same(self) -> None:
        """It goes to other processes, also after it was read."""
        first = self._items(self.part)
        try:
            copied = pickle.loads(pickle.dumps(self.part))
        except Exception as problem:
            raise Fault(f"it cannot be pickled: {type(problem).__name__}: {problem}") from problem
        expect(len(copied) == len(self.part), f"a pickled copy has {len(copied)} samples, not {len(self.part)}")
        expect(copied.fingerprint == self.part.fingerprint, "a pickled copy has another fingerprint")
        for i, item in enumerate(first):
            expect(item_bytes(copied[i]) == item, f"item {i} of a pickled copy is another one")
            expect(copied.name(i) == self.part.name(i), f"name({i}) of a pickled copy is another one")

    def fingerprint_is_stable(self) -> None:
        """The same in another process, where Python's hashes are others; different splits have different ones."""
        own = self.part.fingerprint
        expect(bool(re.fullmatch("[0-9a-f]+", str(own))), f"fingerprint is {own!r}, not hexadecimal digits")
        split = self.splits[0] if self.splits else None
        argv = [sys.executable, "-c", REOPEN, json.dumps([self.data, split])]
        environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
        expect(done.returncode == 0, f"in a new process it cannot be opened: {done.stderr.strip()}")
        fingerprint, its_contents = json.loads(done.stdout)
        expect(fingerprint == own, "in another process the same data has another fingerprint")
        expect(its_contents == contents(self.part), "in another process the same data has other names, labels or items")
        prints = [open_source(self.data, word).fingerprint for word in self.splits]
        expect(len(set(prints)) == len(prints), "two splits have the same fingerprint")

    def threads_read_the_same(self) -> None:
        """Files are read by position: several readers at once do not disturb each other."""
        first, count = self._items(self.part), len(self.part)
        with ThreadPoolExecutor(THREADS) as pool:
            orders = [np.random.default_rng(i).integers(0, count, 200).tolist() for i in range(THREADS)]
            read = list(pool.map(lambda order: [(i, item_bytes(self.part[i])) for i in order], orders))
        wrong = sum(item != first[i] for items in read for i, item in items)
        expect(wrong == 0, f"with {THREADS} threads reading at once {wrong} of {THREADS * 200} items are wrong")

    def forked_processes_read_the_same(self) -> None:
        """A forked process shares open files with its parent: both read at once."""
        first = self._items(self.part)
        expected = hashlib.blake2b(b"".join(first)).hexdigest()
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        children = [context.Process(target=_read_often, args=(self.part, results)) for _ in range(2)]
        with warnings.catch_warnings():  # newer Pythons warn of a fork beside threads, which wait here
            warnings.simplefilter("ignore", DeprecationWarning)
            for child in children:
                child.start()
        own = _hash_or_problem(self.part)
        for child in children:
            child.join(PATIENCE)
        codes = [child.exitcode for child in children]
        expect(codes == [0, 0], f"forked processes that read it end with {codes} (None: not within {PATIENCE} s)")
        expect(own == expected, f"while forked processes read, the parent reads other bytes, or fails: {own}")
        found = [results.get() for _ in children]
        expect(found == [expected] * 2, f"a forked process reads other bytes, or fails: {found}")

    def loader_workers_give_the_same(self) -> None:
        """Batches by two workers are those of none."""
        item = self.part[0]
        channels = item.shape[2] if isinstance(item, np.ndarray) else 3
        found: list[list[Any]] = []
        for workers in (0, 2):
            made = batches(
                self.part, [ViewSpec(name="view", size=(16, 16))], Share(4),
                seed=0, channels=channels, start_step=0, stop_step=3, workers=workers, policy="fail",
            )  # fmt: skip
            found.append(list(made))
        for one, other in zip(*found, strict=True):
            same = torch.equal(one.views["view"], other.views["view"]) and np.array_equal(one.index, other.index)
            expect(same, "loader workers make other batches than this process")

    @staticmethod
    def _items(opened: Source) -> list[bytes]:
        return [item_bytes(opened[i]) for i in range(len(opened))]


def _hash_of_all(opened: Source) -> str:
    """Of all items, after reading them several times."""
    for _ in range(5):
        digest = hashlib.blake2b(b"".join(item_bytes(opened[i]) for i in range(len(opened)))).hexdigest()
    return digest


def _hash_or_problem(opened: Source) -> str:
    try:
        return _hash_of_all(opened)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"


def _read_often(opened: Source, results: Any) -> None:
    results.put(_hash_or_problem(opened))


def _example(kind: str, folder: Path) -> str:
    """Pictures of three classes as data of one of our kinds, split into train and val (fractals: train and test)."""
    if kind == "fractals":
        return "fractals:classes=3,images=12,size=16"
    path = folder / kind
    splits = {
        split: [(label, i, _png(label, i + 100 * (split == "val"))) for label in range(3) for i in range(count)]
        for split, count in (("train", TRAIN), ("val", TEST))
    }
    if kind == "packed":
        with packed.Writer(path, 3) as writer:
            for split, images in splits.items():
                rows = [(decode(image, 3), f"{split}/class{label}/{i}.png", label) for label, i, image in images]
                writer.split(split, rows)
            writer.finish(classes=("class0", "class1", "class2"), fingerprint="c0", source="pictures")
        return str(path)
    path.mkdir()
    for split, images in splits.items():
        if kind == "folder":
            for label, i, image in images:
                (path / split / f"class{label}").mkdir(parents=True, exist_ok=True)
                (path / split / f"class{label}" / f"{i}.png").write_bytes(image)
        elif kind == "tar":
            with tarfile.open(path / f"{split}-000.tar", "w") as shard:
                for label, i, image in images:
                    member = tarfile.TarInfo(f"class{label}/{i}.png")
                    member.size = len(image)
                    shard.addfile(member, io.BytesIO(image))
        else:
            _write_parquet(path / f"{split}-00000-of-00001.parquet", images)
    return str(path)


def _write_parquet(path: Path, images: list[tuple[int, int, bytes]]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise Fault("pyarrow is not installed: parquet cannot be checked without it") from None
    table = {"image": [{"bytes": image} for _, _, image in images], "label": [label for label, _, _ in images]}
    pq.write_table(pa.table(table), path)


def _png(label: int, number: int) -> bytes:
    file = io.BytesIO()
    picture(label, number).save(file, "PNG")
    return file.getvalue()
