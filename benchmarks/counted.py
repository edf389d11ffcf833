"""Counts of a step that need no clock: kernels that it starts, and operations for which the host would wait on a GPU.

Operations are counted below autograd; views and empty allocations do not count.
"""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# What the host must wait for on a GPU: a number it reads, or a size that depends on values.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "unique_consecutive"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
FREE = {
    "empty",
    "empty_like",
    "_unsafe_view",
    "promote_types",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "lift_fresh",
    "detach",
    "set_",
    "resize_",
}


class Counted(TorchDispatchMode):
    """Counts kernels, and lists what the host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in INDEXED and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1])
        repeats = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in WAITS or masks or repeats:
            self.waits.append(name)
        if not func.is_view and name not in FREE:
            self.kernels[name] += 1
        return func(*args, **(kwargs or {}))
