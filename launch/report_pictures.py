"""The pictures that a run logged to TensorBoard, of which `ssl-report` shows some: the last ones, and earlier ones."""

import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 8  # pictures of one kind that are shown: the first, the last, and some between
TAGS = 24  # kinds of pictures that are shown
PAGE_BYTES = 8_000_000  # of all pictures of a page
MOST_PIXELS = 50_000_000  # of a picture


@dataclass(frozen=True)
class Picture:
    """One picture at one step."""

    step: int
    png: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Series:
    """The pictures of one kind, in order of the steps."""

    tag: str  # what is on them, rows from top to bottom with " | " between
    shown: list[Picture]
    logged: int  # how many the run logged


def read(folder: Path, budget: int) -> tuple[list[Series], list[str]]:
    """Pictures of a run of at most `budget` bytes in all, and what was left out or went wrong, in words."""
    try:
        return _read(folder / "tensorboard", budget)
    except Exception as problem:  # a damaged file; what its reader raises is not documented
        return [], [f"{folder / 'tensorboard'}: pictures cannot be read ({type(problem).__name__})"]


def _read(folder: Path, budget: int) -> tuple[list[Series], list[str]]:
    if not folder.is_dir():
        return [], []
    sizes: dict[str, dict[int, int]] = {}  # bytes by tag and step
    for tag, step, png in _events(folder):
        if png is None:  # what an earlier start logged past this step was not trained on
            sizes = {each: {at: n for at, n in known.items() if at < step} for each, known in sizes.items()}
        else:
            sizes.setdefault(tag, {})[step] = len(png)
    sizes = {tag: known for tag, known in sizes.items() if known}
    chosen = _chosen(sizes, budget)
    wanted = {(tag, step) for tag, steps in chosen.items() for step in steps}
    found = {(tag, step): png for tag, step, png in _events(folder) if png is not None and (tag, step) in wanted}
    notes = [f"the pictures {tag!r} are left out: too many or too large" for tag in sizes if tag not in chosen]
    series = []
    for tag, steps in chosen.items():
        shown = [picture for step in steps if (picture := _opened(step, found[tag, step])) is not None]
        if len(shown) < len(steps):
            notes.append(f"{len(steps) - len(shown)} of the pictures {tag!r} cannot be decoded, or are too large")
        if shown:
            series.append(Series(tag, shown, len(sizes[tag])))
    return series, notes


def _events(folder: Path) -> Iterator[tuple[str, int, bytes | None]]:
    """All pictures that were logged (tag, step, PNG), and the step of each restart as ("", step, None)."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog

    for path in sorted(folder.iterdir()):
        if not path.is_file() or "tfevents" not in path.name:
            continue
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                yield "", event.step, None
            for value in event.summary.value if event.HasField("summary") else ():
                if value.HasField("image"):
                    yield value.tag, event.step, value.image.encoded_image_string


def _chosen(sizes: dict[str, dict[int, int]], budget: int) -> dict[str, list[int]]:
    """The steps of each kind that are shown: as many as fit, the last one first of all."""
    tags = list(sizes)[:TAGS]
    for count in range(STEPS, 0, -1):
        chosen = {tag: _spread(sorted(sizes[tag]), count) for tag in tags}
        if sum(sizes[tag][step] for tag, steps in chosen.items() for step in steps) <= budget:
            return chosen
    left, kept = budget, {}
    for tag in tags:
        last = max(sizes[tag])
        if sizes[tag][last] <= left:
            left -= sizes[tag][last]
            kept[tag] = [last]
    return kept


def _spread(steps: list[int], count: int) -> list[int]:
    """So many of the steps, evenly, with the last one, and with the first one if there are several."""
    if count == 1:
        return steps[-1:]
    count = min(count, len(steps))
    return sorted({steps[i * (len(steps) - 1) // max(count - 1, 1)] for i in range(count)} | {steps[-1]})


def _opened(step: int, png: bytes) -> Picture | None:
    """A picture with its size; None where it is no PNG, or far too large to show."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            size: Any = picture.size
            if size[0] * size[1] > MOST_PIXELS:
                return None
            picture.verify()
    except Exception:  # of bytes that may be anything
        return None
    return Picture(step, png, *size)
