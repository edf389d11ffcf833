"""A codebook without gradients: k-means start, exponential moving averages, and revival of dead codes.

Every function has static shapes, draws from a generator that all processes share, and gives the same result on all of them.
Shapes: n vectors of d channels, K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones.nearest_codes import CHUNK

EPS = 1e-5  # of the smoothed counts (van den Oord et al., 2017, appendix A.1, as released)
ITERATIONS = 10  # of k-means


def sums(z: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How many vectors (n, d) each of `size` codes has, (K,), and their sums (K, d), for ids (n,). By products of
    matrices, whose result depends on no order of threads."""
    codes = torch.arange(size, device=z.device)
    counts, total = z.new_zeros(size), z.new_zeros(size, z.shape[1])
    with torch.autocast(z.device.type, enabled=False):
        for rows, own in zip(z.split(CHUNK), ids.split(CHUNK), strict=True):
            member = (own[:, None] == codes).to(z.dtype)
            counts = counts + member.sum(0)
            total = total + member.T @ rows
    return counts, total


def kmeans(z: Tensor, size: int, generator: torch.Generator, *, unit: bool) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations from random vectors: centres (K, d), and how many of the vectors (n, d) each one has, (K,).

    unit: centres have length 1 (spherical k-means, for unit vectors). A centre without vectors stays where it is.
    With fewer vectors than codes, several codes begin as the same vector; the first of them gets its vectors.
    """
    order = torch.randperm(len(z), generator=generator, device=z.device)
    centres = z.index_select(0, order[torch.arange(size, device=z.device) % len(z)])
    counts = z.new_zeros(size)
    for _ in range(ITERATIONS):
        half = -0.5 * centres.square().sum(1)
        ids = torch.cat([torch.addmm(half, rows, centres.T).argmax(1) for rows in z.split(CHUNK)])
        counts, total = sums(z, ids, size)
        means = F.normalize(total, dim=1) if unit else total / counts.clamp_min(1)[:, None]
        centres = torch.where((counts > 0)[:, None], means, centres)
    return centres, counts


def averaged(counts: Tensor, total: Tensor) -> Tensor:
    """The codes (K, d) of moving averages of counts (K,) and sums (K, d): sum over smoothed count."""
    everything = counts.sum()
    smoothed = (counts + EPS) / (everything + len(counts) * EPS) * everything
    return total / smoothed[:, None]


def revived(
    counts: Tensor, total: Tensor, candidates: Tensor, below: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Counts (K,) and sums (K, d) in which codes with less than `below` of the mean count are replaced by random ones of
    the candidates (n, d). They get that least count. Replacing the code alone would not do: the next update would
    compute it from its old count and sum again."""
    least = below * counts.mean()
    order = torch.randperm(len(candidates), generator=generator, device=candidates.device)
    fresh = candidates.index_select(0, order[torch.arange(len(counts), device=counts.device) % len(candidates)])
    dead = counts < least
    return torch.where(dead, least, counts), torch.where(dead[:, None], fresh * least, total)
