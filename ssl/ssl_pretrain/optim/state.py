"""The optimiser's state, stored by parameter name."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def state_by_name(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as one flat mapping "parameter name/entry" -> tensor, independent of the groups' order."""
    return {
        f"{name}/{entry}": value
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        for entry, value in optimizer.state[parameter].items()
        if value is not None
    }


def empty_state(
    optimizer: torch.optim.Optimizer, entries: Mapping[str, tuple[tuple[int, ...], torch.dtype]], method: nn.Module
) -> dict[str, Tensor]:
    """Empty tensors to read a state into, in the form of `state_by_name`. `entries`: whole shapes and dtypes of the
    state's entries by name. An entry with its parameter's shape gets the shape of the part that this process holds."""
    by_parameter: dict[str, list[str]] = {}
    for path in entries:
        by_parameter.setdefault(path.rsplit("/", 1)[0], []).append(path)
    whole = {name: tuple(parameter.shape) for name, parameter in method.named_parameters()}
    state = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for path in by_parameter.get(name, ()):
                shape, dtype = entries[path]
                mine = parameter.shape if shape == whole[name] else shape
                # A fused optimiser keeps even its step counter on the parameter's device.
                state[path] = torch.zeros(mine, dtype=dtype, device=parameter.device)
    return state


def load_state_by_name(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Use the given tensors, in the form of `state_by_name`, as the state (no copies). Raises KeyError if a parameter's
    entry is missing."""
    entries: dict[str, dict[str, Tensor]] = {}
    for path, value in state.items():
        name, entry = path.rsplit("/", 1)
        entries.setdefault(name, {})[entry] = value
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            optimizer.state[parameter] = entries[name]
