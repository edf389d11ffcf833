"""Encoders: one file an architecture, found by the leading letters of a name: "vit_tiny" is a size in vit.py.

Such a file holds `SIZES`, a literal dict (name -> the options that make that size), and one final subclass of
`backbone.Backbone` with a nested `Config`, the frozen dataclass of its options. Importing this package, `names` and
`defaults` need no torch; `config_class` and `build` do.
"""

import ast
import importlib
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, nearest
from ..flags import check

if TYPE_CHECKING:
    from .backbone import Backbone


def names() -> list[str]:
    """Every size of every architecture, in the order of each file's `SIZES`."""
    return [name for file in sorted(Path(__file__).parent.glob("*.py")) for name in _sizes(file)]


def defaults(name: str) -> dict[str, Any]:
    """The options that make the size `name`, e.g. {"dim": 192, "depth": 12, "heads": 3}; every other option has the
    default of `config_class(name)`. Raises UserError for an unknown name, with the nearest one."""
    return _sizes(_file(name))[name]


def config_class(name: str) -> type:
    """The frozen dataclass of that architecture's options; each is a flag. Raises UserError for an unknown name."""
    return _architecture(name).Config


def build(name: str, *, image_size: tuple[int, int], in_chans: int = 3, **options: Any) -> "Backbone":
    """The encoder of that name for images of `image_size` (height, width) pixels, its weights drawn from torch's global
    generator.

    `options` (fields of `config_class(name)`) go over `defaults(name)`; lists, of JSON or YAML, stand for tuples.
    Raises UserError for an unknown name or option (with the nearest one), a value of the wrong type, or sizes that do
    not fit.
    """
    architecture = _architecture(name)
    hints = typing.get_type_hints(architecture.Config)
    for option, value in options.items():
        if option not in hints:
            raise UserError(f"the encoder {name} has no option {option!r}{nearest(option, hints)}")
        try:
            check(value, hints[option])
        except ValueError as problem:
            raise UserError(f"the encoder {name}: {option}: {problem}") from None
    given = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    return architecture(image_size, in_chans, architecture.Config(**defaults(name) | given))


def _file(name: str) -> Path:
    """The file that `name` is a size in."""
    if name not in names():
        raise UserError(f"unknown encoder {name!r}{nearest(name, names())}")
    letters = re.match("[a-z]+", name)
    assert letters is not None, f"the size {name!r} must begin with the name of its file"
    return Path(__file__).parent / f"{letters[0]}.py"


def _sizes(file: Path) -> dict[str, dict[str, Any]]:
    """The literal `SIZES` of a file, read without importing it; empty where there is none."""
    for line in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(line, ast.Assign) and [ast.unparse(target) for target in line.targets] == ["SIZES"]:
            return ast.literal_eval(line.value)
    return {}


def _architecture(name: str) -> Any:
    """The one Backbone that the file of `name` defines."""
    from .backbone import Backbone

    module = importlib.import_module(f"{__name__}.{_file(name).stem}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Backbone)]
    classes = [c for c in classes if c.__module__ == module.__name__]
    if len(classes) != 1:
        raise TypeError(f"{module.__name__} must define exactly one Backbone, it defines {len(classes)}")
    return classes[0]
