"""A page: a fixed number of bytes of physical memory on one device, and the numpy helpers that coalesce many of them.

A page is known by its number (0, 1, 2, ... on its device) to whoever books it, and by its `Handle` to whoever maps it. The
same page may be mapped at several addresses and in several processes at once ("virtual aliasing" in the Oneiros paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["PAGE_BYTES", "Handle", "Indices", "as_indices", "contiguous", "runs"]

PAGE_BYTES = 2 << 20
"""2 MiB: the smallest piece that the CUDA driver maps (granularity of pinned device memory), and a huge page of x86 and Arm."""

Indices = npt.NDArray[np.int64]


class Handle(NamedTuple):
    """The physical memory of one page, as the backend that made or adopted it knows it. Means nothing to other processes.

    CPU: `key` is the backend's descriptor of the segment file, `offset` the page's first byte in it.
    CUDA: `key` is the driver's CUmemGenericAllocationHandle, `offset` is 0, since a handle maps whole.
    """

    key: int
    offset: int = 0


def as_indices(values: Sequence[int] | npt.NDArray[np.integer]) -> Indices:
    """One-dimensional int64 array of `values`; no copy when it is one already."""
    return np.asarray(values, dtype=np.int64).reshape(-1)


def runs(indices: Indices) -> list[tuple[int, int]]:
    """Maximal runs of successive numbers, in order: [4, 5, 6, 2, 9, 10] -> [(4, 3), (2, 1), (9, 2)], as (first, length).

    The lengths add up to `len(indices)`, so a parallel array is walked by adding them up.
    """
    if len(indices) == 0:
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(indices) != 1) + 1))
    lengths = np.diff(starts, append=len(indices))
    return list(zip(indices[starts].tolist(), lengths.tolist(), strict=True))


def contiguous(handles: Sequence[Handle], page_bytes: int) -> list[tuple[int, int]]:
    """Maximal runs of handles that are neighbours in one segment, as (position of the first, length)."""
    if not handles:
        return []
    table = np.array(handles, dtype=np.int64)
    joined = (np.diff(table[:, 0]) == 0) & (np.diff(table[:, 1]) == page_bytes)
    starts = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    lengths = np.diff(starts, append=len(handles))
    return list(zip(starts.tolist(), lengths.tolist(), strict=True))
