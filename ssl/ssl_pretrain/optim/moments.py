"""Adam's moments and step counters of a group of parameters, as the lists that fused kernels take. P parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupState:
    """A group's parameters and state.

    Looking up every tensor and incrementing every step counter separately in each step is half of the time of a step if
    parameters are small. So the lists are built once.
    """

    parameters: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    steps: Tensor  # float32 (P,), on the parameters' device: number of steps of each
    step: list[Tensor]  # its elements, sharing its memory

    def count(self, taken: Tensor | float) -> tuple["GroupState", list[Tensor]]:
        """Add `taken` (0 or 1) to the step counters of the parameters that have a gradient. Returns these parameters' state
        and their gradients."""
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if len(grads) == len(self.parameters):
            self.steps.add_(taken)
            return self, grads
        lists: list[Any] = [self.parameters, self.exp_avg, self.exp_avg_sq, self.step]
        chosen = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        parameters, exp_avg, exp_avg_sq, step = ([each[i] for i in chosen] for each in lists)
        if step and isinstance(taken, Tensor):
            torch._foreach_add_(step, taken, alpha=1)  # without alpha its value is read from the device
        elif step:
            torch._foreach_add_(step, taken)
        return GroupState(parameters, exp_avg, exp_avg_sq, self.steps, step), grads


def group_states(optimizer: torch.optim.Optimizer, known: Sequence[GroupState]) -> list[GroupState]:
    """The states of the optimiser's groups: `known`, or new lists if the state was replaced by loading."""
    if len(known) == len(optimizer.param_groups) and all(
        optimizer.state[parameter].get("step") is step
        for group_state in known
        for parameter, step in zip(group_state.parameters[:1], group_state.step[:1], strict=True)
    ):
        return list(known)
    return [_collect(optimizer, group["params"]) for group in optimizer.param_groups]


def _collect(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> GroupState:
    for parameter in parameters:
        state = optimizer.state[parameter]
        state.setdefault("step", torch.zeros((), device=parameter.device))
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment not in state:
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    states = [optimizer.state[parameter] for parameter in parameters]
    steps = torch.stack([state["step"] for state in states]).float()
    for state, taken in zip(states, steps.unbind(), strict=True):
        state["step"] = taken
    exp_avg, exp_avg_sq, step = ([state[entry] for state in states] for entry in ("exp_avg", "exp_avg_sq", "step"))
    return GroupState(parameters, exp_avg, exp_avg_sq, steps, step)
