"""LRU in place of the entry store's own choice of hot entries (swarm/hotset.py)."""

from __future__ import annotations

import numpy as np

from polder.arrays import BoolArray, IntArray

__all__ = ["LruSet"]


class LruSet:
    """Keeps the items that were read last. A HotSet."""

    def __init__(self, sizes_bytes: IntArray, budget_bytes: int) -> None:
        self._sizes, self._budget = sizes_bytes, budget_bytes
        self._last = np.full(len(sizes_bytes), -1, dtype=np.int64)
        self._clock = 0
        self.resident: BoolArray = np.zeros(len(sizes_bytes), dtype=np.bool_)

    def step(self, activated: IntArray) -> IntArray:
        missing = activated[~self.resident[activated]]
        self._last[activated] = np.arange(self._clock, self._clock + len(activated))
        self._clock += len(activated)
        candidates = np.concatenate([np.flatnonzero(self.resident), missing])
        newest = candidates[np.argsort(-self._last[candidates], kind="stable")]
        self.resident[:] = False
        self.resident[newest[np.cumsum(self._sizes[newest]) <= self._budget]] = True
        return missing
