"""The precision of float32 matrix products on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """With float32 matrix products in TF32 on a CUDA device: inputs of 10 instead of 23 bits of mantissa, sums in float32,
    several times as fast. For networks. bfloat16 products stay as they are. Other devices compute as before."""
    with _precision("high") if device.type == "cuda" else _precision(torch.get_float32_matmul_precision()):
        yield


@contextmanager
def exact() -> Iterator[None]:
    """With float32 matrix products in float32, also within `tf32`. For searches whose result must be exact."""
    with _precision("highest"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
