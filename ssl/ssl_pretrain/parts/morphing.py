"""Token morphing (Kim et al., "Morphing Tokens Draw Strong Masked Image Models", 2024): tokens that say the same are
averaged, in the teacher and in the student alike, so that noise of single tokens is no target.

Shapes: B images, N tokens, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def groups(tokens: Tensor, removed: int, rounds: int) -> Tensor:
    """Which tokens are merged: float32 (B, N, N), row i the weights of the mean that replaces token i.

    tokens: (B, N, D), of the teacher. `removed` tokens disappear into others in at most `rounds` rounds of bipartite soft
    matching (ToMe; Bolya et al., ICLR 2023, section 3.1): the tokens at even places are matched with the most similar one
    at an odd place (cosine); the most similar pairs are merged to their mean, weighted by size. A round merges at most half
    of what is left.
    """
    batch, count, _ = tokens.shape
    member = torch.eye(count, device=tokens.device).expand(
        batch, -1, -1
    )  # (B, groups, N): 1 where a token is in a group
    x = tokens.float()
    left = removed
    each = -(-removed // rounds) if rounds else 0
    while left > 0 and x.shape[1] > 1:
        merged = min(each, left, x.shape[1] // 2)
        x, member = _merge(x, member, merged)
        left -= merged
    return member.mT @ (member / member.sum(-1, keepdim=True))


def _merge(x: Tensor, member: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    """One round: tokens (B, n, D) and members (B, n, N) of n groups become n - merged."""
    unit = F.normalize(x, dim=-1)
    scores = unit[:, 0::2] @ unit[:, 1::2].mT  # (B, n_even, n_odd)
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    gone, kept = order[:, :merged], order[:, merged:].sort(-1).values
    into = partner.gather(1, gone)
    sizes = member.sum(-1, keepdim=True)

    def joined(values: Tensor) -> Tensor:
        """Values (B, n, F) of groups, those that disappear added to their partners': (B, n - merged, F)."""
        even, odd = values[:, 0::2], values[:, 1::2]
        wide = values.shape[-1]
        index = into.unsqueeze(-1).expand(-1, -1, wide)
        odd = odd.scatter_add(1, index, even.gather(1, gone.unsqueeze(-1).expand(-1, -1, wide)))
        return torch.cat([even.gather(1, kept.unsqueeze(-1).expand(-1, -1, wide)), odd], dim=1)

    total = joined(sizes)
    return joined(x * sizes) / total, joined(member)
