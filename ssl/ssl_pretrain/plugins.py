"""Finding a method or an evaluator by its name: a file of that name in our folder, else another package's entry point.

Listing imports nothing, so that a mistyped name is answered before torch is loaded.
"""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from types import ModuleType
from typing import Any

from .errors import UserError, nearest


def own(package: str) -> list[str]:
    """The modules of `package` that are plugins: every file but those whose name starts with an underscore."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return []
    return sorted(m.name for m in pkgutil.iter_modules(spec.submodule_search_locations) if not m.name.startswith("_"))


def names(package: str) -> list[str]:
    """Every plugin: our own files, then the entry points that other packages declare in the group called `package`."""
    mine = own(package)
    return mine + sorted({e.name for e in importlib.metadata.entry_points(group=package)} - set(mine))


def load(package: str, name: str, what: str) -> ModuleType | Any:
    """Our module of that name, or the object another package's entry point names.

    Raises UserError ("unknown `what` ...") with the nearest name where there is none.
    """
    if name in own(package):
        return importlib.import_module(f"{package}.{name}")
    for entry in importlib.metadata.entry_points(group=package):
        if entry.name == name:
            return entry.load()
    raise UserError(f"unknown {what} {name!r}{nearest(name, names(package))}")
