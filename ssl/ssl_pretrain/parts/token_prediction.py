"""How well the ids of a tokenizer are predicted, compared with what is possible without looking at the image.

Shapes: B images, M predicted patches of each, K codes.
"""

import torch
from torch import Tensor

from .. import distributed


@torch.no_grad()
def compared(logits: Tensor, ids: Tensor, each: Tensor) -> dict[str, Tensor]:
    """The terms of logits (B, M, K), ids (B, M) and cross-entropies (B, M): "accuracy", the share of patches whose id is
    predicted; "majority", what always predicting their most frequent id would give; "gain", how much lower the
    cross-entropy is than the entropy of their ids, as a share of it, at least 0. The last two are of all processes' images
    (with gradient accumulation: of a micro-batch)."""
    counts = logits.new_zeros(logits.shape[-1]).scatter_add_(0, ids.flatten(), torch.ones_like(each).flatten())
    share = distributed.mean(counts)
    share = share / share.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    gain = 1 - distributed.mean(each.mean()) / entropy.clamp_min(1e-6)
    accuracy = (logits.argmax(-1) == ids).float().mean()
    return {"accuracy": accuracy, "majority": share.max(), "gain": gain.clamp_min(0)}
