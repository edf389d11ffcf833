"""LARS, the optimiser of the large batches of contrastive learning. w a parameter, g its gradient, v its momentum."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

TRUST = 1e-3  # eta, in all papers of self-supervised learning that use LARS


@final
class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg, "Large Batch Training of Convolutional Networks", 2017).

    g <- g + weight_decay * w, scaled by TRUST * |w| / |g| (by 1 where a norm is 0); v <- momentum * v + g; w <- w - lr * v.
    Parameters of groups that do not decay (biases and norms) get plain momentum SGD, as in SimCLR and BYOL. With the
    attribute `found_inf` (float, ()) at 1 a step changes nothing, and nobody waits for the device to learn of it.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        momentum: float,
        total: Callable[[Tensor], Tensor] = lambda squares: squares,
    ) -> None:
        """`total` adds sums of squares up over the processes that hold the other parts of the parameters."""
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum, "decays": True})
        self._total = total

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        found = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                ok = torch.ones((), dtype=torch.bool, device=w.device) if found is None else found == 0
                state = self.state[w]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(w)
                v: Tensor = state["momentum_buffer"]
                g = w.grad
                if group["decays"]:
                    g = g.add(w, alpha=group["weight_decay"])
                    w_norm, g_norm = self._total(torch.stack([w.norm(), g.norm()]).square()).sqrt().to(w.device)
                    g = g * torch.where((w_norm > 0) & (g_norm > 0), TRUST * w_norm / g_norm, 1.0)
                v.copy_(torch.where(ok, group["momentum"] * v + g, v))
                w.sub_(torch.where(ok, v, 0.0), alpha=group["lr"])
