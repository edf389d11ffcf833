"""Tables so large that their way to memory and back, or asking the system for them, takes longer than what is computed."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

CACHED = 2**18  # values that are worked on together, so that a few tables of them stay in a CPU's cache
LARGE = 2**25  # bytes: what malloc gives back to the system as soon as it is free


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous table. malloc maps what is this large anew each time, and on a CPU the faults of its
    4-KiB pages take as long as a pass over it: huge pages are asked for, where the system has them."""
    like = torch.empty(shape, dtype=dtype, device="meta")
    size = like.numel() * like.element_size()
    if device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def in_cache(rows: int, width: int, device: torch.device) -> list[slice]:
    """The rows of a table a few at a time: on a CPU as many as its cache holds, elsewhere all."""
    few = max(1, CACHED // width) if device.type == "cpu" else rows
    return [slice(i, min(i + few, rows)) for i in range(0, rows, few)]
