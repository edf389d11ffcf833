"""Low-rank updates of an encoder's attention matrices (LoRA: Hu et al., "LoRA: Low-Rank Adaptation of Large Language
Models", ICLR 2022), trained in the place of the weights, and merged into them at the end.

Shapes: a weight is (E, D), r is the rank of its update.
"""

import math
import re
from collections.abc import Iterable
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import UserError
from .backbone import Backbone

NAMES = "*.parametrizations.weight.0.*"  # pattern of the names of all updates
ORIGINAL = "parametrizations.weight.original"  # end of the name of a weight that has an update
TOLERANCE = 1e-5  # largest difference of merged features, over their largest value


@final
class LowRank(nn.Module):
    """A weight (E, D) plus alpha / r * up @ down (Hu et al., section 4.1); `up` (E, r) starts at zero, `down` (r, D) is
    uniform as a linear layer's weight.

    Raises UserError for a rank above the weight's own.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        outside, inside = weight.shape
        if rank > min(weight.shape):
            raise UserError(f"--lora-rank is {rank}, and the attention matrices are {outside} x {inside}")
        start = (2 * torch.rand(rank, inside, generator=generator, device="cpu") - 1) / math.sqrt(inside)
        self.down = nn.Parameter(start.to(weight.device))
        self.up = nn.Parameter(torch.zeros(outside, rank, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight (E, D)."""
        return weight + self.scale * (self.up @ self.down)


def attention_matrices(backbone: Backbone) -> list[str]:
    """Names of the weights of all linear layers in attention, without a Swin's MLP of the biases; empty for an encoder
    without attention."""
    linear = {name for name, part in backbone.named_modules() if isinstance(part, nn.Linear)}
    return [
        name
        for name, _ in backbone.named_parameters()
        if re.search(r"(^|\.)(attn|attention|self_attn)\.", name)
        and name.endswith(".weight")
        and name.removesuffix(".weight") in linear
        and ".cpb_mlp." not in name
    ]


def add(backbone: Backbone, names: Iterable[str], rank: int, alpha: float, generator: torch.Generator) -> None:
    """Give the weights of these names low-rank updates, drawn in the order of the names. The weights get no gradient."""
    for name in sorted(names):
        part = backbone.get_submodule(name.removesuffix(".weight"))
        weight = cast(Tensor, part.weight)
        weight.requires_grad_(False)
        parametrize.register_parametrization(part, "weight", LowRank(weight.detach(), rank, alpha, generator))


def train_updates(backbone: Backbone, rank: int, alpha: float, unfrozen: int, generator: torch.Generator) -> str:
    """Freeze the encoder except for low-rank updates of its attention matrices. Returns what is trained, in words.

    unfrozen: number of last blocks that are trained as they are, without updates; if above 0, so are all norms (ExPLoRA:
    Khanna et al., "ExPLoRA: Parameter-Efficient Extended Pre-Training", 2024).
    Raises UserError for an encoder without attention matrices, and for a rank or a number of blocks that is too large.
    """
    kind, first = type(backbone).__name__, backbone.depth - unfrozen
    if not attention_matrices(backbone):
        raise UserError(f"--adapters lora: {kind} has no attention matrices; a ViT (--encoder vit_small) has")
    if first < 0:
        raise UserError(f"--adapters-unfreeze is {unfrozen}; the encoder has {backbone.depth} blocks")
    total = sum(parameter.numel() for parameter in backbone.parameters())
    norms = {id(p) for part in backbone.modules() if "Norm" in type(part).__name__ for p in part.parameters()}
    for name, parameter in backbone.named_parameters():
        of_last = backbone.layer_of(name) > first
        parameter.requires_grad_(unfrozen > 0 and (of_last or id(parameter) in norms))
    names = [name for name in attention_matrices(backbone) if backbone.layer_of(name) <= first]
    add(backbone, names, rank, alpha, generator)
    trained = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad)
    beside = f", and the last {unfrozen} blocks and all norms" if unfrozen else ""
    return (
        f"LoRA of rank {rank} on {len(names)} matrices{beside}: {trained:,} of the encoder's values are trained, its own "
        f"{total:,} are {'mostly ' if unfrozen else ''}frozen"
    )


def merge(backbone: nn.Module) -> None:
    """Merge the updates into the weights; parameter names are the original ones again."""
    for part in list(backbone.modules()):
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight", leave_parametrized=True)


@torch.no_grad()
def merge_into(plain: Backbone, adapted: Backbone) -> None:
    """Give `plain`, an encoder of the same architecture without updates, the merged weights of `adapted`, and prove that
    both give the same features of an image of noise.

    Raises RuntimeError if their largest difference is above TOLERANCE times the largest value.
    """
    state = adapted.state_dict(keep_vars=True)
    names = {id(value): name for name, value in state.items()}  # a wrapped model's modules have other names
    for part in adapted.modules():
        if parametrize.is_parametrized(part, "weight"):
            name = names[id(part.get_parameter(ORIGINAL))].removesuffix(ORIGINAL)
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}parametrizations.")}
            state[f"{name}weight"] = cast(Tensor, part.weight)
    plain.load_state_dict(state)
    device = next(adapted.parameters()).device
    noise = torch.randn(1, adapted.in_chans, *adapted.image_size, generator=torch.Generator().manual_seed(0)).to(device)
    modes = [(each, each.training) for each in (plain, adapted)]
    merged, own = plain.to(device).eval()(noise), adapted.eval()(noise)
    for each, training in modes:
        each.train(training)
    pairs = ((merged.patches, own.patches), (merged.pooled, own.pooled))
    off = max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs)
    if not off <= TOLERANCE:
        raise RuntimeError(
            f"the export with merged updates differs from the trained encoder by {off:.1g} of its features"
        )
