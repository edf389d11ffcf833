"""Files that are written atomically, and files that grow line by line."""

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError, nearest


def sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """Where indexes, features and help texts are kept: $SSL_PRETRAIN_CACHE, else ssl-pretrain in $XDG_CACHE_HOME or
    ~/.cache."""
    if own := os.environ.get("SSL_PRETRAIN_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "ssl-pretrain"


def make_folder(path: Path, flag: str = "--out") -> None:
    """Make a folder and those above it, where they are not there. Raises UserError that names `flag` and what is in the
    way: a file, a symbolic link to nothing, missing rights."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        why = in_the_way(path) or problem.strerror
        raise UserError(f"{flag} {path} cannot be made: {why}; choose another folder with {flag}") from None


def in_the_way(path: Path) -> str | None:
    """What of `path` or above it keeps it from being a folder, in words: a link to nothing or a file; else None."""
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            return f"{each} is a symbolic link to {os.readlink(each)}, which is not there"
        if each.exists():
            return None if each.is_dir() else f"{each} is a file"
    return None


def export_folder(path: Path, kind: str = "encoder") -> Path:
    """The folder of the export at `path`, which is a run folder or the export. kind: name of the export's folder in a run,
    "encoder" or "tokenizer". Raises UserError if there is none."""
    if not path.exists():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = nearest(path.name, beside)
        hint = hint if hint.startswith("; did") else ""
        raise UserError(f"{path} does not exist{hint}: give a run folder, or the {kind}/ in one")
    for folder in (path, path / kind):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"{path} has no {kind} (neither config.json nor {kind}/config.json): give a run folder that has saved a "
        f"checkpoint, or the {kind}/ in one"
    )


def write_text(path: Path, text: str) -> None:
    """Write a small file, UTF-8, whole or not at all: aside, synced, renamed. Bytes that are not UTF-8 (of a file's name)
    are written as they are escaped in Python, \\udcff."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def lock_folder(folder: Path, patience: float) -> Iterator[None]:
    """Lock a folder: other processes that lock it wait until this context, or the process, ends.

    Raises BlockingIOError if another process still holds the lock after `patience` seconds. Some network file systems
    have no such locks; there every process gets it.
    """
    descriptor, until = os.open(folder, os.O_RDONLY), time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)


def overwrite_text(path: Path, text: str) -> None:
    """Write a small file over itself, where the disk has no room for a second one (`write_text`)."""
    with open(path, "r+", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def utf8(text: str) -> str:
    """The text with what UTF-8 cannot hold, bytes of a file's name, escaped: \\udcff."""
    return text.encode("utf-8", "backslashreplace").decode()


def json_line(values: Mapping[str, Any]) -> str:
    """A line of a .jsonl file, with its end. JSON has no NaN and no infinity: null stands for them."""
    return json.dumps(finite(values), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Plain data with None in the place of numbers that are not finite, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def read_lines(path: Path, left_out: list[str] | None = None) -> list[dict[str, Any]]:
    """The objects in the lines of a .jsonl file, none where it is not there. A line that is none (damaged, foreign) is left
    out, and said in `left_out` in words; a last one that is half there (a process was killed, or is writing) only left out.
    """
    return list(each_line(path, left_out))


def each_line(path: Path, left_out: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """`read_lines` one by one, for a file that is long."""
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        return
    with file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                why = "" if isinstance(line, dict) else "no JSON object"
            except (ValueError, RecursionError):
                why = "not JSON"
            if not why:
                yield line
            elif left_out is not None and text.endswith(b"\n"):
                left_out.append(f"{path.name}, line {number}: {why}; left out")
