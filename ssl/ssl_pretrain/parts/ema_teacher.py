"""EMA teachers: copies of a network that are updated as its exponential moving average and are never trained."""

import copy
import math
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ..backbones.backbone import Backbone

T = TypeVar("T", bound=nn.Module)


class EncoderWithHeads(nn.ModuleDict):
    """An encoder and its heads, which a teacher follows together."""

    @property
    def backbone(self) -> Backbone:
        """The entry "encoder" (a property cannot have that name)."""
        return cast(Backbone, self["encoder"])


def ema_copy(module: T) -> T:
    """A copy of `module` without gradients. In a backbone drop path is disabled, because a teacher drops nothing, not
    even in training."""
    twin = copy.deepcopy(module).requires_grad_(False)
    for part in twin.modules():
        if isinstance(part, Backbone) and "drop_path" in part.supports:
            part.config = replace(part.config, drop_path=0.0)
    return twin


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, momentum: float, ok: Tensor) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student for every trained parameter, if `ok` (bool ()) is true.

    Buffers (a batch norm's running statistics) are not updated: the teacher computes its own.
    """
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if s.requires_grad]
    old: list[Tensor] = [t for t, _ in pairs]
    new: list[Tensor] = [s for _, s in pairs]
    weight = (1 - momentum) * ok
    if old and old[0].device.type != "cpu":
        lerp_by_one_(old, new, weight.to(old[0].device))
    else:
        torch._foreach_lerp_(old, new, [weight.to(t) for t in old])


def lerp_by_one_(old: list[Tensor], new: list[Tensor], weight: Tensor) -> None:
    """old <- old + weight * (new - old) for an accelerator, where lerp with a list of weights () starts a kernel for each
    tensor. Three kernels, and memory for one more copy."""
    change = torch._foreach_sub(new, old)
    torch._foreach_mul_(change, weight)
    torch._foreach_add_(old, change)


def cosine_momentum(start: float, progress: float, end: float = 1.0) -> float:
    """A momentum that rises from `start` to `end` along half a cosine over the run (BYOL, section 3.3; DINO)."""
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2
