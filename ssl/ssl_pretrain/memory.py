"""Memory for large tables, where allocation or memory traffic takes longer than the computation."""

import math
import mmap
import sys
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

CACHED = 2**18  # values processed together, so that a few tables of them stay in a CPU's cache
LARGE = 2**25  # bytes: malloc returns blocks of this size to the system as soon as they are free


def _references(objects: list[Any]) -> list[int]:
    return [sys.getrefcount(each) for each in objects]


_UNUSED = _references([object()])[0]  # count of an object that only the list holds; it depends on the Python version
_mapped: list[mmap.mmap] = []  # all mappings made by `empty`, in use or not


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous table.

    malloc maps blocks of this size again for each allocation, and on a CPU the page faults take longer than a pass over
    the table. So this function requests huge pages, if the system has them, and reuses the memory of a table that is no
    longer referenced for the next table of the same size (for another size it is returned to the system)."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    idle = [memory for memory, count in zip(_mapped, _references(_mapped), strict=True) if count == _UNUSED]
    memory = next((memory for memory in idle if len(memory) == size), None)
    if memory is None:
        for memory in idle:
            _mapped.remove(memory)
        del idle
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        _mapped.append(memory)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def in_cache(rows: int, width: int, device: torch.device) -> list[slice]:
    """Slices of a table's rows: on a CPU as many rows as its cache holds, else all rows in one slice."""
    step = max(1, CACHED // width) if device.type == "cpu" else rows
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
