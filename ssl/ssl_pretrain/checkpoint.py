"""Checkpoints of a run: whole or absent, newest readable one first.

`checkpoints/step-00001000/` holds `state.pt` (tensors and plain data, read with weights_only) and `checkpoint.json` (the
step, and size and CRC-32 of the state). It is written under another name, synced and then renamed, so that a killed
process or a full disk leaves the ones before it as they were.
"""

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

PATTERN = re.compile(r"step-(\d{8,})")


class _Summed:
    """A file that keeps the CRC-32 and length of all that was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.crc, self.size = file, 0, 0

    def write(self, data: bytes) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write the state after `step` steps as a checkpoint of `folder`; it is there whole when this returns.

    Raises OSError (a full disk, no permission), having removed what it had begun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, aside = folder / f"step-{step:08d}", folder / f".writing-{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        with open(aside / "state.pt", "wb") as file:
            summed = _Summed(file)
            try:
                torch.save(state, cast(BinaryIO, summed))
            except RuntimeError as problem:  # torch's zip writer hides the OSError that stopped it
                cause = problem.__context__ or problem.__cause__
                raise (cause if isinstance(cause, OSError) else OSError(str(problem))) from None
            file.flush()
            os.fsync(file.fileno())
        with open(aside / "checkpoint.json", "w") as file_:
            json.dump({"step": step, "bytes": summed.size, "crc32": summed.crc}, file_)
            file_.flush()
            os.fsync(file_.fileno())
        sync(aside)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
        os.rename(aside, final)
        sync(folder)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints there are, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for path in folder.iterdir() if (m := PATTERN.fullmatch(path.name)))


def newest(folder: Path) -> int | None:
    """The step of the newest whole checkpoint, None without any. For one process of the run.

    A damaged one is set aside (renamed to .damaged-...), named in a warning line, and the one before it is taken.
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
        then = f"trying step {before[-1]}" if before else "no older one is left, starting from the beginning"
        print(f"warning: checkpoint {path} is damaged ({problem}); moved to {aside.name}; {then}", flush=True)
    return None


def load(folder: Path, step: int) -> dict[str, Any]:
    """The state of a checkpoint, tensors on the CPU and memory-mapped (the optimiser is not held twice)."""
    return torch.load(folder / f"step-{step:08d}" / "state.pt", map_location="cpu", weights_only=True, mmap=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is whole."""
    try:
        said = json.loads((path / "checkpoint.json").read_text())
        size = (path / "state.pt").stat().st_size
        if size != said["bytes"]:
            return f"state.pt has {size} bytes, {said['bytes']} were written"
        crc = 0
        with open(path / "state.pt", "rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        return None if crc == said["crc32"] else "state.pt does not match its checksum"
    except FileNotFoundError as problem:
        return f"{Path(problem.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return f"checkpoint.json cannot be read: {problem}"


def prune(folder: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints and those at multiples of `keep_every` steps."""
    there = steps(folder)
    for step in there[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            shutil.rmtree(folder / f"step-{step:08d}", ignore_errors=True)
    for stale in folder.glob(".writing-*"):
        shutil.rmtree(stale, ignore_errors=True)


def sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all: aside, synced, renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
