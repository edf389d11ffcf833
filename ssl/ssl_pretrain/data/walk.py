"""One walk through a folder: its images, its shards, and what else there is."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from dataclasses import dataclass, field

from ..errors import UserError
from . import left_out, names
from .left_out import LeftOut

_SUFFIXES = frozenset(b"." + case for word in names.IMAGE_EXTENSIONS for case in (word, word.upper()))  # the usual ones


# Of a folder within the data: no rights, gone since, a link to itself. Any other error is the machine's.
LEFT_OUT = frozenset((errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP))


@dataclass
class Walk:
    """What lies in a folder, at any depth."""

    built_ns: int  # when the walk began
    found: names.Found = field(default_factory=names.Found)  # the images
    folders: list[bytes] = field(default_factory=list)  # those walked, within the top
    changed: list[int] = field(default_factory=list)  # when each changed last (ns); -1: it may not be read
    shards: list[str] = field(default_factory=list)  # paths of .tar, .parquet and .arrow files within the top
    compressed: list[str] = field(default_factory=list)  # paths of compressed archives
    others: Counter[str] = field(default_factory=Counter)  # other files by extension
    report: LeftOut = field(default_factory=LeftOut)  # what is left out, but for the shards


SHARD_EXTENSIONS = frozenset((b"tar", b"parquet", b"arrow"))
_COMPRESSED = tuple(ending.encode() for ending in names.COMPRESSED_TAR)


def walk(path: str) -> Walk:
    """Gather what lies below `path`, without a stat of any image that is not a symlink.

    Links are followed, except to a folder that the path already passes through. Hidden files and folders are left out.
    Raises UserError where the folder itself cannot be read, OSError where the system fails within it.
    """
    top = os.fsencode(path)
    walked = Walk(time.time_ns())
    found, report = walked.found, walked.report
    examples: dict[bytes, list[bytes]] = {}
    counts: Counter[bytes] = Counter()  # other files by extension, b"" without one
    pending: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset())]
    while pending:
        folder, passed = pending.pop()
        where = os.path.join(top, folder)
        inside = folder + b"/" if folder else b""
        images: list[bytes] = []
        inner: list[bytes] = []
        try:
            status = os.stat(where)
            if (status.st_dev, status.st_ino) in passed:
                report.add("link back to a folder that it lies in", names.printable(folder))
                continue
            walked.folders.append(folder)
            walked.changed.append(status.st_mtime_ns)
            with os.scandir(where) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith(b"."):
                        report.add(left_out.HIDDEN, names.printable(inside + name))
                        continue
                    try:
                        is_folder = entry.is_dir()
                    except OSError:  # a link to itself
                        report.add(left_out.BROKEN_LINK, names.printable(inside + name))
                        continue
                    if is_folder:
                        inner.append(name)
                        continue
                    ext = name[name.rfind(b".") :]
                    if ext in _SUFFIXES or names.is_image(name):
                        if entry.is_file() or entry.is_symlink():  # a dangling link is a bad image, a pipe is none
                            images.append(name)
                        else:
                            report.add(left_out.NO_FILE, names.printable(inside + name))
                        continue
                    if entry.is_symlink() and not os.path.exists(os.path.join(where, name)):
                        report.add(left_out.BROKEN_LINK, names.printable(inside + name))
                        continue
                    ext = names.extension(name) if b"." in name else b""
                    if ext in SHARD_EXTENSIONS and entry.is_file():
                        walked.shards.append(os.fsdecode(inside + name))
                    elif name.lower().endswith(_COMPRESSED):
                        walked.compressed.append(os.fsdecode(inside + name))
                        report.add(left_out.COMPRESSED, names.printable(inside + name))
                    else:
                        counts[ext] += 1
                        if counts[ext] <= left_out.EXAMPLES:
                            examples.setdefault(ext, []).append(inside + name)
        except OSError as error:
            if not folder:
                raise UserError(f"{path} cannot be read: {error.strerror}") from None
            if error.errno not in LEFT_OUT:
                raise  # a disk that fails is no property of the data: fewer images would be taken without need
            # never current: permissions change without a trace in the folder's time
            walked.folders.append(folder)
            walked.changed.append(-1)
            report.add(f"folder {left_out.UNREADABLE} ({error.strerror})", names.printable(folder))
        if images:
            found.folders.append(folder)
            found.add(len(found.folders) - 1, images)
        if inner:
            ancestors = passed | {(status.st_dev, status.st_ino)}
            pending += [(inside + name, ancestors) for name in sorted(inner, reverse=True)]
    for ext, count in counts.items():
        shown = names.printable(ext) if ext else "no extension"
        walked.others[shown] = count
        reason = names.why_not(ext) if ext else "without an extension"
        report.out[reason] = (count, [names.printable(name) for name in examples[ext]])
    return walked


def list_shards(path: str, ending: str) -> list[tuple[int, str]]:
    """The shards at `path` (one file, a directory with them at any depth, or a pattern like {000..003}.tar), as
    (split id, path within the data; "" for one file), sorted by path."""
    if os.path.isfile(path):
        return [(names.split_of_token(os.path.basename(path)), "")]
    if pattern := names.braces(path):
        return names.with_splits(pattern)
    return names.with_splits(name for name in walk(path).shards if name.lower().endswith(ending))
