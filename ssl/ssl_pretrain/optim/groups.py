"""Parameter groups for weight decay and layer decay, by the papers' rules."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from ..backbones import adapters
from ..backbones.backbone import Backbone
from ..rates import Rate

# Tokens and positions. "start" and "level": of ids by scale (`backbones.scale_stem`).
TOKENS = frozenset("cls_token mask_token reg_tokens pos_embed jumbo_token pos_quarters pool_query start level".split())


def decays(name: str, parameter: Tensor, rule: Literal["no_1d", "no_1d_tokens", "all"]) -> bool:
    """Whether weight decay applies to a parameter.

    "no_1d": to all except biases and parameters of one dimension (MAE, DINO, iBOT, I-JEPA, MSN; class and mask tokens
    and position tables do decay). "no_1d_tokens": also not to tokens and positions (BEiT, MAE's fine-tuning). "all": to
    every parameter (MoCo v3).
    """
    if rule == "all":
        return True
    if parameter.ndim <= 1 or name.endswith(".bias"):
        return False
    return rule == "no_1d" or name.rsplit(".", maxsplit=1)[-1] not in TOKENS


def parameter_groups(
    model: nn.Module,
    encoder: Backbone,
    *,
    rule: Literal["no_1d", "no_1d_tokens", "all"],
    layer_decay: float = 1.0,
    decay_blocks: int = 1,
    matrices: bool = False,
    part: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
    rates: Sequence[Rate] = (),
) -> list[dict[str, Any]]:
    """The trainable parameters of `model`, which contains `encoder`, in groups of equal weight decay and learning-rate
    scale. The groups contain `part(parameter)`: the part of each parameter that this process holds.

    Each group has "params", "names", "decays" (bool), "matrices" (bool: two-dimensional parameters of the encoder, for
    Muon; they are separate groups only with `matrices`) and "lr_scale": layer_decay ** (number of blocks between the
    parameter and the encoder's output), as in BEiT, section A; 1 outside the encoder. With `decay_blocks` that many
    consecutive blocks, counted from the first, have the same factor (ConvNeXt: Liu et al., 2022, appendix A.2: 3).
    "rates" are the rules of `rates` that fit the group's parameters.
    """
    inside = {id(p): name for name, p in encoder.named_parameters()}
    groups: dict[tuple[bool, float, bool, tuple[Rate, ...]], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if id(parameter) in inside:
            layer = encoder.layer_of(inside[id(parameter)])
            scale = layer_decay ** _groups_after(layer, encoder.depth, decay_blocks)
        decay = decays(name, parameter, rule)
        if rule != "all" and id(parameter) in inside:
            decay = decay and not any(fnmatchcase(inside[id(parameter)], pattern) for pattern in encoder.undecayed)
        matrix = matrices and parameter.ndim == 2 and id(parameter) in inside
        matrix = matrix and not name.endswith("relative_position_bias_table") and not fnmatchcase(name, adapters.NAMES)
        rules = tuple(rule for rule in rates if rule.fits(name))
        fresh: dict[str, Any] = {"params": [], "names": [], "decays": decay, "lr_scale": scale, "matrices": matrix}
        group = groups.setdefault((decay, scale, matrix, rules), {**fresh, "weight_decay": 0.0, "rates": rules})
        group["params"].append(part(parameter))
        group["names"].append(name)
    return list(groups.values())


def _groups_after(layer: int, depth: int, size: int) -> int:
    """Number of groups of `size` blocks between a layer (`Backbone.layer_of`) and the output."""
    groups = -(-depth // size)
    return 0 if layer > depth else groups + 1 - -(-layer // size)
