"""The recipes that ship with the package (the folder recipes/ of the repository), and the result that one records.

A recipe is a YAML file of flags. Its header, the comment at its top, has a title, the command, and, where it was run, one
line `# Recorded: {...}` with YAML that `ssl-pretrain reproduce` compares a run with. Importing this needs no torch.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_pretrain import flags
from ssl_pretrain.config import load_yaml
from ssl_pretrain.errors import UserError, nearest

PACKAGE = "ssl_pretrain.recipes"
RECORDED = "# Recorded:"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A measured result of a recipe."""

    evaluator: str
    """Evaluator of `ssl-eval`, with its default flags."""
    metric: str
    """Number of its results.json, under "metrics"."""
    value: float
    """What was measured."""
    tolerance: float
    """Largest difference that is no failure: of other seeds, hardware and versions of libraries."""
    where: str
    """Date and hardware."""
    minutes: float | None = None
    """How long training took there."""
    flags: tuple[str, ...] = ()
    """Flags that training had beside the recipe."""
    images: int | None = None
    """Trained on the first so many training images of the data (parquet); evaluated on all of it."""


def names() -> list[str]:
    """The recipes, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def path(text: str, command: str = "--config") -> Path:
    """The file that `--config TEXT` means: that of a recipe's name, else a path. command: what the name was given to.
    Raises UserError for a word that is neither a recipe nor a file, with the nearest name."""
    given = Path(text)
    if given.is_file() or given.suffix or given.name != text:
        return given
    if text not in names():
        raise UserError(f"{command}: {text!r} is neither a recipe nor a file{_known(text)}")
    return _folder() / f"{text}.yaml"


def _known(text: str) -> str:
    """The nearest name, or how to see all of them: they are many."""
    near = nearest(text, names())
    return near if "did you mean" in near else "; 'ssl-pretrain --config list' shows all recipes"


def title(file: Path) -> str:
    """The first sentence of a recipe's header."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        words = line.removeprefix("#").strip()
        if not line.startswith("#") or words.split(" ")[0].endswith(":"):
            break
        lines.append(words)
    return " ".join(lines).split(". ")[0].rstrip(".")


def recorded(file: Path) -> Recorded | None:
    """The result that a recipe records; None without one. Raises UserError where it cannot be read."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith(RECORDED)]
    if not lines:
        return None
    try:
        found: Any = load_yaml(lines[0].removeprefix(RECORDED).encode())
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise ValueError("is no mapping")
        (record,) = flags.parse([Recorded], [], found, prog=f"{file}", description="")
    except (ValueError, UserError) as problem:
        raise UserError(f"{file}: its line '{RECORDED}' {problem}") from None
    return record


def overview() -> str:
    """All recipes, a line each."""
    known = names()
    width = max(map(len, known))
    lines = []
    for name in known:
        file = _folder() / f"{name}.yaml"
        result = recorded(file)
        has = "" if result is None else f"  [{result.evaluator} {result.metric} {result.value:g}]"
        lines.append(f"  {name:<{width}}  {title(file)}{has}")
    return "\n".join(["Recipes (in brackets: the result that 'ssl-pretrain reproduce NAME' compares with):", *lines])


def _folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("this installation of ssl-pretrain has no recipes")
    return Path(next(iter(spec.submodule_search_locations)))
