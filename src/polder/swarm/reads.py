"""The reads of one step: which slots of which disks, and the requests that they make together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from polder.arrays import IntArray

__all__ = ["ReadPlan"]


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """n wanted pages in the order of disks and slots, and the runs of slots that are read with one request each."""

    pages: IntArray
    """[n]"""
    disks: IntArray
    """[n]"""
    slots: IntArray
    """[n]"""
    run_starts: IntArray
    """[runs + 1] run r reads `pages[run_starts[r] : run_starts[r + 1]]`."""
    lost: IntArray
    """Wanted pages of which no disk in use has a copy."""

    @classmethod
    def of(cls, pages: IntArray, disks: IntArray, slots: IntArray, *, lost: IntArray, gap_slots: int = 0) -> ReadPlan:
        """Plans reads of [n] pages in any order, given where each is read. `gap_slots`: see `merged`."""
        order = np.lexsort((slots, disks))
        pages, disks, slots = pages[order], disks[order], slots[order]
        return cls(pages=pages, disks=disks, slots=slots, run_starts=_cut(disks, slots, gap_slots), lost=lost)

    @property
    def runs(self) -> int:
        return len(self.run_starts) - 1

    @property
    def run_disks(self) -> IntArray:
        return self.disks[self.run_starts[:-1]]

    @property
    def run_slots(self) -> IntArray:
        """[runs] the number of slots from the first to the last of each run, gaps included."""
        return self.slots[self.run_starts[1:] - 1] - self.slots[self.run_starts[:-1]] + 1

    def gaps(self) -> tuple[IntArray, IntArray]:
        """The disks and slots of unwanted pages within runs, [m] each."""
        inside = np.ones(len(self.slots), dtype=np.bool_)
        inside[self.run_starts[:-1]] = False
        after = np.flatnonzero(inside)
        widths = self.slots[after] - self.slots[after - 1] - 1
        at = np.arange(int(widths.sum())) - np.repeat(np.cumsum(widths) - widths, widths)
        return np.repeat(self.disks[after], widths), np.repeat(self.slots[after - 1] + 1, widths) + at

    def merged(self, gap_slots: int) -> ReadPlan:
        """The same reads in other runs: up to `gap_slots` unwanted slots between two wanted ones are read, too."""
        return replace(self, run_starts=_cut(self.disks, self.slots, gap_slots))


def _cut(disks: IntArray, slots: IntArray, gap_slots: int) -> IntArray:
    """[runs + 1] where runs start, and the end of the last one."""
    if not len(slots):
        return np.zeros(1, dtype=np.int64)
    apart = (np.diff(disks) != 0) | (np.diff(slots) > gap_slots + 1)
    return np.concatenate(([0], np.flatnonzero(apart) + 1, [len(slots)]))
