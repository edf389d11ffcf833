"""LAMB, an optimiser for large batches: Adam's update, scaled to each parameter's norm. w: a parameter, u: its update."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from .moments import GroupState, group_states
from .scaling import scale_each_


@final
class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive moments (You et al., "Large Batch Optimization for Deep Learning", 2020), algorithm 2.

    u = m / (sqrt(v) + eps) + weight_decay * w with Adam's bias-corrected moments m and v, w <- w - lr * |w| / |u| * u.
    The factor |w| / |u| has no upper bound. It is 1 where a norm is 0 and for groups without weight decay (biases and
    norms), as in SparK (Tian et al., 2023). The state is AdamW's. With the attribute `found_inf` (float, ()) at 1 a step
    changes nothing; the host does not synchronise with the device. A step needs memory for one more copy of the
    parameters of a group.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float = 1e-6,
        whole: Callable[[Tensor], Tensor] = lambda norms: norms,
    ) -> None:
        """`whole` converts norms of the parts that this process holds into norms of the whole tensors."""
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "betas": betas, "eps": eps})
        self._whole = whole
        self._group_states: list[GroupState] = []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        bad: Tensor | None = getattr(self, "found_inf", None)
        self._group_states = group_states(self, self._group_states)
        taken = 1.0 if bad is None else 1.0 - bad
        for group, whole in zip(self.param_groups, self._group_states, strict=True):
            group_state, grads = whole.count(taken)
            if not grads:
                continue
            w, decay = group_state.parameters, group["weight_decay"]
            u = [torch.empty_like(each) for each in w]
            torch._foreach_zero_(u)
            # A step of Adam from 0 at the rate -1 is the update itself; at `found_inf` it leaves 0, also from NaN.
            torch._fused_adamw_(
                u, grads, group_state.exp_avg, group_state.exp_avg_sq, [], group_state.step,
                lr=-1.0, beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=0.0,
                eps=group["eps"], amsgrad=False, maximize=False, found_inf=bad,
            )  # fmt: skip
            rate = (w[0].new_ones(()) if bad is None else (1 - bad).to(w[0])) * -group["lr"]
            if decay:
                torch._foreach_add_(u, w, alpha=decay)
                norms = self._whole(torch.stack([*torch._foreach_norm(w), *torch._foreach_norm(u)])).to(w[0].device)
                w_norms, u_norms = norms.chunk(2)
                trust = torch.where((w_norms > 0) & (u_norms > 0), w_norms / u_norms, 1.0)
                scale_each_(u, trust.to(rate) * rate)
            else:
                torch._foreach_mul_(u, rate)
            torch._foreach_add_(w, u)
