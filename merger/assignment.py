"""The linear assignment problem: which of n things goes to which of n places at the least cost. Knows neither.

Shortest augmenting paths with potentials (Jonker and Volgenant 1987; Kuhn 1955 and Munkres 1957 before them), O(n^3).
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def assignment(costs: Matrix) -> list[int]:
    """For each row (place) the column (thing) that it gets, so that the sum of the costs [n, n] is least.

    The same costs give the same answer; where all are equal, everything stays. Raises ValueError where one is not
    finite.
    """
    if costs.ndim != 2 or costs.shape[0] != costs.shape[1] or not np.isfinite(costs).all():
        raise ValueError(f"costs of the shape {costs.shape} are not finite numbers in a square")
    count = len(costs)
    of_rows, of_columns = np.zeros(count), np.zeros(count + 1)  # potentials; the last column is where paths begin
    row_of = np.full(count + 1, -1)
    for row in range(count):
        row_of[count] = row
        before, end = _path(costs, of_rows, of_columns, row_of)
        while end != count:  # every column on the path gets the row of the one before it
            row_of[end] = row_of[before[end]]
            end = before[end]
    return [int(column) for column in np.argsort(row_of[:count], kind="stable")]


def _path(costs: Matrix, of_rows: Matrix, of_columns: Matrix, row_of: NDArray[np.int_]) -> tuple[NDArray[np.int_], int]:
    """The shortest path from the row of the last column to a column that is free, as the column before each, and its
    end; changes the potentials so that no reduced cost becomes negative.
    """
    count = len(costs)
    distance, before = np.full(count, np.inf), np.full(count, count)
    done = np.zeros(count + 1, np.bool_)
    column = count
    while row_of[column] >= 0:
        done[column] = True
        row = row_of[column]
        reduced = costs[row] - of_rows[row] - of_columns[:count]
        shorter = ~done[:count] & (reduced < distance)
        distance[shorter], before[shorter] = reduced[shorter], column
        left = np.where(done[:count], np.inf, distance)
        column = int(left.argmin())
        step = left[column]
        of_rows[row_of[done]] += step
        of_columns[done] -= step
        distance[~done[:count]] -= step
    return before, column


def within_groups(costs: Matrix, groups: int) -> list[int]:
    """The same where things come in groups of consecutive ones that stay together: groups are assigned, and the things
    of each within it.
    """
    size = len(costs) // groups
    if size * groups != len(costs):
        raise ValueError(f"{len(costs)} things are no {groups} groups")
    starts = range(0, len(costs), size)
    inner = [[assignment(costs[i : i + size, j : j + size]) for j in starts] for i in starts]
    sums = np.empty((groups, groups))
    for group, line in enumerate(inner):
        for other, order in enumerate(line):
            sums[group, other] = costs[group * size + np.arange(size), other * size + np.array(order)].sum()
    outer = assignment(sums)
    return [outer[group] * size + thing for group in range(groups) for thing in inner[group][outer[group]]]
