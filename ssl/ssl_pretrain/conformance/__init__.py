"""Checks that a plugin keeps the contract of its kind, for plugins of ours and of other packages.

    python -m ssl_pretrain.conformance mae                 (methods:mae, where two kinds have a plugin of that name)

A plugin is found by its name, as everywhere: a file of ours, or an entry point of another package in the group
`ssl_pretrain.<kind>`. Nothing here needs pytest or the repository, so another package can call `run` in its own tests.
Each kind has a module with a function `checks(name)`: callables without arguments that raise `Fault`. Where the names of
a kind are not the files of the package `ssl_pretrain.<kind>`, the module has a function `names()`, too, and `known(name)`
where not all names can be listed.
"""

import importlib
import importlib.util
import time
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from .. import plugins
from ..errors import UserError, nearest

KINDS = ("methods", "backbones", "eval", "sources", "loggers")
_MODULES = {"eval": "evaluators"}  # where a kind's module has another name than the kind

Check = Callable[[], None]


class Fault(AssertionError):
    """A plugin breaks its contract. The message names the fault and where it is."""


class Result(NamedTuple):
    """What one check found."""

    check: str
    fault: Fault | None
    seconds: float


def checks(kind: str, name: str) -> list[Check]:
    """The checks of the plugin `name`; each raises Fault and has a name (`__name__`). They share what is slow to make, so
    call them in their order. Nothing of the plugin is loaded before the first is called.

    Raises UserError for an unknown kind or name.
    """
    module = _module(kind)
    _check_known(kind, name)
    return module.checks(name)


def run(kind: str, name: str, tell: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Every check of the plugin `name`. `tell` gets each result as soon as it is there. Any other exception than Fault
    counts as a fault, too: its message then names the exception and the line that raised it.

    Raises UserError for an unknown kind or name.
    """
    results = []
    for check in checks(kind, name):
        began, fault = time.perf_counter(), None
        try:
            check()
        except Fault as found:
            fault = found
        except Exception as error:
            fault = Fault(f"{type(error).__name__}: {error} ({_line_of(error)})")
            fault.__cause__ = error
        results.append(Result(check.__name__, fault, time.perf_counter() - began))
        tell(results[-1])
    return results


def find(name: str) -> str:
    """The kind of the plugin of that name.

    Raises UserError where there is none (with the nearest name), or where several kinds have one.
    """
    found = [kind for kind in KINDS if name in _names(kind)]
    if len(found) > 1:
        choices = " or ".join(f"{kind}:{name}" for kind in found)
        raise UserError(f"{name!r} is a name in {' and '.join(found)}: write {choices}")
    if not found:
        known = {each for kind in KINDS for each in _names(kind)}
        raise UserError(f"unknown plugin {name!r}{nearest(name, known)}")
    return found[0]


def resolve(word: str) -> tuple[str, str]:
    """(kind, name) of what a user wrote: `name`, or `kind:name`. Raises UserError as `find`, and for an unknown kind."""
    kind, colon, name = word.partition(":")
    if not colon:
        return find(word), word
    if kind not in KINDS:
        if _is_known("backbones", word):  # timm:NAME
            return "backbones", word
        raise UserError(f"unknown kind of plugin {kind!r}{nearest(kind, KINDS)}")
    _check_known(kind, name)
    return kind, name


def _check_known(kind: str, name: str) -> None:
    """Raise UserError unless that kind has a plugin of the name."""
    if not _is_known(kind, name):
        raise UserError(f"unknown name {name!r} in {kind}{nearest(name, _names(kind))}")


def _is_known(kind: str, name: str) -> bool:
    if _exists(kind) and hasattr(module := _module(kind), "known"):
        return bool(module.known(name))
    return name in _names(kind)


def _names(kind: str) -> list[str]:
    """Every plugin of a kind, ours and those of other packages."""
    if _exists(kind) and hasattr(module := _module(kind), "names"):
        return module.names()
    return plugins.names(f"ssl_pretrain.{kind}")


def _module(kind: str) -> ModuleType:
    """The module with a kind's checks. Raises UserError for an unknown kind."""
    if kind not in KINDS:
        raise UserError(f"unknown kind of plugin {kind!r}{nearest(kind, KINDS)}")
    if not _exists(kind):
        raise UserError(f"there are no conformance checks for {kind} yet: {_module_name(kind)} is missing")
    return importlib.import_module(_module_name(kind))


def _exists(kind: str) -> bool:
    return importlib.util.find_spec(_module_name(kind)) is not None


def _module_name(kind: str) -> str:
    return f"{__name__}.{_MODULES.get(kind, kind)}"


def _line_of(error: BaseException) -> str:
    """Where an exception was raised: the innermost line outside torch, "package.module:12 in function"."""
    place = "nowhere"
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "?")
        if module.split(".")[0] != "torch":
            place = f"{module}:{line} in {frame.f_code.co_name}"
    return place
