"""How a command that runs in this process alone ends: an exit code, and one line where something is wrong."""

import sys
from collections.abc import Callable, Sequence

from ssl_pretrain.errors import UserError


def run_command(prog: str, work: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """Give the words of the command to `work` and return its exit code; 2 and its message for a UserError, 1 for a file
    that cannot be read or written and for Ctrl-C."""
    try:
        return work(list(sys.argv[1:] if argv is None else argv))
    except UserError as mistake:
        print(f"{prog}: {str(mistake).removeprefix(f'{prog}: ')}", file=sys.stderr)
        return 2
    except OSError as problem:
        where = f"{problem.filename}: " if problem.filename else ""
        print(f"{prog}: {where}{problem.strerror or problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 1
