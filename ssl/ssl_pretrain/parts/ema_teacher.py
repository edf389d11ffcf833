"""Teachers: copies of a network that follow it as an exponential moving average and are never trained."""

import copy
import math
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from ..backbones.backbone import Backbone

T = TypeVar("T", bound=nn.Module)


class EncoderWithHeads(nn.ModuleDict):
    """An encoder and what stands on it, that a teacher follows together."""

    @property
    def backbone(self) -> Backbone:
        """The encoder among them ("encoder"; a property cannot share that name)."""
        return cast(Backbone, self["encoder"])


def ema_copy(module: T) -> T:
    """A copy of `module` without gradients; in a backbone drop path is off, for a teacher drops nothing even while
    training."""
    twin = copy.deepcopy(module).requires_grad_(False)
    for part in twin.modules():
        if isinstance(part, Backbone) and "drop_path" in part.supports:
            part.config = replace(part.config, drop_path=0.0)
    return twin


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, momentum: float, ok: Tensor) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, in every trained parameter, where `ok` (bool ()) is true.

    Buffers (a batch norm's running statistics) stay the teacher's own: it has computed them itself.
    """
    pairs = [(t, s) for t, s in zip(teacher.parameters(), student.parameters(), strict=True) if s.requires_grad]
    old: list[Tensor] = [t for t, _ in pairs]
    new: list[Tensor] = [s for _, s in pairs]
    weight = (1 - momentum) * ok
    torch._foreach_lerp_(old, new, [weight.to(t) for t in old])


def cosine_momentum(start: float, progress: float, end: float = 1.0) -> float:
    """A momentum that rises from `start` to `end` by half a cosine over the run (BYOL, section 3.3; DINO)."""
    return end - (end - start) * (math.cos(math.pi * progress) + 1) / 2
