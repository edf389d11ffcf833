"""Nearest neighbours by cosine, exactly, in bounded memory, and the vote among them. Shapes: Q queries, N rows of the
bank, D channels, K neighbours, C classes; a tile is a (q, n) block of the similarities, the only part that ever
exists."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

TILE = (4096, 4096)  # rows of queries and of the bank that meet at once: 64 MiB of similarities
CPU_TILE = (512, 8192)  # 16 MiB, which stay in the cache between the product and the search: 5 % faster (AMD EPYC)
GROUP = 16  # columns of a tile that share one maximum, so that most of them are never looked at singly
Vote = Literal["softmax", "cosine", "uniform"]


@torch.no_grad()
def nearest(
    queries: Tensor | np.ndarray,
    bank: Tensor | np.ndarray,
    k: int,
    *,
    exclude_self: bool = False,
    device: torch.device | str | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` (N, D) most similar to each of `queries` (Q, D): similarity (Q, K) float32, index (Q, K)
    int64.

    Similarity is the cosine in float32, sorted from high to low; of equal ones the lower index comes first, so copies
    of an image in the bank are told apart the same way each time. K is k, or the number of rows there are to choose
    from where that is less. `exclude_self`: the queries are the bank itself, and no row is its own neighbour
    (leave-one-out). Arrays may be memory-mapped; a chunk at a time is moved to `device` (default: the queries'). Raises
    ValueError for a bank with nothing to choose from, k < 1, unequal widths, or a value that is not finite.

    The search is exact and near the cost of the matrix product: a tile's elements are compared with the k-th best
    similarity known so far through the maxima of groups of columns, and only groups that beat it are opened.
    """
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} and bank {tuple(bank.shape)} must be (Q, D) and (N, D)")
    if exclude_self and queries.shape[0] != bank.shape[0]:
        raise ValueError("exclude_self needs the bank itself as queries")
    if k < 1 or bank.shape[0] - exclude_self < 1:
        raise ValueError(f"no {k} neighbours to find among {bank.shape[0] - exclude_self} rows")
    where = torch.device(device) if device is not None else queries.device if isinstance(queries, Tensor) else "cpu"
    tile = tile or (CPU_TILE if torch.device(where).type == "cpu" else TILE)
    k = min(k, bank.shape[0] - exclude_self)
    best = torch.full((queries.shape[0], k), -torch.inf, device=where)
    index = torch.zeros((queries.shape[0], k), dtype=torch.int64, device=where)
    buffer = torch.empty(min(tile[0], len(best)) * min(tile[1], len(bank)), device=where)
    for start in range(0, len(bank), tile[1]):
        columns = _unit(bank[start : start + tile[1]], where)
        for top in range(0, len(best), tile[0]):
            rows = slice(top, top + tile[0])
            unit = _unit(queries[rows], where)
            similarity = buffer[: len(unit) * len(columns)].view(len(unit), len(columns))
            if similarity.device.type == "cpu":  # NumPy's BLAS: a tenth faster than torch's for these shapes (AMD EPYC)
                np.matmul(unit.numpy(), columns.numpy().T, out=similarity.numpy())
            else:
                torch.mm(unit, columns.T, out=similarity)
            if exclude_self and top - len(columns) < start < top + len(unit):
                similarity.diagonal(top - start).fill_(-torch.inf)
            _merge(best[rows], index[rows], similarity, start)
    return best, index


def vote(
    similarity: Tensor,
    index: Tensor,
    bank_labels: Tensor,
    classes: int,
    temperature: float,
    k: int | None = None,
    kind: Vote = "softmax",
) -> Tensor:
    """Scores (Q, C) float32 of the classes among each query's first k neighbours (default: all). A neighbour's vote
    weighs, by `kind`: "softmax", exp(similarity / temperature) (DINO, section 4.1; Wu et al., 2018), a row scaled so that
    the vote of its nearest weighs 1, which changes no order and keeps low temperatures finite; "cosine", its similarity,
    or nothing where that is negative; "uniform", 1.

    similarity, index: (Q, K) as `nearest` gives them; bank_labels: (N,) int64 in [0, C).
    """
    k = similarity.shape[1] if k is None else k
    near = similarity[:, :k]
    match kind:
        case "softmax":
            weights = ((near - near[:, :1]) / temperature).exp()
        case "cosine":
            weights = near.clamp_min(0)
        case "uniform":
            weights = torch.ones_like(near)
    scores = torch.zeros(len(similarity), classes, device=similarity.device)
    return scores.scatter_add_(1, bank_labels.to(index.device)[index[:, :k]], weights)


def _unit(rows: Tensor | np.ndarray, device: torch.device | str) -> Tensor:
    """Rows (n, D) as unit vectors, float32, on the device; a row of zeros stays zero."""
    loaded = rows if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows, np.float32))
    loaded = loaded.to(device, torch.float32)
    norm = torch.linalg.vector_norm(loaded, dim=1, keepdim=True)
    if not norm.isfinite().all():  # one number a row tells it of all of them
        raise ValueError("features to compare hold values that are not finite, or too large to square")
    return loaded / norm.clamp_min(1e-12)


def _merge(best: Tensor, index: Tensor, similarity: Tensor, start: int) -> None:
    """Let a tile's similarities (q, n), whose first column is row `start` of the bank, into the running top-k (q, K),
    in place. Tiles come in the order of the bank, so an element equal to the k-th best so far has lost already."""
    q, n = similarity.shape
    k = best.shape[1]
    width = GROUP if n % GROUP == 0 else 1
    groups = n // width  # group g holds columns g, g + groups, g + 2 * groups, ...
    maxima = similarity.view(q, width, groups).amax(1)
    bar = best[:, -1]
    if start == 0 and groups >= k:
        # k columns reach the k-th highest maximum, so nothing below it can be among the k best.
        bound = maxima.topk(k, dim=1).values[:, -1]
        bar = torch.nextafter(bound, bound.new_tensor(-torch.inf))

    row, group = (maxima > bar[:, None]).nonzero(as_tuple=True)
    place = (row * n + group)[:, None] + torch.arange(0, n, groups, device=row.device)
    value = similarity.view(-1)[place]
    chosen = value > bar[row, None]
    place, order = place[chosen].sort()  # by row, then by column: equal values keep the order of the bank
    value = value[chosen][order]
    if not len(place):
        return
    row, column = place // n, place % n

    counts = torch.bincount(row, minlength=q)
    behind = k + torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    values = torch.full((q, k + int(counts.max())), -torch.inf, device=row.device)
    columns = torch.zeros_like(values, dtype=torch.int64)
    values[:, :k], columns[:, :k] = best, index
    values[row, behind], columns[row, behind] = value, column + start
    values, order = values.sort(dim=1, descending=True, stable=True)
    best.copy_(values[:, :k])
    index.copy_(columns.gather(1, order[:, :k]))
