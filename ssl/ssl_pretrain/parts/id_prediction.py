"""How well a tokenizer's ids are predicted, beside what their frequencies alone give.

Shapes: B images, M predicted patches of each, K codes.
"""

import torch
from torch import Tensor

from .. import distributed

# What methods that predict ids say of the values of "gain" and "majority" at which nothing is learned.
NO_BETTER = "ids are predicted no better than by their frequencies; nothing is learned of the images"
ONE_CODE = "nearly all ids are the same: the tokenizer has collapsed, so there is nothing to predict"


@torch.no_grad()
def prediction_terms(counts: Tensor, accuracy: Tensor, nll: Tensor) -> dict[str, Tensor]:
    """Terms of a step, of this process's part of the batch.

    counts: (K,) float, how often each code is to be predicted. accuracy: () the share of right predictions. nll: () the
    mean cross-entropy without smoothing. Returns "accuracy"; "majority", what always predicting the most frequent id
    would give; "gain", how much lower the cross-entropy is than the entropy of the ids, as a share of it, at least 0. The
    last two are of all processes (with gradient accumulation of a method whose loss is not of the whole batch: of a
    micro-batch).
    """
    share = distributed.mean(counts)
    share = share / share.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    gain = 1 - distributed.mean(nll) / entropy.clamp_min(1e-6)
    return {"accuracy": accuracy, "majority": share.max(), "gain": gain.clamp_min(0)}


@torch.no_grad()
def compared(logits: Tensor, ids: Tensor, each: Tensor) -> dict[str, Tensor]:
    """`prediction_terms` of logits (B, M, K), ids (B, M) and cross-entropies (B, M)."""
    counts = logits.new_zeros(logits.shape[-1]).scatter_add_(0, ids.flatten(), torch.ones_like(each).flatten())
    return prediction_terms(counts, (logits.argmax(-1) == ids).float().mean(), each.mean())
