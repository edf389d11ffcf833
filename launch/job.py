"""Entry point of each task of a Slurm job: runs a command with its arguments, or the run of a grid with the task's
number.

python -m ssl_pretrain.launch.job --from FOLDER pretrain|evaluate ARGUMENTS
python -m ssl_pretrain.launch.job --from FOLDER grid pretrain|evaluate OUT FLAG=VALUE,VALUE ... -- ARGUMENTS

FOLDER is where the job was submitted. A task that has not started there ends with exit code 2.
"""

import contextlib
import importlib
import os
import sys
from pathlib import Path

from ssl_pretrain.distributed import environment
from ssl_pretrain.errors import UserError

from . import grid, paths

PROGRAMS = {"pretrain": "ssl-pretrain", "evaluate": "ssl-eval"}


def main(argv: list[str]) -> int:
    """Run it; returns its exit code."""
    if argv[0] == "--from":
        try:
            paths.check_started_in(argv[1])
        except UserError as mistake:
            print(f"ssl-pretrain: {mistake}", file=sys.stderr)
            return 2
        argv = argv[2:]
    name, words = argv[0], argv[1:]
    points = None
    if name == "grid":
        name, out, *words = words
        end = words.index("--")
        points = grid.expand(tuple(words[:end]), words[end + 1 :], Path(out))
        point = points[int(os.environ["SLURM_ARRAY_TASK_ID"])]
        words = point.argv
    sys.argv = [PROGRAMS[name], *words]  # the manifest records this as the command
    if points is None:
        return int(importlib.import_module(f"ssl_pretrain.launch.{name}").main(words, placed=True))
    first = environment.find().rank == 0
    code = 1
    with grid.member(point) if first else contextlib.nullcontext():
        code = int(importlib.import_module(f"ssl_pretrain.launch.{name}").main(words, placed=True))
    if first:
        grid.ended(point, code)
        grid.summarize(points)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
