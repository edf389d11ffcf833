"""The assignment problem: match rows with columns so that the sum of gains is largest. Shapes: K x K or K x L gains."""

import numpy as np


def assignment(gain: np.ndarray) -> np.ndarray:
    """The column of each row, (K,) int64, or -1 for a row without a column.

    The matching is one to one, has min(K, L) pairs, and maximises the total `gain` (K, L).

    Shortest augmenting paths (Jonker & Volgenant, 1987) in O(K^2 L): rows are added one at a time. Each is added by the
    cheapest chain of exchanges, found with Dijkstra's algorithm; prices of rows and columns keep every cost >= 0.
    """
    if gain.shape[0] > gain.shape[1]:
        rows = assignment(gain.T)
        result = np.full(gain.shape[0], -1)
        result[rows] = np.arange(len(rows))
        return result
    cost = -gain.astype(np.float64)
    k, width = cost.shape
    row_price, column_price = np.zeros(k), np.zeros(width)
    holder = np.full(width, -1)  # the row of each column
    for new in range(k):
        distance = np.full(width, np.inf)
        before = np.full(width, -1)  # the previous column on the cheapest chain; -1: the chain starts with `new`
        done = np.zeros(width, bool)
        row, column, length = new, -1, 0.0
        while row != -1:
            through = length + cost[row] - row_price[row] - column_price
            shorter = ~done & (through < distance)
            distance[shorter], before[shorter] = through[shorter], column
            column = int(np.where(done, np.inf, distance).argmin())
            length = distance[column]
            done[column] = True
            row = int(holder[column])
        left = length - distance[done]  # how much cheaper the chain reached each column
        occupied = holder[done] != -1
        row_price[new] += length
        row_price[holder[done][occupied]] += left[occupied]
        column_price[done] -= left
        while column != -1:  # exchange along the chain, from its end
            holder[column] = new if before[column] == -1 else holder[before[column]]
            column = int(before[column])
    result = np.full(k, -1)
    result[holder[holder != -1]] = np.flatnonzero(holder != -1)
    return result
