"""The command `ssl-report`: writes a self-contained page of curves, scores and pictures of one or several runs."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssl_pretrain import flags
from ssl_pretrain.errors import UserError
from ssl_pretrain.files import write_text

from .run_command import run_command
from .run_folder import read

PROG = "ssl-report"
USAGE = f"""usage: {PROG} RUN [RUN ...] [flags]

Write a page to send to a colleague: one HTML file that opens offline. Of one run, or of several over one another:
scores of evaluators, pictures, curves of all numbers of metrics.jsonl, the settings in which runs differ, the command,
data and hardware, warnings. RUN is the --out folder of ssl-pretrain. The page of a run that has not finished shows its
current state.

{PROG} --help shows all flags. Exit codes: 0 done, 2 wrong flags, 1 any other error."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The page."""

    out: Path | None = None
    """File to write (default: report.html in the first run's folder)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; it prints all messages and returns its exit code."""
    return run_command(PROG, _main, argv)


def _main(argv: list[str]) -> int:
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    folders, words = argv[:count], argv[count:]
    if not folders and not {"-h", "--help"} & set(words):
        print(USAGE, file=sys.stderr)
        return 2
    (options,) = flags.parse([Options], words, {}, prog=f"{PROG} RUN [RUN ...]", description=USAGE.split("\n\n")[1])
    from .report_page import page  # it reads pictures, styles and scripts: not for --help

    runs = [read(Path(folder), name, PROG) for folder, name in zip(folders, _names(folders), strict=True)]
    out: Path = options.out or runs[0].folder / "report.html"
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    content, notes = page(runs)
    for note in notes:
        print(f"{PROG}: {note}", file=sys.stderr)
    write_text(out, content)
    print(f"written: {out}")
    return 0


def _names(folders: Sequence[str]) -> list[str]:
    """Names of runs: their folders' names if these are unique, else their paths below the common folder."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("the same run is given twice")
    if len({path.name for path in paths}) == len(paths):
        return [path.name for path in paths]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


if __name__ == "__main__":
    sys.exit(main())
