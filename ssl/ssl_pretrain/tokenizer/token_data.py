"""Token data sets: a tokenizer's ids of fixed crops of each image, in place of the pixels (SeiT; Park et al., ICCV 2023).

`ssl-data tokenize` writes one and `open_tokens` reads it. It is a folder of rows (`data.rows`), one for each image: ids of
`crops` crops on an (h, w) grid, two bytes each. Crop 0 is what evaluators see of the image. The others are random resized
crops, flipped or not, which are functions of (seed, crop, image): ids cannot be cropped as pixels can, so several crops are
stored. Beside them are the codebook, the labels, and the tokenizer's fingerprint: ids have a meaning under that alone.

Shapes: N images, K codes of d channels.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..data import rows
from ..data.rows import Kind, Layout, Rows
from ..data.source import Source
from ..data.views import ViewSpec, cut, resize_and_crop
from ..errors import UserError
from ..randomness import numpy_generator
from . import Tokenizer

KIND = "token data set"
FORMAT = 1
BATCH = 64  # images that the tokenizer sees at a time
PATIENCE = 5.0  # seconds to wait for another writer
MOST_BAD = 10_000
REMEDY = "write the token data set again with ssl-data tokenize"
CODES, LABELS, BAD = "codes", "labels", "bad"  # subfolders with one record each
# For each image its number, and its pixels (H, W, C) uint8 or why it cannot be read
Images = Iterable[tuple[int, np.ndarray | str]]


@final
class TokenData:
    """The ids of a data set. Picklable, and safe to fork.

    Attributes: `crops` of each image; `grid` (h, w) of a crop; `codes` (K, d) float32, the codebook; `labels` (N,) int64
    (-1 where unknown) or None; `classes` by label, or None; `numbers` (N,) int64, of the images in the data they come from;
    `tokenizer`, the fingerprint of the tokenizer; `fingerprint` of the data set; `description`, a line for people.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises UserError where the folder holds no whole token data set."""
        self.folder = Path(folder)
        layout, facts = rows.read_head(self.folder, KIND)
        if facts.get("whole") is not True or rows.missing(self.folder, layout):
            raise UserError(f"{folder} is not whole: the same ssl-data tokenize continues it")
        try:
            (name, _, shape), *more = layout.fields
            self.crops, self.grid = shape[0], (shape[1], shape[2])
            size, width, bad = (int(facts[word]) for word in ("size", "width", "bad"))
            rows.bounded((size, width), (layout.count,))
            if name != "ids" or more or len(shape) != 3 or not 0 <= bad <= MOST_BAD or facts["format"] > FORMAT:
                raise ValueError("it has other fields")
            self.classes = None if facts["classes"] is None else tuple(map(str, facts["classes"]))
            self.tokenizer, self.fingerprint = str(facts["tokenizer"]), str(facts["fingerprint"])
            labelled, self.description = bool(facts["labelled"]), str(facts["description"])
        except (KeyError, TypeError, ValueError, IndexError) as problem:
            raise UserError(f"{self.folder / rows.HEAD} is damaged ({problem!r}): {REMEDY}") from None
        self._rows = Rows(self.folder, layout, REMEDY)
        self.codes = rows.read_array(self.folder / CODES, "float32", (size, width), REMEDY)
        self.numbers = np.arange(layout.count)
        if bad:
            self.numbers = np.delete(self.numbers, rows.read_array(self.folder / BAD, "int32", (bad,), REMEDY).numpy())
        self.labels = None
        if labelled:
            known = rows.read_array(self.folder / LABELS, "int32", (layout.count,), REMEDY)
            self.labels = known.numpy().astype(np.int64)[self.numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Tensor:
        """The ids (crops, h, w) int64 of an image. Raises IndexError outside 0..N-1."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = self.numbers[index : index + 1]
        return self._checked(self._rows.read(0, int(number[0]), number))[0]

    def ids(self, index: Iterable[int], crop: int = 0) -> Tensor:
        """The ids (n, h, w) int64 of a crop of several images."""
        return torch.stack([self[int(i)][crop] for i in index])

    def _checked(self, ids: Tensor) -> Tensor:
        found = ids.long()
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < len(self.codes):
            raise UserError(f"{self.folder} has ids beyond its {len(self.codes):,} codes: it is damaged; {REMEDY}")
        return found

    def lookup(self, ids: Tensor) -> Tensor:
        """The codes (..., d) of ids (...)."""
        return self.codes[ids]

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise UserError where the ids are not those of this tokenizer."""
        if tokenizer.fingerprint != self.tokenizer:
            raise UserError(
                f"the ids in {self.folder} are of a tokenizer with the fingerprint {self.tokenizer[:8]}, and this one has "
                f"{tokenizer.fingerprint[:8]}: ids of two tokenizers have nothing in common"
            )


def open_tokens(folder: str | Path) -> TokenData:
    """The token data set in a folder. Raises UserError where there is none, or it is not whole."""
    return TokenData(folder)


def write(
    folder: Path,
    tokenizer: Tokenizer,
    source: Source,
    read: Callable[[range], Images],
    *,
    crops: int,
    scale: tuple[float, float],
    seed: int,
    device: torch.device,
    say: Callable[[str], None],
    progress: Callable[[Iterator[int], int], Iterator[int]],
) -> TokenData:
    """Write the ids of all images of a source, or what of them is missing.

    read: gives images of a range of numbers, in order. crops: of each image; scale: smallest and largest share of the image
    that a random crop covers. Raises UserError for a folder that holds something else, or other ids, OSError where the disk
    has no room.
    """
    if tokenizer.scales:
        raise UserError(
            f"the tokenizer has the scales {' '.join(map(str, tokenizer.scales))}, and token data have one id for each "
            f"patch: use a tokenizer of one scale"
        )
    how = tokenizer.preprocessing
    spec = ViewSpec(name="crop", size=how.crop, scale=scale, interpolation=how.interpolation)
    kind: Kind = "uint16" if tokenizer.codes <= 1 << 16 else "int32"
    fields = (("ids", kind, (crops, *tokenizer.grid(how.crop))),)
    part = max(1, rows.PART_BYTES // Layout(fields, 1, 1).record.itemsize // BATCH) * BATCH
    layout = Layout(fields, len(source), part)
    depends = {
        "images": source.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "crops": crops,
        "crop scale": list(scale) if crops > 1 else None,
        "seed": seed if crops > 1 else None,
    }
    facts: dict[str, Any] = {
        "kind": KIND,
        "format": FORMAT,
        "depends": depends,
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": hashlib.blake2b(json.dumps(depends).encode(), digest_size=16).hexdigest(),
        "description": f"ids of {source.description}",
        "size": tokenizer.codes,
        "width": tokenizer.quantizer.width,
        "classes": source.classes,
        "labelled": source.labels is not None,
        "bad": 0,
        "whole": False,
    }
    files.make_folder(folder)
    try:
        with files.lock_folder(folder, PATIENCE):
            _check_folder(folder, layout, depends)
            rows.clear(folder)
            need = rows.check_room(folder, layout, "choose another disk, or fewer --crops")
            say(
                f"{folder}: {layout.count:,} images x {crops} crops of {' x '.join(map(str, fields[0][2][1:]))} ids = "
                f"{rows.in_units(layout.total)}; {rows.in_units(need)} to write"
            )
            rows.write_head(folder, layout, facts)
            absent = rows.missing(folder, layout)
            for number in progress(iter(absent), len(absent)):
                made = _records(layout, layout.rows(number), read, tokenizer, spec, seed, device)
                rows.write_part(folder, layout, number, made)
            found = Rows(folder, layout, REMEDY).index()
            bad = np.flatnonzero(found < 0)
            if len(bad) > MOST_BAD:
                raise UserError(f"{len(bad):,} images cannot be read: clean the data first (ssl-data check lists them)")
            rows.write_array(folder / CODES, tokenizer.quantizer.vectors().detach().float().cpu().numpy())
            if source.labels is not None:
                rows.write_array(folder / LABELS, np.asarray(source.labels, np.int32))
            if len(bad):
                rows.write_array(folder / BAD, bad.astype(np.int32))
            rows.write_head(folder, layout, {**facts, "bad": len(bad), "whole": True})
    except BlockingIOError:
        raise UserError(f"another process writes to {folder} at this moment: wait for its end") from None
    return TokenData(folder)


def _check_folder(folder: Path, layout: Layout, depends: dict[str, Any]) -> None:
    """Raise UserError where the folder holds anything but these ids, whole or in part."""
    if not (folder / rows.HEAD).exists():
        if any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{folder} holds something else than a {KIND}: choose an empty or a new folder")
        return
    known, facts = rows.read_head(folder, KIND)
    before = facts.get("depends")
    before = before if isinstance(before, dict) else {}
    unlike = [
        f"{name}: {before.get(name)}, now {depends[name]}" for name in depends if before.get(name) != depends[name]
    ]
    if unlike or known != layout:
        raise UserError(f"{folder} holds other ids ({'; '.join(unlike) or 'another layout'}): choose another --out")


def _records(
    layout: Layout,
    numbers: range,
    read: Callable[[range], Images],
    tokenizer: Tokenizer,
    spec: ViewSpec,
    seed: int,
    device: torch.device,
) -> Iterator[np.ndarray]:
    """The records of the images of these numbers, in batches; an image that cannot be read has the index -1."""
    waiting: list[tuple[int, np.ndarray | None]] = []
    for number, image in read(numbers):
        seen = None if isinstance(image, str) else _crops(image, layout.fields[0][2][0], tokenizer, spec, seed, number)
        waiting.append((number, seen))
        if len(waiting) == BATCH:
            yield _tokenized(layout, waiting, tokenizer, device)
            waiting = []
    if waiting:
        yield _tokenized(layout, waiting, tokenizer, device)


def _crops(image: np.ndarray, count: int, tokenizer: Tokenizer, spec: ViewSpec, seed: int, number: int) -> np.ndarray:
    """The crops (count, H, W, C) uint8 of an image."""
    how = tokenizer.preprocessing
    found = [resize_and_crop(image, how.resize, how.crop, how.interpolation)]
    found += [cut(image, spec, numpy_generator(seed, "tokenize", crop, number)).image for crop in range(1, count)]
    return np.stack(found)


def _tokenized(
    layout: Layout, waiting: list[tuple[int, np.ndarray | None]], tokenizer: Tokenizer, device: torch.device
) -> np.ndarray:
    records = np.zeros(len(waiting), layout.record)
    records["index"] = [number if crops is not None else -1 for number, crops in waiting]
    seen = [crops for _, crops in waiting if crops is not None]
    if seen:
        how = tokenizer.preprocessing
        mean, std = (torch.tensor(each, device=device)[:, None, None] for each in (how.mean, how.std))
        pixels = torch.from_numpy(np.concatenate(seen)).to(device).permute(0, 3, 1, 2).float() / 255
        ids = tokenizer.ids(((pixels - mean) / std).contiguous())
        stored = rows.as_array(ids, layout.fields[0][1])
        records["f0"][records["index"] >= 0] = stored.reshape(len(seen), *layout.fields[0][2])
    return records
