"""LARS, an optimiser for large batches in contrastive learning. w: a parameter, g: its gradient, v: its momentum."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from .scaling import scale_each_

TRUST = 1e-3  # eta, in all papers of self-supervised learning that use LARS


@final
class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg, "Large Batch Training of Convolutional Networks", 2017).

    g <- g + weight_decay * w, scaled by TRUST * |w| / |g| (by 1 where a norm is 0); v <- momentum * v + g; w <- w - lr * v.
    Parameters of groups that do not decay (biases and norms) get plain momentum SGD, as in SimCLR and BYOL. With the
    attribute `found_inf` (float, ()) at 1 a step changes nothing; the host does not synchronise with the device.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        momentum: float,
        whole: Callable[[Tensor], Tensor] = lambda norms: norms,
    ) -> None:
        """`whole` converts norms of the parts that this process holds into norms of the whole tensors."""
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "decays": True})
        self._whole = whole

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        found: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            w = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not w:
                continue
            v = [self._momentum(parameter) for parameter in w]
            bad = w[0].new_zeros(()) if found is None else found.to(w[0])
            decay = group["weight_decay"] if group["decays"] else 0.0
            g = list(torch._foreach_add([parameter.grad for parameter in w], w, alpha=decay))
            if group["decays"]:
                norms = torch.stack([*torch._foreach_norm(w), *torch._foreach_norm(g)])
                w_norms, g_norms = self._whole(norms).to(bad).chunk(2)
                trust = torch.where((w_norms > 0) & (g_norms > 0), TRUST * w_norms / g_norms, 1.0)
                scale_each_(g, trust)
            advance = advance_in_lists_ if bad.device.type == "cpu" else advance_fused_
            advance(w, g, v, bad, group["momentum"], group["lr"])

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def advance_in_lists_(
    w: list[Tensor], g: list[Tensor], v: list[Tensor], bad: Tensor, momentum: float, lr: float
) -> None:
    """v <- momentum * v + g; w <- w - lr * v, unless `bad` (float, ()) is 1; overwrites g. A kernel for each tensor is
    started, and each product is rounded, so that results on a CPU stay those of earlier versions."""
    skipped = bad != 0
    for each in g:  # NaN times 0 is NaN
        each.masked_fill_(skipped, 0.0)
    torch._foreach_mul_(v, bad + (1 - bad) * momentum)
    torch._foreach_add_(v, g)
    torch._foreach_copy_(g, v)
    torch._foreach_mul_(g, (bad - 1) * lr)
    torch._foreach_add_(w, g)


def advance_fused_(w: list[Tensor], g: list[Tensor], v: list[Tensor], bad: Tensor, momentum: float, lr: float) -> None:
    """`advance_in_lists_` in one kernel for all tensors, equal to it up to rounding."""
    torch._fused_sgd_(
        w, g, v, weight_decay=0.0, momentum=momentum, lr=lr, dampening=0.0, nesterov=False, maximize=False,
        is_first_step=False, found_inf=bad,
    )  # fmt: skip
