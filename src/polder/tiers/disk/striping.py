"""Chooses the disk that a new page is written to. The blocks of a prefix are read together, so neighbours go to
different disks."""

from __future__ import annotations

import numpy as np

from polder.arrays import FloatArray, IntArray

__all__ = ["Striping"]

_CYCLE = 256
_CHANGED = 1.25
"""The cycle is made anew when a disk's share of the total speed has changed by this factor."""


class Striping:
    """Smooth weighted round robin: consecutive numbers are spread over the disks in proportion to their speeds, so
    evenly that every run of numbers is balanced."""

    def __init__(self, speeds: FloatArray) -> None:
        """`speeds`: [disks] above 0."""
        self._weights = speeds / speeds.sum()
        self._cycle = _cycle(self._weights)

    def follow(self, speeds: FloatArray) -> None:
        """Takes newly measured speeds. Pages that are written stay where they are."""
        weights = speeds / speeds.sum()
        ratio = weights / self._weights
        if max(float(ratio.max()), float((1 / ratio).max())) > _CHANGED:
            self._weights, self._cycle = weights, _cycle(weights)

    def choose(self, stripes: IntArray, free: IntArray, sizes: IntArray) -> IntArray:
        """[n] a disk for each page, -1 where there is no room left. `free`, `sizes`: [disks] numbers of pages.

        Where the disk whose turn it is has no room, the page goes to the disk with the largest free share.
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
