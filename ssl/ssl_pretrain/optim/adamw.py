"""AdamW with lists that are built once, so a step has little host overhead besides the fused kernel. P parameters."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor


@dataclass(frozen=True)
class _GroupState:
    """A group's parameters and state, as the lists that the kernel takes."""

    parameters: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    steps: Tensor  # float32 (P,), on the parameters' device: number of steps of each
    step: list[Tensor]  # its elements, sharing its memory

    def with_gradients(self) -> "_GroupState":
        """The entries whose parameters have a gradient."""
        lists: list[Any] = [self.parameters, self.exp_avg, self.exp_avg_sq, self.step]
        chosen = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        parameters, exp_avg, exp_avg_sq, step = ([each[i] for i in chosen] for each in lists)
        return _GroupState(parameters, exp_avg, exp_avg_sq, self.steps, step)


@final
class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019), algorithm 2.

    Kernel, numbers and state ("step", "exp_avg", "exp_avg_sq" for each parameter) are those of
    torch.optim.AdamW(fused=True). That class looks up every tensor and increments every parameter's step counter
    separately in each step, which is half of its time if parameters are small. If the attribute `found_inf` (float32,
    ()) is 1, a step changes nothing; the host does not synchronise with the device for this.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "betas": betas, "eps": eps})
        self._group_states: list[_GroupState] = []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        bad: Tensor | None = getattr(self, "found_inf", None)
        if not self._current():
            self._group_states = [self._collect(group["params"]) for group in self.param_groups]
        taken = 1.0 if bad is None else 1.0 - bad
        for group, group_state in zip(self.param_groups, self._group_states, strict=True):
            grads = [parameter.grad for parameter in group_state.parameters if parameter.grad is not None]
            if not grads:
                continue
            if len(grads) == len(group_state.parameters):
                group_state.steps.add_(taken)
            else:
                group_state = group_state.with_gradients()
                torch._foreach_add_(group_state.step, taken)
            torch._fused_adamw_(
                group_state.parameters, grads, group_state.exp_avg, group_state.exp_avg_sq, [], group_state.step,
                lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
                eps=group["eps"], amsgrad=False, maximize=False, found_inf=bad,
            )  # fmt: skip

    def _current(self) -> bool:
        """Whether the lists refer to the current state, and not to one that was replaced by loading."""
        return len(self._group_states) == len(self.param_groups) and all(
            self.state[parameter].get("step") is step
            for group_state in self._group_states
            for parameter, step in zip(group_state.parameters[:1], group_state.step[:1], strict=True)
        )

    def _collect(self, parameters: list[Tensor]) -> _GroupState:
        for parameter in parameters:
            state = self.state[parameter]
            state.setdefault("step", torch.zeros((), device=parameter.device))
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment not in state:
                    state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        states = [self.state[parameter] for parameter in parameters]
        steps = torch.stack([state["step"] for state in states]).float()
        for state, taken in zip(states, steps.unbind(), strict=True):
            state["step"] = taken
        exp_avg, exp_avg_sq, step = ([state[entry] for state in states] for entry in ("exp_avg", "exp_avg_sq", "step"))
        return _GroupState(parameters, exp_avg, exp_avg_sq, steps, step)
