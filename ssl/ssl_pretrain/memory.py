"""Memory for tables so large that asking the system for it takes as long as filling them."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

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
