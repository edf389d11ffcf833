"""The text that `--help` printed, kept: the flags of a method and an encoder are known only after torch is imported,
which takes seconds.

The text is printed again while the package's files, the installed plugins and the Python are the same. The help of a
command line that names a file, a folder or another library's model depends on them too, and is not kept.
"""

import hashlib
import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

from ssl_pretrain import __version__, plugins
from ssl_pretrain.files import cache_folder, write_text

from .console import OWN

HELP = {"-h", "--help"}
GROUPS = ("methods", "backbones", "eval", "sources", "loggers")
FOLDERS = (*OWN, Path(__file__).parents[1] / "recipes")


def wanted(words: list[str]) -> bool:
    """Whether this is a command line whose help can be kept."""
    if not HELP & set(words):
        return False
    values = {value for word in words for value in (word, word.partition("=")[2]) if value}
    return not values & _others() and not any(":" in each or os.sep in each or os.path.exists(each) for each in values)


def helped(prog: str, words: list[str], work: Callable[[list[str]], int]) -> int:
    """Print the help that `work` prints for these words, kept or new; returns the exit code. What `work` raises is passed
    on, and then nothing is kept."""
    kept, facts = _place(prog, words), _facts()
    with suppress(OSError, ValueError):
        was, _, text = kept.read_text(encoding="utf-8").partition("\n")
        if was == facts:
            sys.stdout.write(text)
            return 0
    printed, code = io.StringIO(), 0
    try:
        with redirect_stdout(printed):
            code = work(words)
    except SystemExit as end:  # argparse's way to end after the help
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.write(printed.getvalue())
    if code == 0:
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, f"{facts}\n{printed.getvalue()}")
    return code


def _place(prog: str, words: list[str]) -> Path:
    """The file of this command line, of this interpreter."""
    asked = "\0".join([prog, sys.executable, str(sys.stdout.isatty()), *words])
    return cache_folder() / "help" / f"{hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()}.txt"


def _facts() -> str:
    """What a help text depends on, as one word: the package's files with their times, and the installed plugins."""
    found = hashlib.blake2b(f"{__version__} {sys.version}".encode(), digest_size=16)
    for folder in FOLDERS:
        for at, inside, files in os.walk(folder):
            inside.sort()
            for name in sorted(files):
                if name.endswith((".py", ".yaml")):
                    facts = os.stat(os.path.join(at, name))
                    found.update(f"{name} {facts.st_mtime_ns} {facts.st_size}\n".encode())
    found.update(" ".join(sorted(_others())).encode())
    return found.hexdigest()


@cache
def _others() -> set[str]:
    """The names of the plugins of other packages, whose files are not looked at."""
    return {name for group in GROUPS for name in plugins.installed(f"ssl_pretrain.{group}")}
