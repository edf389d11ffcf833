"""Gradients of a whole-batch loss through micro-batches, with the memory of one of them.

After Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (RepL4NLP 2021), section 3:
embed every micro-batch without gradients, take the loss of all embeddings and its gradient at each, then embed again,
with gradients, and pass these on. It costs one more forward of the encoder.
"""

from contextlib import AbstractContextManager

import torch
from torch import nn

from .. import distributed
from ..pretext import Batch, Losses, Step, WholeBatchMethod


def backward(
    method: WholeBatchMethod,
    parts: list[tuple[Batch, Step]],
    autocast: AbstractContextManager[object],
    parameters: list[nn.Parameter],
) -> Losses:
    """The loss of all micro-batches `parts` together; its gradients, averaged over the processes, are added to those of
    `parameters`.

    The result and the gradients are those of `method` on one batch of all rows, as long as `embed` treats every image by
    itself.
    """
    with torch.no_grad(), autocast:
        noises = [step.restarted() for _, step in parts]
        seen = [method.embed(batch, noise) for (batch, _), noise in zip(parts, noises, strict=True)]
    whole = {name: torch.cat([part[name] for part in seen]) for name in seen[0]}
    leaves = {name: rows.requires_grad_() for name, rows in whole.items() if rows.is_floating_point()}
    del seen
    places = torch.cat([torch.arange(r.start, r.stop) for r in map(_rows, parts)])
    with autocast:
        losses = method.loss(whole, noises[-1].with_rows(places))
    losses.total.backward()
    start = 0
    for batch, step in parts:
        stop = start + len(batch.index)
        with autocast:
            again = method.embed(batch, step.restarted())
        pairs = [(again[n], leaf.grad[start:stop]) for n, leaf in leaves.items() if leaf.grad is not None]
        pairs = [(rows, grad) for rows, grad in pairs if rows.requires_grad]  # a teacher's rows do not
        torch.autograd.backward([rows for rows, _ in pairs], [grad for _, grad in pairs])
        start = stop
    distributed.mean_gradients_(parameters)
    return losses


def _rows(part: tuple[Batch, Step]) -> slice:
    rows = part[1].rows
    assert isinstance(rows, slice)
    return rows
