"""Tables so large that their way to memory and back, or asking the system for them, takes longer than what is computed."""

import math
import mmap
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

CACHED = 2**18  # values that are worked on together, so that a few tables of them stay in a CPU's cache
LARGE = 2**25  # bytes: what malloc gives back to the system as soon as it is free


def _references(held: list[Any]) -> list[int]:
    return [sys.getrefcount(each) for each in held]


_NOBODYS = _references([object()])[0]  # of what only the list holds: Pythons differ in what counting itself adds
_mapped: list[mmap.mmap] = []  # what `empty` asked the system for, in use or not


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous table. malloc maps what is this large anew each time, and on a CPU the faults of its
    pages take longer than a pass over it: huge pages are asked for, where the system has them, and the memory of a table
    that nobody holds any more is used again for the next one of its size (and given back where that has another)."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    idle = [memory for memory, count in zip(_mapped, _references(_mapped), strict=True) if count == _NOBODYS]
    memory = next((memory for memory in idle if len(memory) == size), None)
    if memory is None:
        for memory in idle:
            _mapped.remove(memory)
        del idle
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        _mapped.append(memory)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def in_cache(rows: int, width: int, device: torch.device) -> list[slice]:
    """The rows of a table a few at a time: on a CPU as many as its cache holds, elsewhere all."""
    few = max(1, CACHED // width) if device.type == "cpu" else rows
    return [slice(i, min(i + few, rows)) for i in range(0, rows, few)]
