"""Encoders: one file for each architecture. A name begins with that of its file: "vit_tiny" is a size in vit.py,
"convnextv2_tiny" one in convnext.py.

Each file has `SIZES`, a literal dict (name -> the options of that size), and one final subclass of `backbone.Backbone`
with a nested `Config`, the frozen dataclass of its options. Importing this package, `names` and `defaults` of this
package's encoders need no torch; `config_class` and `build` do.

Other packages add encoders with entry points of the group `ssl_pretrain.backbones`, one for each name of `--encoder`.
An entry point refers to a module as above, or to a Backbone whose module may have `SIZES`. It is imported when the name
is used.

Some names have a prefix: `timm:NAME` is a model of timm (timm_model.py), `module:PACKAGE:FUNCTION` a module of the user's
own code (module_encoder.py), `tokens:NAME` a ViT behind a tokenizer (token_stem.py), which exports have and no run is told
to train. `build` imports what such a name says. A name that was read from a file must be checked before (`encoder.load`
does).
"""

import ast
import importlib
import sys
import typing
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import plugins
from ..errors import UserError, nearest
from ..flags import check

if TYPE_CHECKING:
    from .backbone import Backbone

GROUP = "ssl_pretrain.backbones"  # the entry points of other packages
# File of the architecture of a name with a prefix, the option that holds the rest of the name, and what the name may have
# after a comma.
WRAPPED = {
    "timm": ("timm_model", "timm_model", ("checkpoint",)),
    "module": ("module_encoder", "function", ()),
    "tokens": ("token_stem", "encoder", ()),
}


def own() -> list[str]:
    """Every size of every architecture of this package, in the order of each file's `SIZES`."""
    return [name for file in sorted(Path(__file__).parent.glob("*.py")) for name in _sizes(file)]


def names() -> list[str]:
    """This package's encoders, then those that other packages declare. Imports nothing."""
    mine = own()
    return mine + [name for name in plugins.installed(GROUP) if name not in mine]


def known(name: str) -> bool:
    """Whether an encoder of that name exists, in this package or another. Imports nothing, so of a name with a prefix only
    the prefix is looked at."""
    return name in own() or name in plugins.installed(GROUP) or prefix(name) is not None


def prefix(name: str) -> str | None:
    """ "timm", "module" or "tokens" of a name with such a prefix. None for another name, and for one that an installed
    package declares as an entry point."""
    kind, colon, _ = name.partition(":")
    return kind if colon and kind in WRAPPED and name not in plugins.installed(GROUP) else None


def plain_name(name: str) -> str:
    """The name of the architecture: "timm:resnet18" of "timm:resnet18,checkpoint=FILE"."""
    return name.partition(",")[0] if prefix(name) else name


def checkpoint(name: str) -> str | None:
    """FILE of a name "timm:NAME,checkpoint=FILE", whose weights a run starts from; None without one."""
    return _after_comma(name).get("checkpoint")


def defaults(name: str) -> dict[str, Any]:
    """The options of the size `name`, e.g. {"dim": 192, "depth": 12, "heads": 3}; all other options have the defaults
    of `config_class(name)`. Raises UserError for an unknown name, with the nearest one. Another package's encoder is
    imported, and so is timm."""
    file = _file(name)
    if (kind := prefix(name)) is not None:
        _after_comma(name)
        _architecture(name).check_name(inner := plain_name(name).partition(":")[2])
        return {WRAPPED[kind][1]: inner}
    return dict(_sizes(file)[name]) if file is not None else _installed(name)[1]


def config_class(name: str) -> type:
    """The frozen dataclass of that architecture's options; each is a flag. Raises UserError for an unknown name."""
    return _architecture(name).Config


def build(name: str, *, image_size: tuple[int, int], in_chans: int = 3, **options: Any) -> "Backbone":
    """The encoder of that name for images of `image_size` (height, width) pixels. Its weights are drawn from torch's
    global generator.

    `options` (fields of `config_class(name)`) override `defaults(name)`; lists (from JSON or YAML) are read as tuples.
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
    if (kind := prefix(name)) is not None and given.get(option := WRAPPED[kind][1], "") not in (
        "",
        *defaults(name).values(),
    ):
        raise UserError(
            f"the encoder {name} is not the {option.replace('_', ' ')} {given[option]!r}: leave that option out"
        )
    made = architecture(image_size, in_chans, architecture.Config(**defaults(name) | given))
    made.name = plain_name(name)
    return made


def _file(name: str) -> Path | None:
    """The file of this package that has the size `name`; None for another package's encoder. Raises UserError."""
    if (kind := prefix(name)) is not None:
        return Path(__file__).parent / f"{WRAPPED[kind][0]}.py"
    if name in own():
        (file,) = (file for file in Path(__file__).parent.glob("*.py") if name in _sizes(file))
        return file
    if name not in plugins.installed(GROUP):
        hint = nearest(name, names())
        hint += (
            "" if hint.startswith("; did") else "; or timm:NAME, module:PACKAGE:FUNCTION (docs/library_backbones.md)"
        )
        raise UserError(f"unknown encoder {name!r}{hint}")
    return None


def _after_comma(name: str) -> dict[str, str]:
    """The options in a name with a prefix: {"checkpoint": FILE} of "timm:NAME,checkpoint=FILE". Raises UserError."""
    kind = prefix(name)
    given = dict(part.partition("=")[::2] for part in name.split(",")[1:]) if kind else {}
    for option, value in given.items():
        allowed = WRAPPED[str(kind)][2]
        if option not in allowed or not value:
            more = (
                f": a name takes {', '.join(f'{each}=FILE' for each in allowed)}" if allowed else ": a name takes none"
            )
            raise UserError(
                f"--encoder {name}: {option!r} is no option of an encoder to train{more}. Sizes and normalisation of the "
                f"images are flags (--image-size, --mean, --std)"
            )
    return given


@cache
def _sizes(file: Path) -> dict[str, dict[str, Any]]:
    """The literal `SIZES` of a file, read without importing it; empty if there is none."""
    for line in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(line, ast.Assign) and [ast.unparse(target) for target in line.targets] == ["SIZES"]:
            return ast.literal_eval(line.value)
    return {}


def _architecture(name: str) -> Any:
    """The Backbone class of an encoder."""
    file = _file(name)
    return _only_backbone(importlib.import_module(f"{__name__}.{file.stem}")) if file else _installed(name)[0]


def _installed(name: str) -> tuple[Any, dict[str, Any]]:
    """The Backbone class of another package's encoder, and the options of its size. Raises TypeError if the entry point
    refers neither to a Backbone nor to a module with one and this size."""
    from .backbone import Backbone

    found = plugins.load_installed(GROUP, name)
    if isinstance(found, ModuleType):
        architecture, module = _only_backbone(found), found
        if name not in getattr(module, "SIZES", {}):
            raise TypeError(f"{module.__name__} must hold SIZES with the encoder {name!r}, which its entry point names")
    elif isinstance(found, type) and issubclass(found, Backbone):
        architecture, module = found, sys.modules[found.__module__]
    else:
        raise TypeError(f"the entry point {name!r} must name a Backbone, or a module with one and SIZES, not {found!r}")
    return architecture, dict(getattr(module, "SIZES", {}).get(name, {}))


def _only_backbone(module: ModuleType) -> Any:
    """The Backbone that a module defines."""
    from .backbone import Backbone

    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Backbone)]
    classes = [c for c in classes if c.__module__ == module.__name__]
    if len(classes) != 1:
        raise TypeError(f"{module.__name__} must define exactly one Backbone, it defines {len(classes)}")
    return classes[0]
