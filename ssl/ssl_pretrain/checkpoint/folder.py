"""The folder of a run's checkpoints: lists them, finds the newest complete one, prunes old ones."""

import json
import os
import re
import shutil
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PATTERN = re.compile(r"step-(\d{8,})")
CHECKSUM = "checksum"  # of checkpoint.json: CRC-32 of the JSON of all other entries
WITHOUT_CHECKSUM = {"step", "skipped", "files"}  # what one of an earlier version holds, exactly


def steps(folder: Path) -> list[int]:
    """The steps of the existing checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for path in folder.iterdir() if (m := PATTERN.fullmatch(path.name)))


def clear(folder: Path) -> None:
    """Remove incomplete checkpoints of a killed run, with a warning. For the process that will write to the folder."""
    for begun in sorted(folder.glob(".writing-*")):
        shutil.rmtree(begun, ignore_errors=True)
        step = int(begun.name.rsplit("-", 1)[1])
        print(f"warning: the checkpoint of step {step} is incomplete; it is removed", flush=True)


def newest(folder: Path) -> int | None:
    """The step of the newest complete checkpoint, None if there is none. For one process of the run.

    A damaged one is renamed to .damaged-..., with a warning line, and the previous one is tried.
    """
    for step in reversed(steps(folder)):
        path = folder / f"step-{step:08d}"
        problem = damage(path)
        if problem is None:
            return step
        aside = folder / f".damaged-{step:08d}"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        before = [s for s in steps(folder) if s < step]
        then = f"trying step {before[-1]}" if before else "there is no older one, starting from the beginning"
        print(f"warning: checkpoint {path} is damaged ({problem}); moved to {aside.name}; {then}", flush=True)
    return None


def described(facts: dict[str, Any]) -> str:
    """The text of a checkpoint.json: the facts, with a checksum of them."""
    text = json.dumps(facts)
    return json.dumps({**json.loads(text), CHECKSUM: zlib.crc32(text.encode())})


def description(path: Path) -> dict[str, Any]:
    """The facts in a checkpoint's checkpoint.json. Raises OSError, and ValueError where it is not what was written."""
    facts = json.loads((path / "checkpoint.json").read_bytes())
    if not isinstance(facts, dict):
        raise ValueError("it is no object")
    written = facts.pop(CHECKSUM, None)
    if written is None and facts.keys() != WITHOUT_CHECKSUM:
        raise ValueError("it has no checksum")
    if written is not None and written != zlib.crc32(json.dumps(facts).encode()):
        raise ValueError("it does not match its checksum")
    if missing := {"step", "files"} - facts.keys():
        raise ValueError(f"it lacks {' and '.join(sorted(missing))}")
    if path.name != f"step-{facts['step']:08d}" and PATTERN.fullmatch(path.name):
        raise ValueError(f"it is of step {facts['step']}")
    return facts


def damage(path: Path) -> str | None:
    """A description of what is wrong with a checkpoint; None if it is complete and undamaged."""
    try:
        recorded = description(path)["files"]
        for name, (size, _) in recorded.items():
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes, {size} were written"
        with ThreadPoolExecutor(8) as pool:  # zlib releases the interpreter lock
            for name, (_, crc) in zip(
                recorded, pool.map(_size_and_sum, [path / name for name in recorded]), strict=True
            ):
                if crc != recorded[name][1]:
                    return f"{name} does not match its checksum"
        return None if recorded else "it lists no files"
    except FileNotFoundError as problem:
        return f"{Path(problem.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        return f"checkpoint.json cannot be read: {problem}"


def _size_and_sum(file: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(1 << 24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def prune(folder: Path, *, keep_last: int, keep_every: int | None, keep: Collection[int] = ()) -> None:
    """Remove all checkpoints except the newest `keep_last`, those at multiples of `keep_every` steps, and those of the
    steps `keep`."""
    there = steps(folder)
    for step in there[:-keep_last]:
        if step not in keep and not (keep_every and step % keep_every == 0):
            shutil.rmtree(folder / f"step-{step:08d}", ignore_errors=True)
    for stale in folder.glob(".writing-*"):
        shutil.rmtree(stale, ignore_errors=True)
