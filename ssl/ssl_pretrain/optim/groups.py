"""Parameter groups by the papers' rules: weight decay and layer decay."""

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from ..backbones.backbone import Backbone

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
    model: nn.Module,
    encoder: Backbone,
    *,
    rule: Literal["no_1d", "no_1d_tokens", "all"],
    layer_decay: float = 1.0,
    matrices: bool = False,
    part: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
) -> list[dict[str, Any]]:
    """The trainable parameters of `model`, of which `encoder` is a part, in groups of equal weight decay and learning-rate
    scale. Of each parameter the group holds `part(parameter)`: the part that this process has.

    Each group holds "params", "names", "decays" (bool), "matrices" (bool: those that are two-dimensional and of the
    encoder, what Muon is for; apart from the others only where `matrices` asks for it) and "lr_scale": layer_decay **
    (blocks between the parameter and the encoder's output), as in BEiT, section A; 1 for everything outside the encoder.
    """
    inside = {id(p): name for name, p in encoder.named_parameters()}
    groups: dict[tuple[bool, float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if id(parameter) in inside:
            scale = layer_decay ** (encoder.depth + 1 - encoder.layer_of(inside[id(parameter)]))
        decay = decays(name, parameter, rule)
        matrix = matrices and parameter.ndim == 2 and id(parameter) in inside
        matrix = matrix and not name.endswith("relative_position_bias_table")
        fresh: dict[str, Any] = {"params": [], "names": [], "decays": decay, "lr_scale": scale, "matrices": matrix}
        group = groups.setdefault((decay, scale, matrix), {**fresh, "weight_decay": 0.0})
        group["params"].append(part(parameter))
        group["names"].append(name)
    return list(groups.values())
