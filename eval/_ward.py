"""Agglomerative clustering by Ward's criterion. Shapes: n rows, F floats each; memory n^2 floats."""

import numpy as np


def ward(rows: np.ndarray, k: int) -> np.ndarray:
    """Clusters (n,) int64 in [0, k) of rows (n, F), n >= k >= 1. Starting from single rows, the two clusters are joined
    whose union increases the sum of squared distances from the centres least (Ward, 1963).

    Nearest-neighbour chains (Murtagh, 1983): a chain ends in two clusters that are each other's nearest. They can be
    joined at once, because no other join can come closer to them. O(n^2 F) and n^2 floats. The n - k cheapest joins are
    the lower part of the tree. Distances are updated with the formula of Lance & Williams (1967).
    """
    n = len(rows)
    x = rows.astype(np.float64) - rows.mean(0, dtype=np.float64)
    squares = (x**2).sum(1)
    distance = np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0)
    np.fill_diagonal(distance, np.inf)
    size = np.ones(n)
    alive = np.ones(n, bool)
    joins = []
    chain: list[int] = []
    for _ in range(n - 1):
        if not chain:
            chain.append(int(alive.argmax()))
        while True:
            last = chain[-1]
            near = int(distance[last].argmin())
            # among equal ones the previous cluster of the chain; otherwise the chain could be endless
            if len(chain) > 1 and distance[last, chain[-2]] <= distance[last, near]:
                break
            chain.append(near)
        a, b = chain.pop(), chain.pop()
        joins.append((distance[a, b], a, b))
        both = size[a] + size[b]
        others = alive.copy()
        others[[a, b]] = False
        m = size[others]
        merged = (size[a] + m) * distance[a, others] + (size[b] + m) * distance[b, others] - m * distance[a, b]
        distance[b, others] = distance[others, b] = merged / (both + m)
        distance[a, :] = distance[:, a] = np.inf
        size[b], alive[a] = both, False
    parent = np.arange(n)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    joins.sort(key=lambda join: join[0])  # stable; no cluster costs less than its parts, so the parts come first
    for _, a, b in joins[: n - k]:
        parent[root(a)] = root(b)
    return np.unique([root(i) for i in range(n)], return_inverse=True)[1]
