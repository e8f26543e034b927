"""Remembers blocks that a tier does not hold ("ghosts")."""

from __future__ import annotations

import math

import numpy as np

from polder.arrays import BoolArray, FloatArray, IntArray, UintArray

__all__ = ["Ghosts"]


class Ghosts:
    """A hash table of fixed size without probing: a new key replaces what is in its row.

    So it forgets at random, about once for each new key. This does not bias the estimates in reuse_times.py, which
    account for blocks that are lost from sight.
    """

    def __init__(self, rows: int) -> None:
        """`rows` is rounded up to a power of two."""
        size = 1 << max(6, math.ceil(math.log2(max(1, rows))))
        self._mask = np.uint64(size - 1)
        self.key = np.zeros(size, dtype=np.uint64)
        self.group = np.full(size, -1, dtype=np.int64)  # -1: an empty row
        self.hits = np.zeros(size, dtype=np.int64)
        self.last_s = np.zeros(size)

    def find(self, keys: UintArray) -> tuple[IntArray, BoolArray]:
        """[n] each key's row, and [n] whether the row holds that key."""
        rows = (keys & self._mask).astype(np.int64)
        return rows, (self.key[rows] == keys) & (self.group[rows] >= 0)

    def put(self, keys: UintArray, last_s: FloatArray, hits: IntArray, group: IntArray) -> None:
        rows = (keys & self._mask).astype(np.int64)
        self.key[rows], self.last_s[rows], self.hits[rows], self.group[rows] = keys, last_s, hits, group

    def drop(self, rows: IntArray) -> None:
        self.group[rows] = -1
