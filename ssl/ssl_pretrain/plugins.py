"""Finding a plugin (method, backbone, evaluator, source, logger) by its name: ours, else another package's entry point.

Listing imports nothing, so that a mistyped name is answered before torch is loaded. Only what an installed package
declares as an entry point is ever imported: a name that was read from a file chooses among those, and is no module.
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
    return mine + [name for name in installed(package) if name not in mine]


def installed(group: str) -> list[str]:
    """The names of the entry points that other packages declare in `group`, sorted."""
    return sorted({entry.name for entry in importlib.metadata.entry_points(group=group)})


def load_installed(group: str, name: str) -> ModuleType | Any:
    """The object that the entry point `name` of `group` names; of several, the one of the package found first. Raises
    KeyError where no installed package declares one, and what importing the package raises."""
    for entry in importlib.metadata.entry_points(group=group):
        if entry.name == name:
            return entry.load()
    raise KeyError(name)


def load(package: str, name: str, what: str) -> ModuleType | Any:
    """Our module of that name, or the object another package's entry point names.

    Raises UserError ("unknown `what` ...") with the nearest name where there is none.
    """
    if name in own(package):
        return importlib.import_module(f"{package}.{name}")
    if name in installed(package):
        return load_installed(package, name)
    raise UserError(f"unknown {what} {name!r}{nearest(name, names(package))}")


def optional(name: str, wanted_by: str, install: str | None = None) -> ModuleType:
    """An optional library, imported. wanted_by: what needs it, the start of a message; install: what pip is told,
    where that is not the library's name.

    Raises UserError: that it is not there and how it is installed, or that it is there and what its import failed of.
    """
    library = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name == library:
            raise UserError(f"{wanted_by} needs {library}: pip install {install or library}") from None
        raise _unusable(library, wanted_by, install, problem) from None
    except Exception as problem:  # whatever a library raises that does not fit to what else is installed
        raise _unusable(library, wanted_by, install, problem) from None


def part(library: ModuleType, name: str, wanted_by: str) -> Any:
    """`library.name` of an optional library that imports its parts when they are first used. Raises UserError where that
    import fails, as `optional` does."""
    try:
        return getattr(library, name)
    except Exception as problem:  # whatever a library raises that does not fit to what else is installed
        inner = problem.__cause__ if isinstance(problem.__cause__, Exception) else problem
        raise _unusable(library.__name__, wanted_by, None, inner) from None


def _unusable(library: str, wanted_by: str, install: str | None, why: Exception) -> UserError:
    """The message for a library that is there and cannot be imported."""
    remedy = f"reinstall it to fit the others: pip install --force-reinstall {install or library}"
    if isinstance(why, ModuleNotFoundError) and why.name:
        remedy = f"it needs {why.name}"
    text = " ".join(f"{type(why).__name__}: {why}".split())
    return UserError(f"{wanted_by} needs {library}, which is installed, but its import fails ({text}): {remedy}")
