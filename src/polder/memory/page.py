"""A page: a fixed number of bytes of physical memory on one device. Numpy helpers that merge runs of pages.

The ledger knows a page by its number (0, 1, 2, ... on its device), a process that maps it by its `Handle`. A page may
be mapped at several addresses and in several processes at once ("virtual aliasing" in the Oneiros paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["PAGE_BYTES", "Handle", "Indices", "Mask", "as_indices", "contiguous", "runs"]

PAGE_BYTES = 2 << 20
"""2 MiB: the least that the CUDA driver maps (granularity of pinned device memory), and a huge page of x86 and Arm."""

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Handle(NamedTuple):
    """The physical memory of one page, for the backend that made or adopted it. It has no meaning in other processes.

    CPU: `key` is the backend's descriptor of the segment file, `offset` the page's first byte in it. CUDA: `key` is the
    driver's CUmemGenericAllocationHandle, `offset` is 0.
    """

    key: int
    offset: int = 0


def as_indices(values: Sequence[int] | npt.NDArray[np.integer]) -> Indices:
    """One-dimensional int64 array of `values`; no copy when it is one already."""
    return np.asarray(values, dtype=np.int64).reshape(-1)


def runs(indices: Indices) -> list[tuple[int, int]]:
    """Maximal runs of successive numbers, in order, as (first, length): [4, 5, 6, 2, 9, 10] -> [(4, 3), (2, 1), (9,
    2)].

    The lengths add up to `len(indices)`.
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
