"""The processes of a run and their communication. Methods use only this package to communicate across ranks.

Importing the package does not import torch, because the commands read the environment (environment.py) before they need
torch. The names below are loaded at their first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .collectives import (
        all_reduce_,
        alone,
        any_of,
        barrier,
        from_all,
        from_first,
        gather,
        local,
        mean,
        mean_gradients_,
        on_all,
        rank,
        sharded_like,
        size,
    )
    from .processes import World, cores, world

__all__ = [
    "World",
    "all_reduce_",
    "alone",
    "any_of",
    "barrier",
    "cores",
    "from_all",
    "from_first",
    "gather",
    "local",
    "mean",
    "mean_gradients_",
    "on_all",
    "rank",
    "sharded_like",
    "size",
    "world",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import collectives, processes

    value = getattr(processes if hasattr(processes, name) else collectives, name)
    globals()[name] = value
    return value
