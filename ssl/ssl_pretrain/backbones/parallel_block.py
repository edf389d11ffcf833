"""Blocks of parallel attentions and MLPs (Touvron et al., "Three things everyone should know about Vision Transformers",
ECCV 2022, section 3).

Shapes: B images, L tokens, D width, T tokens of several batches, n parallel branches. Names of parameters are timm's.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .attention import Packed
from .drop_path import Kept
from .positions import Offsets

MULTIPLIER, NUMBERS = 0x9E3779, 1 << 24  # an odd number near the golden ratio of the count of float32 in [0, 1)


class ParallelBlock(nn.Module):
    """x <- x + the sum of n attentions of x, then x <- x + the sum of n MLPs of x; each with its own norm, layer scale and
    drop path. It has the parameters and operations of n blocks, and is half as deep with n = 2."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        """Takes over the parts of n ordinary blocks (`vit.Block`)."""
        super().__init__()
        self.attns = nn.ModuleList(
            nn.ModuleDict({"norm": each.norm1, "attn": each.attn, "ls": each.ls1}) for each in blocks
        )
        self.ffns = nn.ModuleList(
            nn.ModuleDict({"norm": each.norm2, "mlp": each.mlp, "ls": each.ls2}) for each in blocks
        )

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        rope: tuple[Tensor, Tensor] | None = None,
        branches: Tensor | None = None,
        packed: Packed | None = None,
        first: int | None = None,
        offsets: Offsets | Tensor | None = None,
        kept: tuple[Kept, Kept] | None = None,
        attention: Literal["weights", "logits"] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `Block.forward`, with branches (B, 1, 2 n) or (1, T, 2 n): of the attentions, then of the MLPs. The attention
        that is returned has the heads of all attentions, (B, n * heads, L, L). `kept` is not supported."""
        assert kept is None, "the ViT refuses --drop-rows with parallel branches"
        attns: Any = self.attns
        ffns: Any = self.ffns
        outputs: list[Tensor] = []
        found: list[Tensor] = []
        for part in attns:
            y = part["attn"](part["norm"](x), mask, causal, rope, packed, first, offsets, attention)
            if attention is not None:
                y, weights = y
                found.append(weights)
            outputs.append(part["ls"](y))
        if first is not None:
            if branches is not None and packed is not None:
                branches = packed.of_each(branches, first)
            x = x[:, :first] if packed is None else packed.of_each(x, first)
        count = len(attns)
        x = self._sum(x, outputs, None if branches is None else branches[..., :count])
        outputs = [part["ls"](part["mlp"](part["norm"](x))) for part in ffns]
        x = self._sum(x, outputs, None if branches is None else branches[..., count:])
        return x if attention is None else (x, torch.cat(found, dim=1))

    def _sum(self, x: Tensor, outputs: list[Tensor], factors: Tensor | None) -> Tensor:
        for i, y in enumerate(outputs):
            x = x + (y if factors is None else y * factors[..., i : i + 1])
        return x


def spread(noise: Tensor, count: int) -> Tensor:
    """Uniform noise (B, 2 * depth) of blocks with two branches as that of blocks with 2 * `count`: (B, 2 * count * depth),
    for each block the attentions' before the MLPs'.

    The first of `count` numbers is the given one, each other one the one before it under a multiplication modulo 2^24, the
    number of float32 values that noise has. Each is uniform again, and pairs of them fill the square evenly.
    """
    numbers = [(noise * NUMBERS).long()]
    for _ in range(count - 1):
        numbers.append(numbers[-1] * MULTIPLIER % NUMBERS)
    others = [each.to(noise.dtype) / NUMBERS for each in numbers[1:]]
    return torch.stack([noise, *others], dim=2).flatten(1)
