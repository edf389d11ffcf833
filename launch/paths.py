"""The paths in the command of a Slurm job: they are made absolute when it is submitted and checked when it starts."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from ssl_pretrain.errors import UserError
from ssl_pretrain.foreign.specs import KINDS

from . import recipe_files

PATHS = ("--out", "--init-from", "--init-state", "--logs", "--list")  # flags whose values are paths
PERHAPS = ("--data", "--encoder", "--like")  # flags whose values may be


def working_folder() -> Path:
    """The working folder under the name that the shell uses, because other machines may have it under this name too."""
    named = os.environ.get("PWD", "")
    if os.path.isabs(named) and os.path.isdir(named) and os.path.samefile(named, "."):
        return Path(named)
    return Path.cwd()


def absolute(path: Path) -> Path:
    """The path as an absolute one, from `working_folder`, without dots."""
    return Path(os.path.normpath(working_folder() / path))


def absolute_words(argv: list[str], encoder_is_a_path: bool) -> list[str]:
    """The words of a command with the values of its flags of paths made absolute. A value of --data, --like and (where it
    may be a path) --encoder is taken for a path if there is such a file or folder."""
    words = list(argv)
    for at, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag not in (*PATHS, *PERHAPS, "--config") or (flag == "--encoder" and not encoder_is_a_path):
            continue
        if not equals and at + 1 == len(words):
            continue
        value = value if equals else words[at + 1]
        names_a_library = flag == "--init-from" and value.partition(":")[0] in KINDS  # and is read in the same folder
        names_a_recipe = flag == "--config" and value in recipe_files.names()
        path = flag in (*PATHS, "--config") and not names_a_library and not names_a_recipe
        if path or Path(value).exists():
            value = str(absolute(Path(value)))
        if equals:
            words[at] = f"{flag}={value}"
        else:
            words[at + 1] = value
    return words


def check_started_in(folder: str) -> None:
    """Raise UserError where a job's task has not started in the folder that the job was submitted from: Slurm starts it
    in a temporary folder of the node where the node lacks that folder, and relative paths would lead there."""
    if not (os.path.isdir(folder) and os.path.samefile(folder, ".")):
        raise UserError(
            f"node {socket.gethostname()} has started the job in {Path.cwd()} and not in {folder}, where it was submitted"
            + ("" if os.path.isdir(folder) else ", which this node lacks")
            + ": submit it in a folder that all nodes see under the same path"
        )


def check_submit_folder(out: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if a task would write a relative `out` into another folder than the submit folder. Slurm starts a
    task in another folder if the node lacks the submit folder."""
    submitted = environ.get("SLURM_SUBMIT_DIR")
    if submitted and not out.is_absolute() and not os.path.isdir(submitted):
        raise UserError(
            f"node {socket.gethostname()} lacks {submitted}, where the job was submitted, and has started it in "
            f"{Path.cwd()}, where --out {out} would be written: give --out as an absolute path that all nodes see"
        )
