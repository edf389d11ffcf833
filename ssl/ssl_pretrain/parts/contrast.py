"""Contrastive losses over the global batch. Shapes: B images of this process, N of all processes, D channels of the
embedding; two views of each image."""

from typing import Literal

import torch
from torch import Tensor

from ..distributed import gather, rank
from .heads import unit


def contrast(
    first: Tensor,
    second: Tensor,
    temperature: float,
    kind: Literal["infonce", "dcl", "dclw"] = "infonce",
    sigma: float = 0.5,
) -> Tensor:
    """Each embedding against its other view and both views of all other images; (2 * B,) losses of this process's rows,
    the first views' before the second's.

    first, second: (B, D) of the two views, any length. With s the cosine similarity over the
    temperature and p the positive of row i:
    - "infonce" (NT-Xent: Chen et al., "A Simple Framework for Contrastive Learning", 2020, eq. 1):
      -s_ip + log sum over k != i of exp(s_ik);
    - "dcl" (Yeh et al., "Decoupled Contrastive Learning", 2022, eq. 6): the sum leaves out k = p too;
    - "dclw" (there, eq. 7): as dcl with -w_i s_ip, w_i = 2 - exp(c_i / sigma) / mean exp(c / sigma), c the cosine
      similarities of all N positives.
    """
    mine = torch.stack([unit(first), unit(second)])  # (2, B, D)
    everyone = gather(mine.transpose(0, 1)).transpose(0, 1)  # (2, N, D)
    n, b = everyone.shape[1], mine.shape[1]
    with torch.autocast(mine.device.type, enabled=False):
        scores = mine.flatten(0, 1) @ everyone.flatten(0, 1).T / temperature  # (2B, 2N)
    row = torch.arange(b, device=scores.device) + rank() * b
    own = torch.cat([row, row + n])
    other = torch.cat([row + n, row])
    positive = scores.gather(1, other[:, None]).squeeze(1)
    left_out = own[:, None] if kind == "infonce" else torch.stack([own, other], dim=1)
    negatives = scores.scatter(1, left_out, -torch.inf).logsumexp(1)
    if kind == "dclw":
        cosines = (everyone[0] * everyone[1]).sum(-1)  # (N,)
        weight = 2 - n * torch.softmax(cosines / sigma, dim=0)
        positive = positive * weight[row].repeat(2)
    return negatives - positive
