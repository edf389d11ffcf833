"""Attention: the one place where kernels plug in, and the masks that methods ask for.

Shapes: B images, h heads, L tokens (prefix tokens first, then patches), d channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al., 2017, eq. 1).

    q, k, v: (B, h, L, d) of one dtype. mask: bool, broadcastable to (B, h, L, L), True where a query (row) may see a
    key (column); every row needs one. causal: a token sees itself and earlier ones; not together with `mask`.
    Returns (B, h, L, d) of that dtype.
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        # The CPU's kernels for half precision, above all their backward, are several times slower than float32 ones
        # with the conversions to and fro (docs/design.md).
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal)
        return out.to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def prefix_mask(lengths: Tensor, patches: int, prefix_tokens: int) -> Tensor:
    """Who sees whom in prefix-causal attention (AIM: El-Nouby et al., 2024, section 3.2).

    The prefix tokens and the first `lengths` (B,) int64 of the patches see one another; every later patch sees itself
    and all before it. Returns bool (B, 1, L, L), L = prefix_tokens + patches, True where row may see column.
    """
    position = torch.arange(prefix_tokens + patches, device=lengths.device)
    earlier = position[:, None] >= position
    within = position < prefix_tokens + lengths[:, None]  # (B, L)
    return (earlier | (within[:, :, None] & within[:, None, :]))[:, None]
