"""How a command ends: an exit code, and one line where something is wrong. The same fault has the same line and the same
code in every command."""

import importlib.metadata
import platform
import sys
from collections.abc import Callable, Sequence

from ssl_pretrain import __version__
from ssl_pretrain.errors import NO_ROOM, UserError, system_error

from . import grid, help_cache
from .console import lasting_console


def run_command(prog: str, work: Callable[[list[str]], int], argv: Sequence[str] | None, *, nothing: str = "") -> int:
    """Give the words of the command to `work` and return its exit code, of a command that runs in this process alone: 2 for
    a UserError, else as `told` says, and 1 for Ctrl-C.

    nothing: what to say of the result where it was interrupted.
    """
    with lasting_console(prog):
        try:
            words = list(sys.argv[1:] if argv is None else argv)
            if "--version" in words:
                print(f"{prog} {__version__} (torch {_torch()}, Python {platform.python_version()})")
                return 0
            if argv is None and help_cache.wanted(words):  # a command, and no call from Python
                return help_cache.helped(prog, words, work)
            return work(words)
        except UserError as mistake:
            if not mistake.reported_elsewhere:
                text = str(mistake)  # of `ssl-eval knn`, say
                print(text if text.startswith(prog) else f"{prog}: {text}", file=sys.stderr)
                grid.note_mistake(str(mistake))
            return 2
        except OSError as problem:
            print(f"{prog}: {system_error(problem)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"{prog}: interrupted{nothing}", file=sys.stderr)
            return 1


def _torch() -> str:
    """The version of torch, which takes too long to import for this."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cannot_write(problem: OSError) -> tuple[str, int]:
    """What a run says where the system refused something while it trained, and its exit code: 75 where a disk has no room,
    which passes; else 1, so that no cluster starts it again and again."""
    if problem.errno in NO_ROOM:
        return (
            f"cannot write the run: {system_error(problem)}; what was written before is whole. Then the same command "
            f"continues from the last checkpoint"
        ), 75
    return (f"the system refused: {system_error(problem)}. The same command then continues from the last checkpoint"), 1
