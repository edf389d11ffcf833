"""Parameter groups by the papers' rules, and the optimiser over them.

Every optimiser here takes `found_inf`: a step that is not finite is skipped on the device, moments and decay included,
without the host waiting to learn of it.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adamw import AdamW
from .lars import Lars
from .muon import MuonAndAdamW
from .pretext import Method

DECAYED_TOKENS = ("cls_token", "mask_token", "reg_tokens", "pos_embed")


def decays(name: str, parameter: Tensor, rule: Literal["no_1d", "no_1d_tokens", "all"]) -> bool:
    """Whether a parameter takes part in weight decay.

    "no_1d": all but biases and parameters of one dimension (MAE, DINO, iBOT, I-JEPA, MSN; their class and mask tokens
    and position tables do decay); "no_1d_tokens": nor tokens and positions (BEiT, MAE's fine-tuning); "all": every one
    (MoCo v3).
    """
    if rule == "all":
        return True
    if parameter.ndim <= 1 or name.endswith(".bias"):
        return False
    return rule == "no_1d" or name.rsplit(".", maxsplit=1)[-1] not in DECAYED_TOKENS


def parameter_groups(
    method: Method,
    *,
    rule: Literal["no_1d", "no_1d_tokens", "all"],
    layer_decay: float = 1.0,
    matrices: bool = False,
    part: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
) -> list[dict[str, Any]]:
    """Trainable parameters, of each the `part` that is here, in groups of equal weight decay and learning-rate scale.

    Each group holds "params", "names", "decays" (bool), "matrices" (bool: those that are two-dimensional and of the
    encoder, what Muon is for; apart from the others only where `matrices` asks for it) and "lr_scale": layer_decay **
    (blocks between the parameter and the encoder's output), as in BEiT, section A; 1 for everything outside the encoder.
    """
    inside = {id(p): name for name, p in method.encoder.named_parameters()}
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, parameter in method.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if id(parameter) in inside:
            scale = layer_decay ** (method.encoder.depth + 1 - method.encoder.layer_of(inside[id(parameter)]))
        decay = decays(name, parameter, rule)
        matrix = matrices and parameter.ndim == 2 and id(parameter) in inside
        matrix = matrix and not name.endswith("relative_position_bias_table")
        fresh: dict[str, Any] = {"params": [], "names": [], "decays": decay, "lr_scale": scale, "matrices": matrix}
        group = groups.setdefault((decay, scale, matrix), {**fresh, "weight_decay": 0.0})
        group["params"].append(part(parameter))
        group["names"].append(name)
    return list(groups.values())


def build(
    kind: Literal["adamw", "sgd", "lars", "muon"],
    groups: list[dict[str, Any]],
    betas: tuple[float, float],
    whole: Callable[[Tensor], Tensor] = lambda norms: norms,
) -> torch.optim.Optimizer:
    """The optimiser, fused (one kernel over all parameters; three times faster than the default on CPU and GPU).

    whole: what the 2-norms of tensors become where each process holds a part of them.
    """
    if kind == "adamw":
        return AdamW(groups, betas=betas)
    if kind == "muon":
        return MuonAndAdamW(groups, betas=betas)
    if kind == "lars":
        return Lars(groups, momentum=betas[0], whole=whole)
    return torch.optim.SGD(groups, lr=0.0, momentum=betas[0], fused=True)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Give every group its share of this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step where `bad` (float32, ()) is 0, change nothing where it is 1; the host does not wait, unless it keeps the
    parameters of an accelerator."""
    # Not with non_blocking: what goes to the host would be read before it has come.
    bad = bad.to(optimizer.param_groups[0]["params"][0].device)
    # The fused kernels read these two attributes; they were made for the gradient scaler of float16.
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()


def gradient_norms(parameters: list[nn.Parameter], whole: Callable[[Tensor], Tensor]) -> Tensor:
    """The 2-norm of each gradient there is, float32 (P,); `whole` as in `build`."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return whole(torch.stack(torch._foreach_norm(grads)).float())


def clip_(parameters: list[nn.Parameter], most: float, norms: Tensor, *, each: bool) -> None:
    """Scale gradients, whose 2-norms are `norms` (P,), down to a norm of at most `most`: together by the global norm, or
    each parameter's by its own (DINO, as released)."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = norms.to(grads[0].device)
    if each:
        torch._foreach_mul_(grads, list((most / (norms + 1e-6)).clamp(max=1.0).unbind()))
    else:
        torch._foreach_mul_(grads, (most / (norms.norm() + 1e-6)).clamp(max=1.0))


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
    """Tensors for a state to be read into, as `state_by_name` gives it: from the shapes (of the whole) and types of its
    entries by name. What has its parameter's shape is as large as the part of it that is here."""
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
    """Take the tensors that `state_by_name` would give, as they are. Raises KeyError where a parameter's entry is
    missing."""
    entries: dict[str, dict[str, Tensor]] = {}
    for path, value in state.items():
        name, entry = path.rsplit("/", 1)
        entries.setdefault(name, {})[entry] = value
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            optimizer.state[parameter] = entries[name]
