"""The command `ssl-data`: checks images, measures their channels and the speed of the loader, packs pixels, and stores the
outputs of frozen networks.

Shapes: H x W pixels, C channels.
"""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ssl_pretrain import flags
from ssl_pretrain.errors import UserError, nearest, of_the_machine, system_error

from .run_command import run_command

PROG = "ssl-data"
VERBS = {
    "check": "read every image; list unreadable images, duplicates and image sizes",
    "stats": "mean and standard deviation of the channels, for --mean and --std; number of images of each class",
    "bench": "images/s on one core for each step of the loader, and the slowest step",
    "pack": "decode all images once into one file of raw pixels, which --data reads without decoding",
    "tokenize": "store a tokenizer's ids of every image, as a token data set",
    "cache-teacher": "store the outputs of a run's frozen network once; takes the flags of the run (docs/targets.md)",
}
EPILOG = "Exit codes: 0 done (check: no fault found), 1 check found a fault, or any other error, 2 wrong flags or data."
SHOWN = 10  # bad or doubled images that are printed
CLASSES_SHOWN = 20  # classes whose counts are printed


@dataclass(frozen=True, kw_only=True)
class Common:
    """The data."""

    split: str | None = None
    """Use only this split (default: all images; pack writes each split separately)."""
    channels: int = 3
    """Number of channels of the decoded images."""
    max_pixels: int | None = None
    """Most pixels of an image; a larger one is taken for a decompression bomb (default: 178,956,970)."""
    images: int | None = None
    """Use this number of images, drawn at random by the seed (default: all; stats 2000, bench 512)."""
    workers: int = 0
    """Number of additional processes that read images (bench: always 0)."""
    seed: int = 0
    """Seed of the random choice of images."""
    out: Path | None = None
    """check, stats: also write the results to this JSON file; pack, tokenize: the folder to create."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The benchmark."""

    method: str = "mae"
    """Method whose views are made."""
    image_size: tuple[int, ...] = (224,)
    """Size of the views, one side or height and width."""
    aug: Literal["exact", "fast"] = "exact"
    """How views are made, as in ssl-pretrain."""
    seconds: float = 10.0
    """Seconds to measure."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens."""

    tokenizer: str
    """Run of a tokenizer (vqtok), or the tokenizer/ in one."""
    crops: int = 1
    """Number of crops of each image: the one that evaluators see, then random resized crops, drawn by the seed."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image that a random crop covers."""

    def __post_init__(self) -> None:
        flags.within(self, flags.AT_LEAST_1, "crops")
        flags.within(self, flags.ABOVE_0_TO_1, "crop_scale", ascending=True)


@dataclass(frozen=True, kw_only=True)
class Pack:
    """The packing."""

    side: int | None = None
    """Shrink images whose shorter side is longer to this many pixels (default: keep every image's size)."""


KINDS: dict[str, type] = {"bench": Bench, "tokenize": Tokens, "pack": Pack}  # flags beside Common's


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and print its messages; returns its exit code."""
    return run_command(PROG, _main, argv)


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"usage: {PROG} VERB DATA [flags]", "", *(f"  {verb:<14}{what}" for verb, what in VERBS.items())]
        print("\n".join([*lines, "", f"{PROG} VERB --help shows all flags. {EPILOG}"]),
              file=sys.stdout if argv else sys.stderr)  # fmt: skip
        return 0 if argv else 2
    verb = argv[0]
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}{nearest(verb, VERBS)}")
    words = argv[1:]
    if verb == "cache-teacher":
        from .teacher_cache import cache_teacher

        return cache_teacher(words)
    if (not words or words[0].startswith("-")) and not {"-h", "--help"} & set(words):
        raise UserError(f"the data comes behind the verb: {PROG} {verb} photos/")
    data = "" if words[0].startswith("-") else words.pop(0)
    kinds: list[type] = [Common, *[kind for name, kind in KINDS.items() if name == verb]]
    options = flags.parse(kinds, words, {}, prog=f"{PROG} {verb}", description=VERBS[verb], epilog=EPILOG)
    common: Common = options[0]
    if (common.images is not None and common.images < 1) or common.workers < 0 or common.channels < 1:
        raise UserError("--images and --channels must be at least 1, --workers at least 0")
    if common.max_pixels is not None and common.max_pixels < 1:
        raise UserError(f"--max-pixels is {common.max_pixels}; it must be at least 1")
    from ssl_pretrain.data.decode import allow_pixels

    allow_pixels(common.max_pixels)
    match verb:
        case "check":
            return _check(data, common)
        case "stats":
            return _stats(data, common)
        case "bench":
            return _bench(data, common, options[1])
        case "tokenize":
            return _tokenize(data, common, options[1])
        case _:
            return _pack(data, common, options[1])


# ---- Reading.


def _source(data: str, common: Common, most: int | None) -> Any:
    """The images to look at, and their numbers among all."""
    import numpy as np

    from ssl_pretrain.data.source import open_source
    from ssl_pretrain.data.subset import Subset
    from ssl_pretrain.randomness import numpy_generator

    source = open_source(data, common.split)
    print(source.description, flush=True)
    if source.left_out:
        print(source.left_out.sentence(), flush=True)
    most = common.images or most
    if most is None or most >= len(source):
        return source
    print(f"using {most:,} of them, drawn at random by the seed", flush=True)
    chosen = np.sort(numpy_generator(common.seed, "ssl-data").permutation(len(source))[:most])
    return Subset(source, chosen)


def _read(source: Any, common: Common) -> Iterator[tuple[int, Any, Any, int]]:
    """For each image: its number, its pixels (H, W, C) uint8 or the reason why it cannot be read (a string), a hash of its
    bytes, and the number of bits of its stored values."""
    from torch.utils.data import DataLoader

    workers: dict[str, Any] = {"multiprocessing_context": "fork"} if common.workers else {}
    reader: Any = _Reader(source, common.channels)
    for row in DataLoader(reader, batch_size=None, num_workers=common.workers, collate_fn=_as_is, **workers):
        if row[0] == _MACHINE:
            raise UserError(row[1])
        yield row


def _as_is(item: Any) -> Any:
    return item


_MACHINE = -1  # instead of an image's number: an error of the machine, not of an image


class _Reader:
    """A data set of `_read`'s rows."""

    def __init__(self, source: Any, channels: int) -> None:
        self.source, self.channels = source, channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Any, bytes, int]:
        import hashlib

        from ssl_pretrain.data.decode import BadImage, decode, stored_bits

        print_of = b""
        try:
            item = self.source[index]
            print_of = hashlib.blake2b(item if isinstance(item, bytes) else item.tobytes(), digest_size=16).digest()
            return index, decode(item, self.channels), print_of, stored_bits(item)
        except (BadImage, OSError, ValueError) as problem:
            if (fault := of_the_machine(problem)) is not None:
                return _MACHINE, fault, b"", 0
            said = system_error(problem) if isinstance(problem, OSError) else str(problem)
            return index, said or type(problem).__name__, print_of, 0


class _Depth:
    """Whether images of 16 bits use the whole range of values."""

    def __init__(self) -> None:
        self.images, self.largest = 0, 0

    def add(self, pixels: Any, bits: int) -> None:
        """pixels: uint8, the upper 8 of 16 bits."""
        if bits == 16:
            self.images += 1
            self.largest = max(self.largest, int(pixels.max()))

    def tell(self) -> None:
        """Print a warning if they do not."""
        if self.images and self.largest < 64:
            print(
                f"{self.images:,} images of 16 bits use at most {8 + self.largest.bit_length()}, so they are nearly black: "
                f"scale their values to 0..65535 (12 bits: times 16)"
            )


def _watch(rows: Iterator[Any], total: int) -> Iterator[Any]:
    """The same rows, with a progress bar if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield from rows
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(rows, total=total, console=Console(stderr=True), transient=True, description="images")


def _write(common: Common, found: dict[str, Any]) -> None:
    if common.out is not None:
        from ssl_pretrain.files import write_text

        write_text(common.out, json.dumps(found, indent=1) + "\n")
        print(f"written: {common.out}")


# ---- The verbs.


def _check(data: str, common: Common) -> int:
    import numpy as np

    source = _source(data, common, None)
    bad: list[dict[str, str]] = []
    sizes: list[tuple[int, int]] = []
    first: dict[bytes, int] = {}
    double: list[tuple[str, str]] = []
    depth = _Depth()
    for index, pixels, print_of, bits in _watch(_read(source, common), len(source)):
        if isinstance(pixels, str):
            bad.append({"name": source.name(index), "reason": pixels})
            continue
        sizes.append(pixels.shape[:2])
        depth.add(pixels, bits)
        if print_of in first:
            double.append((source.name(first[print_of]), source.name(index)))
        first.setdefault(print_of, index)
    print(f"{len(sizes):,} images can be read, {len(bad):,} cannot")
    for one in bad[:SHOWN]:
        print(f"  {one['name']}: {one['reason']}")
    depth.tell()
    contents = _contents(data, common.split, source)
    print(f"{len(double):,} are the same, byte for byte, as another one")
    for a, b in double[:SHOWN]:
        print(f"  {b} is {a}")
    found: dict[str, Any] = {"readable": len(sizes), "bad": bad, "double": double, **contents}
    if sizes:
        sides = np.array(sizes)
        for name, values in (("height", sides[:, 0]), ("width", sides[:, 1]), ("shorter side", sides.min(1))):
            low, middle, high = (int(v) for v in np.quantile(values, [0, 0.5, 1], method="nearest"))
            found[name] = {"min": low, "median": middle, "max": high}
            print(f"{name}: {low} to {high} pixels, median {middle}")
    _write(common, found)
    return 1 if bad else 0


def _contents(data: str, split: str | None, source: Any) -> dict[str, Any]:
    """Print what is left out by name, the splits, and the classes with their counts; the same as plain data."""
    from ssl_pretrain.data.source import open_source, splits

    for line in source.left_out.lines():
        print(f"  {line}")
    known = splits(data) if split is None else []
    sizes = {name: len(open_source(data, name)) for name in known}
    if split is None:
        print("splits: " + (", ".join(f"{name} {count:,}" for name, count in sizes.items()) or "none"))
    found = {"left_out": source.left_out.as_json(), "splits": sizes, "classes": {}, "labels_from": source.labels_from}
    if source.labels is None:
        print(f"classes: {_without_labels(data, split, source)}")
        return found
    tally = Counter(source.labels.tolist())
    named = source.classes or ()
    by_name = {
        named[n] if 0 <= n < len(named) else "without a label" if n < 0 else str(n): tally[n] for n in sorted(tally)
    }
    found["classes"] = by_name
    classes = [name for name in by_name if name != "without a label"]
    listed = ", ".join(f"{name} {by_name[name]:,}" for name in classes[:CLASSES_SHOWN])
    rest = f", ... ({len(classes) - CLASSES_SHOWN:,} more)" if len(classes) > CLASSES_SHOWN else ""
    print(
        f"classes: {len(named) or len(classes):,}, from {source.labels_from or 'the data'}: {_printable(listed)}{rest}"
    )
    if tally[-1]:
        print(f"without a label: {tally[-1]:,}")
    return found


def _without_labels(data: str, split: str | None, source: Any) -> str:
    """What to say of images without labels: one folder of them is one class, which is nothing to tell apart."""
    from ssl_pretrain.data.names import one_folder

    only = one_folder((source.name(i) for i in range(len(source))), data, split)
    return "none (no labels)" if only is None else f"one class only, from the names of the folders: {only}"


def _printable(text: str) -> str:
    """Text that any console takes, on one line."""
    return text if text.isprintable() else text.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def _stats(data: str, common: Common) -> int:
    import numpy as np

    source = _source(data, common, 2000)
    total, squares, count = np.zeros(common.channels), np.zeros(common.channels), 0
    depth = _Depth()
    for _, pixels, _, bits in _watch(_read(source, common), len(source)):
        if not isinstance(pixels, str):
            depth.add(pixels, bits)
            # each image has the same weight, whatever its size, because a method sees all images at one size
            flat = pixels.reshape(-1, common.channels) / 255
            total, squares, count = total + flat.mean(0), squares + (flat**2).mean(0), count + 1
    if not count:
        raise UserError(f"none of the images of {data} can be read: {PROG} check {data} says why")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    depth.tell()
    print(f"of {count:,} images, each counting alike:")
    words = [" ".join(f"{value:.4f}" for value in values) for values in (mean, std)]
    print(f"--mean {words[0]} --std {words[1]}")
    found: dict[str, Any] = {"images": count, "mean": mean.tolist(), "std": std.tolist()}
    if source.labels is not None:
        tally = Counter(int(label) for label in source.labels)
        bare = tally.pop(-1, 0)
        names = {label: source.classes[label] if source.classes else str(label) for label in tally}
        found["classes"] = {names[label]: n for label, n in sorted(tally.items())}
        fewest, most = min(tally.values(), default=0), max(tally.values(), default=0)
        rest = f", {bare:,} without a label" if bare else ""
        print(f"{len(tally)} classes of {fewest:,} to {most:,} images{rest}")
    else:
        print(_without_labels(data, common.split, source))
    _write(common, found)
    return 0


def _bench(data: str, common: Common, bench: Bench) -> int:
    import torch

    from ssl_pretrain import pretext
    from ssl_pretrain.data.decode import BadImage, decode
    from ssl_pretrain.data.loader import Share, batches, to_batch

    torch.set_num_threads(1)
    source = _source(data, common, 512)
    kind = pretext.load(bench.method)
    size = bench.image_size[0], bench.image_size[-1]
    specs = [replace(spec, fast=bench.aug == "fast") for spec in kind.views(kind.Config(), size)]
    batch = min(32, len(source))
    grey = (0.5,) * common.channels

    def read(number: int) -> None:
        for i in range(batch):
            source[(number * batch + i) % len(source)]

    def decoded(number: int) -> None:
        for i in range(batch):
            try:
                decode(source[(number * batch + i) % len(source)], common.channels)
            except (BadImage, OSError, ValueError):
                continue

    def views(number: int, finish: bool = False) -> None:
        for raw in batches(
            source, specs, Share(batch),
            seed=0, channels=common.channels, start_step=number, stop_step=number + 1, workers=0, policy="replace",
        ):  # fmt: skip
            if finish:
                to_batch(raw, specs, grey, grey, torch.device("cpu"))

    def finished(number: int) -> None:
        views(number, finish=True)

    stages = {
        "read": read,
        "read and decoded": decoded,
        "views cut (uint8)": views,
        "views finished (float32)": finished,
    }
    taken = dict.fromkeys(stages, 0.0)
    rounds, began = 0, time.perf_counter()
    while rounds < 2 or time.perf_counter() - began < bench.seconds:
        for name, stage in stages.items():
            start = time.perf_counter()
            stage(rounds)
            taken[name] += time.perf_counter() - start if rounds else 0.0  # the first round opens files
        rounds += 1
    print(
        f"views of {bench.method} at {size[0]} x {size[1]}, --aug {bench.aug}; one core, {rounds - 1} rounds of {batch}"
    )
    before, costs = 0.0, {}
    for name, seconds in taken.items():
        each = seconds / (rounds - 1) / batch
        costs[name] = max(0.0, each - before)
        print(f"{name:<26}{1 / each:>10,.0f} images/s{1e3 * costs[name]:>10.2f} ms more an image")
        before = each
    worst = max(costs, key=lambda name: costs[name])
    advice = {
        "read": "a faster disk, or shards instead of loose files",
        "read and decoded": "simplejpeg (pip install '.[fast]'), --aug fast, or ssl-data pack --side",
        "views cut (uint8)": "fewer or smaller views; crops are read at the images' full size: ssl-data pack --side",
        "views finished (float32)": "a GPU does this for next to nothing; on a CPU --aug fast",
    }
    print(f"most of the time: {worst}. What helps: {advice[worst]}")
    return 0


def _pack(data: str, common: Common, pack: Pack) -> int:
    import hashlib

    from ssl_pretrain.data import packed
    from ssl_pretrain.data.left_out import LeftOut
    from ssl_pretrain.data.source import open_source, splits
    from ssl_pretrain.data.views import resize_and_crop

    if common.out is None:
        raise UserError("--out is needed: the folder to make")
    if common.images is not None:
        raise UserError("--images is not for pack: it packs all")
    if pack.side is not None and pack.side < 1:
        raise UserError(f"--side is {pack.side}; it must be at least 1")
    names: list[str | None] = [common.split] if common.split else [*splits(data)] or [None]
    sources = {name or packed.WHOLE: open_source(data, name) for name in names}
    some = next(iter(sources.values()))
    classes = {source.classes for source in sources.values()} - {None}  # a split without labels has none
    if len(classes) > 1:
        raise UserError(f"the splits of {data} have different classes: pack them one by one (--split)")
    bad: list[dict[str, str]] = []
    written = 0

    def images(split: str, source: Any) -> Iterator[tuple[Any, str, int | None]]:
        nonlocal written
        for index, pixels, _, _ in _watch(_read(source, common), len(source)):
            if isinstance(pixels, str):
                bad.append({"name": source.name(index), "reason": pixels})
                continue
            height, width = pixels.shape[:2]
            if pack.side is not None and min(height, width) > pack.side:
                short = min(height, width)
                whole = pack.side * height // short, pack.side * width // short
                pixels = resize_and_crop(pixels, pack.side, whole)
            written += pixels.size
            label = None if source.labels is None else int(source.labels[index])
            yield pixels, source.name(index), label

    report = LeftOut()
    report.merge(some.left_out)
    with packed.Writer(common.out, common.channels) as writer:
        for split, source in sources.items():
            print(source.description, flush=True)
            if source.left_out:
                print(source.left_out.sentence(), flush=True)
            _room(common, pack, source)
            writer.split(split, images(split, source))
        if bad:
            report.add("image that cannot be read", bad[0]["name"], len(bad))
        identity = json.dumps([[source.fingerprint for source in sources.values()], pack.side, common.channels])
        fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        writer.finish(classes=next(iter(classes), None), fingerprint=fingerprint, source=data, left_out=report)
    print(f"packed {sum(writer.counts.values()):,} images, {written / 2**20:,.0f} MiB; {len(bad):,} could not be read")
    for one in bad[:SHOWN]:
        print(f"  {one['name']}: {one['reason']}")
    print(f"written: {common.out}; now --data {common.out}")
    return 0


def _tokenize(data: str, common: Common, tokens: Tokens) -> int:
    import numpy as np
    import torch

    from ssl_pretrain import tokenizer
    from ssl_pretrain.data.source import open_source
    from ssl_pretrain.data.subset import Subset
    from ssl_pretrain.tokenizer import token_data

    if common.out is None:
        raise UserError("--out is needed: the folder to make")
    if common.images is not None:
        raise UserError("--images is not for tokenize: it takes all")
    source = open_source(data, common.split)
    print(source.description, flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = tokenizer.load(tokens.tokenizer, device)
    out, common = common.out, replace(common, channels=opened.preprocessing.channels)

    def read(numbers: range) -> Iterator[tuple[int, Any]]:
        for index, pixels, _, _ in _read(Subset(source, np.arange(numbers.start, numbers.stop)), common):
            yield numbers.start + index, pixels

    made = token_data.write(
        out, opened, source, read, crops=tokens.crops, scale=tokens.crop_scale, seed=common.seed, device=device,
        say=lambda text: print(text, flush=True), progress=_watch,
    )  # fmt: skip
    if len(made) < len(source):
        print(f"{len(source) - len(made):,} images could not be read: {PROG} check {data} lists them")
    used = made.ids(range(min(len(made), 1000))).flatten().bincount(minlength=len(made.codes))
    share = used / used.sum().clamp_min(1)
    perplexity = float(torch.special.entr(share).sum().exp())
    print(
        f"codes used in {int(used.sum()):,} tokens: {int((used > 0).sum()):,} of {len(used):,}, perplexity {perplexity:.1f}"
    )
    print(f"written: {out}")
    return 0


def _room(common: Common, pack: Pack, source: Any) -> None:
    """Raise UserError where the disk has less room than the split is likely to need."""
    from ssl_pretrain.data.decode import BadImage, Picture

    assert common.out is not None
    parent = next(p for p in common.out.absolute().parents if p.exists())
    sizes = []
    for index in range(0, len(source), max(1, len(source) // 32)):
        try:
            picture = Picture(source[index], common.channels)
        except (BadImage, OSError, ValueError):
            continue
        short = min(picture.height, picture.width)
        scale = min(1.0, (pack.side or short) / short)
        sizes.append(picture.height * picture.width * scale**2 * common.channels)
    need = len(source) * sum(sizes) / max(len(sizes), 1)
    free = shutil.disk_usage(parent).free
    if need > 0.95 * free:
        raise UserError(
            f"about {need / 2**30:,.1f} GiB are needed and {parent} has {free / 2**30:,.1f} GiB free: shrink the images "
            f"(--side 256), or choose another folder with --out"
        )


if __name__ == "__main__":
    sys.exit(main())
