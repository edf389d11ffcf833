"""Exact nearest neighbours by cosine in bounded memory, and their votes. Shapes: Q queries, N rows of the bank, D
channels, K neighbours, C classes. A tile is a (q, n) block of the similarities; only one tile is in memory at a time. M
of its elements may be among the best."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import rounded_products
from .products import exact

TILE = (4096, 4096)  # rows of queries and of the bank in one tile: 64 MiB of similarities
CPU_TILE = (512, 8192)  # 16 MiB, which stay in the cache between the product and the search: 5 % faster (AMD EPYC)
GROUP = 16  # columns of a tile with a common maximum, so that most of them are never compared one by one
FEW = 1 / 32  # share of a tile's elements above which the float32 product of all is faster than products of single ones
FEWEST = 128  # rows of the bank per neighbour above which rounded products save time
CHUNK = 2**18  # values of rows that are multiplied one by one at a time: they stay in the cache
Vote = Literal["softmax", "cosine", "uniform"]


@torch.no_grad()
@exact()
def nearest(
    queries: Tensor | np.ndarray,
    bank: Tensor | np.ndarray,
    k: int,
    *,
    exclude_self: bool = False,
    device: torch.device | str | None = None,
    tile: tuple[int, int] | None = None,
    rounded: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` (N, D) most similar to each of `queries` (Q, D): similarity (Q, K) float32, index (Q, K)
    int64.

    Similarity is the cosine in float32, sorted from high to low. Among equal ones the lower index comes first, so the
    order of copies of an image is deterministic. K is k, or the number of available rows if that is less.
    `exclude_self`: the queries are the bank itself, and no row is its own neighbour (leave-one-out). Arrays may be
    memory-mapped; one chunk at a time is moved to `device` (default: the queries'). Raises ValueError for a bank
    without available rows, k < 1, unequal widths, or a value that is not finite.

    The search is exact and costs little more than the matrix product: the maxima of groups of columns are compared with
    the k-th best similarity so far, and only groups above it are searched. `rounded` (default: on CPUs with bfloat16
    products, if k is small compared with N) computes that product in bfloat16. It then computes in float32 only those
    elements that, by a bound on the error, may be among the best: the same neighbours in less than half the time.
    """
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} and bank {tuple(bank.shape)} must be (Q, D) and (N, D)")
    if exclude_self and queries.shape[0] != bank.shape[0]:
        raise ValueError("exclude_self needs the bank itself as queries")
    if k < 1 or bank.shape[0] - exclude_self < 1:
        raise ValueError(f"no {k} neighbours to find among {bank.shape[0] - exclude_self} rows")
    where = torch.device(device) if device is not None else queries.device if isinstance(queries, Tensor) else "cpu"
    on_cpu = torch.device(where).type == "cpu"
    tile = tile or (CPU_TILE if on_cpu else TILE)
    k = min(k, bank.shape[0] - exclude_self)
    best = torch.full((queries.shape[0], k), -torch.inf, device=where)
    index = torch.zeros((queries.shape[0], k), dtype=torch.int64, device=where)
    area = min(tile[0], len(best)) * min(tile[1], len(bank))
    buffers: dict[torch.dtype, Tensor] = {}

    def product(left: Tensor, right: Tensor, top: int, start: int) -> Tensor:
        """A tile (q, n), in memory that the next tile of the same dtype reuses."""
        if left.dtype not in buffers:
            buffers[left.dtype] = torch.empty(area, dtype=left.dtype, device=where)
        out = buffers[left.dtype][: len(left) * len(right)].view(len(left), len(right))
        if on_cpu and left.dtype == torch.float32:  # NumPy's BLAS: faster than torch's for these shapes (AMD EPYC)
            np.matmul(left.numpy(), right.numpy().T, out=out.numpy())
        else:
            torch.mm(left, right.T, out=out)
        if exclude_self and top - len(right) < start < top + len(left):
            out.diagonal(top - start).fill_(-torch.inf)
        return out

    if rounded is None:
        rounded = on_cpu and torch.cpu._is_avx512_bf16_supported() and k * FEWEST <= len(bank)
    # Any centre is correct. The mean gives the smallest errors; of some rows, because a bank may exceed the memory.
    centre = _unit(bank[:: max(1, len(bank) // 1024)], where).mean(0)
    for start in range(0, len(bank), tile[1]):
        columns = _unit(bank[start : start + tile[1]], where)
        rounded_rows = rounded_products.rows(columns, centre) if rounded else None
        for top in range(0, len(best), tile[0]):
            unit = _unit(queries[top : top + tile[0]], where)
            top_k = best[top : top + tile[0]], index[top : top + tile[0]]
            bar = top_k[0][:, -1]
            if rounded_rows is not None:
                rounded_queries = rounded_products.queries(unit, centre)
                rough = product(rounded_queries.values, rounded_rows.values, top, start)
                known = bar - rounded_queries.base - rounded_rows.base
                if start == 0:  # no element below what k elements reach can be among the k best
                    known = rounded_products.lower_bound(_kth_bound(rough, k), rounded_queries, rounded_rows)
                place = _above(rough, rounded_products.lower_bound(known, rounded_queries, rounded_rows))
                if len(place) <= FEW * rough.numel():
                    _merge(*top_k, place, _single_products(unit, columns, place), len(columns), start)
                    continue
                if start:  # rows are too similar for bfloat16, and later rows probably too
                    rounded, rounded_rows = False, None
            similarity = product(unit, columns, top, start)
            if start == 0:
                bar = torch.nextafter(_kth_bound(similarity, k), bar)
            place = _above(similarity, bar)
            _merge(*top_k, place, similarity.view(-1)[place], len(columns), start)
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
    """Scores (Q, C) float32 of the classes among each query's first k neighbours (default: all).

    The weight of a neighbour's vote, by `kind`: "softmax": exp(similarity / temperature) (DINO, section 4.1; Wu et al.,
    2018), scaled so that each query's nearest neighbour has the weight 1; this does not change the order and keeps low
    temperatures finite. "cosine": its similarity, or 0 if that is negative. "uniform": 1.
    A class has 0 exactly where no neighbour votes for it.

    similarity, index: (Q, K) from `nearest`; bank_labels: (N,) int64 in [0, C).
    """
    k = similarity.shape[1] if k is None else k
    near = similarity[:, :k]
    match kind:
        case "softmax":
            # At a low temperature a far neighbour's weight is rounded to 0, but it has voted.
            weights = ((near - near[:, :1]) / temperature).exp().clamp_min(torch.finfo(torch.float32).tiny)
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
    if not norm.isfinite().all():  # one number per row shows it for the whole row
        raise ValueError("features to compare have values that are not finite, or too large to square")
    return loaded / norm.clamp_min(1e-12)


def _maxima(tile: Tensor) -> Tensor:
    """Maxima of groups of columns, (q, groups): group g has the columns g, g + groups, g + 2 * groups, ..."""
    q, n = tile.shape
    width = GROUP if n % GROUP == 0 else 1
    return tile.view(q, width, n // width).amax(1)


def _kth_bound(tile: Tensor, k: int) -> Tensor:
    """A value that at least k elements of each row reach, (q,) float32; -inf if a row has fewer than k groups."""
    maxima = _maxima(tile)
    if maxima.shape[1] < k:
        return torch.full((len(tile),), -torch.inf, device=tile.device)
    return maxima.topk(k, dim=1).values[:, -1].float()


def _above(tile: Tensor, bar: Tensor) -> Tensor:
    """The positions (M,) int64, in order, of a tile's (q, n) elements that exceed their row's threshold `bar` (q,)."""
    n = tile.shape[1]
    maxima = _maxima(tile)
    row, group = (maxima > bar[:, None]).nonzero(as_tuple=True)
    place = (row * n + group)[:, None] + torch.arange(0, n, maxima.shape[1], device=tile.device)
    value = tile.view(-1).index_select(0, place.view(-1)).view(place.shape)
    return place[value > bar[row, None]].sort().values


def _single_products(queries: Tensor, columns: Tensor, place: Tensor) -> Tensor:
    """The elements (M,) float32 at the given positions of queries (q, D) times columns (n, D)."""
    row, column = place // len(columns), place % len(columns)
    chunk = max(1, CHUNK // queries.shape[1])
    parts = zip(row.split(chunk), column.split(chunk), strict=True)
    # Not matrix products, so that copies of a row get the same value at every position. index_select takes an eighth of
    # the time of indexing with brackets.
    return torch.cat([queries.index_select(0, r).mul_(columns.index_select(0, c)).sum(1) for r, c in parts])


def _merge(best: Tensor, index: Tensor, place: Tensor, value: Tensor, n: int, start: int) -> None:
    """Merge elements (M,) of a tile of n columns, in the order of their positions, into the running top-k (q, K), in
    place. The tile's first column is row `start` of the bank. Tiles come in the order of the bank, so an element equal
    to the k-th best so far is not included."""
    q, k = best.shape
    row = place // n
    better = value > best[row, -1]
    row, column, value = row[better], place[better] % n, value[better]
    if not len(row):
        return
    counts = torch.bincount(row, minlength=q)
    behind = k + torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    values = torch.full((q, k + int(counts.max())), -torch.inf, device=row.device)
    columns = torch.zeros_like(values, dtype=torch.int64)
    values[:, :k], columns[:, :k] = best, index
    values[row, behind], columns[row, behind] = value, column + start  # in the bank's order, which equal elements keep
    values, order = values.sort(dim=1, descending=True, stable=True)
    best.copy_(values[:, :k])
    index.copy_(columns.gather(1, order[:, :k]))
