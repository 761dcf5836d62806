"""Weighted one-dimensional k-means, solved to the exact optimum by dynamic programming.

The best k clusters of sorted points are intervals, and the first point of the last interval moves right as points are
added, so each row of the table is filled by divide and conquer: O(k n log n) instead of the minutes of Lloyd's iterations
over raw samples.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
NEGLIGIBLE = 1e-13  # of all weight: less would vanish in the running sums


def optimal_codebook(points: Floats, weights: Floats, levels: int) -> Floats:
    """The `levels` centroids that minimize sum weights * (points - nearest centroid)^2.

    points: [n] ascending. weights: [n], not negative. Returns [levels] ascending; where there are fewer distinct points
    with weight than levels, the last one repeats. Without any weight, the levels are spread evenly over the points.
    """
    used = weights > NEGLIGIBLE * weights.sum()
    points, weights = points[used], weights[used]
    if len(points) == 0:
        return np.linspace(-1.0, 1.0, levels)
    if len(points) <= levels:
        return np.concatenate([points, np.full(levels - len(points), points[-1])])
    starts = _cluster_starts(points, weights, levels)
    mass = np.add.reduceat(weights, starts)
    return np.add.reduceat(weights * points, starts) / mass


def _cluster_starts(points: Floats, weights: Floats, levels: int) -> NDArray[np.int64]:
    """First point of each cluster of the optimal partition, [levels] ascending, beginning with 0."""
    count = len(points)
    sums = [np.concatenate([[0.0], np.cumsum(weights * points**power)]) for power in range(3)]

    def cost(first: NDArray[np.int64], last: NDArray[np.int64]) -> Floats:
        mass, moment, square = (total[last + 1] - total[first] for total in sums)
        return np.maximum(square - moment**2 / mass, 0.0)

    every = np.arange(count)
    best = cost(np.zeros(count, dtype=np.int64), every)
    choices = []
    for level in range(1, levels):
        best, chosen = _next_row(best, cost, level)
        choices.append(chosen)
    starts, end = [], count - 1
    for chosen in reversed(choices):
        starts.append(int(chosen[end]))
        end = starts[-1] - 1
    return np.array([0, *reversed(starts)], dtype=np.int64)


def _next_row(previous: Floats, cost, level: int) -> tuple[Floats, NDArray[np.int64]]:
    """Best cost with one more cluster for every last point, and where that cluster starts.

    All points of one depth of the recursion are solved at once: the middle of each open interval is tried against every
    start between the solutions of its neighbors.
    """
    count = len(previous)
    best = np.full(count, np.inf)
    chosen = np.full(count, level, dtype=np.int64)
    low, high = np.array([level]), np.array([count - 1])  # open intervals of last points
    start_low, start_high = np.array([level]), np.array([count - 1])  # bounds of their starts
    while len(low):
        middle = (low + high) // 2
        lengths = np.minimum(start_high, middle) - start_low + 1
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        starts = np.arange(lengths.sum()) - np.repeat(offsets - start_low, lengths)
        total = previous[starts - 1] + cost(starts, np.repeat(middle, lengths))
        best[middle] = np.minimum.reduceat(total, offsets)
        first = np.flatnonzero(total == np.repeat(best[middle], lengths))
        chosen[middle] = starts[first[np.searchsorted(first, offsets)]]
        split = chosen[middle]
        low, high, start_low, start_high = (
            np.concatenate(pair) for pair in ((low, middle + 1), (middle - 1, high), (start_low, split), (split, start_high))
        )
        open_ = low <= high
        low, high, start_low, start_high = low[open_], high[open_], start_low[open_], start_high[open_]
    return best, chosen
