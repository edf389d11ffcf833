"""Scaling of a list of tensors, each by a factor of its own, with few kernels."""

import torch
from torch import Tensor


def scale_each_(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply each of P tensors of the dtype of `factors` (P,), on its device, by its factor, in place.

    On an accelerator a list operation starts one kernel for all tensors only if both lists have the same shapes, else one
    for each tensor. So the factors are written out there, which needs memory for one more copy of the tensors.
    """
    if factors.device.type == "cpu":
        torch._foreach_mul_(tensors, list(factors.unbind()))
    else:
        scale_by_written_out_(tensors, factors)


def scale_by_written_out_(tensors: list[Tensor], factors: Tensor) -> None:
    """`scale_each_` for an accelerator."""
    sizes = [each.numel() for each in tensors]
    written = torch.cat([factor.expand(size) for factor, size in zip(factors.unbind(), sizes, strict=True)]).split(
        sizes
    )
    torch._foreach_mul_(tensors, [each.view_as(tensor) for each, tensor in zip(written, tensors, strict=True)])
