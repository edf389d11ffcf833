"""The attention of the blocks of a plain ViT of timm, computed beside the kernel that a block uses.

Shapes: B images, L tokens, D channels, d channels of a head.
"""

import functools
from typing import Any

from torch import Tensor, nn

from .attention import weights


def give_attention(model: Any, timm: Any) -> bool:
    """Let the blocks of a ViT take `attention`: None, or "weights" or "logits", with which a block returns its output and
    its attention (B, heads, L, L) in float32. False, and nothing changes, for a model with blocks of another kind.

    The block itself computes both, so it works as any block does where blocks are compiled, computed again or sharded.
    """
    theirs = timm.models.vision_transformer
    kind, attention = theirs.Block, theirs.Attention
    if any(type(block) is not kind or type(block.attn) is not attention for block in model.blocks):
        return False
    for block in model.blocks:
        block.__class__ = _attending(kind)  # it has no attributes of its own
    return True


@functools.cache
def _attending(kind: Any) -> type[nn.Module]:
    """A subclass of timm's block that takes `attention`; timm is imported when the first model is built."""

    class AttendingBlock(kind):
        """timm's block, which also gives its attention."""

        def forward(
            self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, attention: str | None = None
        ) -> Any:
            """(B, L, D) to the same shape, and with `attention` also the attention."""
            if attention is None:
                return super().forward(x, attn_mask, is_causal)
            q, k = _queries_and_keys(self.attn, self.norm1(x))
            found = weights(q, k, attn_mask, is_causal, logits=attention == "logits")
            return super().forward(x, attn_mask, is_causal), found

    return AttendingBlock


def _queries_and_keys(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, heads, L, d) of normalised tokens (B, L, D)."""
    parts = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.q_norm(parts[0]), attention.k_norm(parts[1])
