"""Which tokens of a prefix make a unit: tokens whose keys no query tells apart.

The error of a logit, summed over queries q, when key i stands for key j is sum (q . (k_i - k_j))^2 =
(k_i - k_j)^T C (k_i - k_j) with C = sum q q^T. So keys are bisected after C^(1/2). This is the soft form of what
co-activation clustering does with recorded sets, and needs no records. C must be of the prefix's own queries: C of
another text is no better than token order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.sparse.compiled import compiled

__all__ = ["bisect", "query_metric"]

Floats = npt.NDArray[np.float32]

ITERATIONS = 8
"""Of the power method. The axis need not be exact: any cut that separates distant keys does."""
SAMPLE = 256
"""Rows of which the axis is found, at least, where there are so many."""
RIDGE = 1e-2
"""Part of the mean eigenvalue that directions get which no query has."""


def query_metric(moment: Floats) -> Floats:
    """C^(1/2), [d, d], of a second moment [d, d] of queries, with a ridge."""
    values, vectors = np.linalg.eigh(moment.astype(np.float64))
    values = np.maximum(values, 0.0)
    values += RIDGE * values.mean() + 1e-12
    root: Floats = ((vectors * np.sqrt(values)) @ vectors.T).astype(np.float32)
    return root


def bisect(points: Floats, size: int) -> IntArray:
    """An order of the rows of `points` [n, d] in which each run of `size` rows is a unit; n is a multiple of `size`.

    Halves the rows along their main axis, at a multiple of `size`, until units are left.
    """
    count = len(points)
    if count % size:
        raise ValueError(f"{count} rows are not whole units of {size}")
    order = np.arange(count, dtype=np.int64)
    random = np.random.default_rng(0)
    pending = [(0, count)] if count else []
    while pending:
        first, last = pending.pop()
        if last - first <= size:
            continue
        rows = points[order[first:last]]
        axis = random.standard_normal(points.shape[1], dtype=np.float32)
        _main_axis(rows, axis)
        order[first:last] = order[first:last][np.argsort(rows @ axis, kind="stable")]
        middle = first + max(1, round((last - first) / 2 / size)) * size
        pending += [(first, middle), (middle, last)]
    return order


@compiled
def _main_axis(rows: Any, vector: Any) -> None:
    """Centres the rows, and turns the random `vector` to the direction in which they differ most (power method)."""
    count, d = rows.shape
    mean = np.zeros(d, np.float32)
    for i in range(count):
        for c in range(d):
            mean[c] += rows[i, c]
    for i in range(count):
        for c in range(d):
            rows[i, c] -= mean[c] / np.float32(count)
    stride = max(1, count // SAMPLE)
    for _ in range(ITERATIONS):
        turned = np.zeros(d, np.float32)
        for i in range(0, count, stride):
            along = np.float32(0.0)
            for c in range(d):
                along += rows[i, c] * vector[c]
            for c in range(d):
                turned[c] += along * rows[i, c]
        length = np.float32(1e-12)
        for c in range(d):
            length += turned[c] * turned[c]
        length = np.sqrt(length)
        for c in range(d):
            vector[c] = turned[c] / length
