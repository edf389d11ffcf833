"""Entry point of each task of a Slurm job: runs a command with its arguments, or the run of a grid with the task's
number.

python -m ssl_pretrain.launch.job pretrain|evaluate ARGUMENTS
python -m ssl_pretrain.launch.job grid pretrain|evaluate FOLDER FLAG=VALUE,VALUE ... -- ARGUMENTS
"""

import importlib
import os
import sys
from pathlib import Path

from ssl_pretrain.distributed import environment

from . import grid

PROGRAMS = {"pretrain": "ssl-pretrain", "evaluate": "ssl-eval"}


def main(argv: list[str]) -> int:
    """Run it; returns its exit code."""
    name, words = argv[0], argv[1:]
    points = None
    if name == "grid":
        name, out, *words = words
        end = words.index("--")
        points = grid.expand(tuple(words[:end]), words[end + 1 :], Path(out))
        words = points[int(os.environ["SLURM_ARRAY_TASK_ID"])].argv
    sys.argv = [PROGRAMS[name], *words]  # the manifest records this as the command
    code = importlib.import_module(f"ssl_pretrain.launch.{name}").main(words, placed=True)
    if points is not None and environment.find().rank == 0:
        grid.summarize(points)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
