"""Which disk a new page is written to: blocks of one prefix are read together, so neighbours lie on different disks."""

from __future__ import annotations

import numpy as np

from polder.arrays import FloatArray, IntArray

__all__ = ["Striping"]

_CYCLE = 256
_CHANGED = 1.25
"""The cycle is made anew when a disk's share of the speed has changed so much."""


class Striping:
    """Deals consecutive numbers to disks in proportion to their speeds, so evenly that any run of them is balanced (smooth weighted
    round robin). Learns from no reads: what a prefix's blocks have in common is known before the first."""

    def __init__(self, speeds: FloatArray) -> None:
        """`speeds`: [disks], above 0."""
        self._weights = speeds / speeds.sum()
        self._cycle = _cycle(self._weights)

    def follow(self, speeds: FloatArray) -> None:
        """The disks were measured. Pages that are written stay where they are."""
        weights = speeds / speeds.sum()
        ratio = weights / self._weights
        if max(float(ratio.max()), float((1 / ratio).max())) > _CHANGED:
            self._weights, self._cycle = weights, _cycle(weights)

    def choose(self, stripes: IntArray, free: IntArray, sizes: IntArray) -> IntArray:
        """[n] a disk for each page, -1 where there is no room left. `free`, `sizes`: [disks] pages.

        Where the disk whose turn it is has no room, the one with the largest share of its pages free takes the page.
        """
        left = free.copy()
        disks: IntArray = self._cycle[stripes % _CYCLE]
        for disk in range(len(left)):
            mine = np.flatnonzero(disks == disk)
            disks[mine[left[disk] :]] = -1
            left[disk] -= min(len(mine), int(left[disk]))
        for row in np.flatnonzero(disks < 0).tolist():
            disk = int((left / np.maximum(sizes, 1)).argmax())
            if left[disk] <= 0:
                break
            disks[row] = disk
            left[disk] -= 1
        return disks


def _cycle(weights: FloatArray) -> IntArray:
    due, cycle = np.zeros(len(weights)), np.empty(_CYCLE, dtype=np.int64)
    for at in range(_CYCLE):
        due += weights
        cycle[at] = due.argmax()
        due[cycle[at]] -= 1.0
    return cycle
