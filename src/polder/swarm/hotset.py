"""Which entries stay in memory: those that were read most, lately.

Each reading counts one, and all counts are halved every few steps. Entries have one size and lie on the same disks, so
this is the order of the paper's benefit score, equation (6): seconds saved for each byte of memory.

The paper adds one for each activation and subtracts one in each step in which a resident entry is idle (section 6).
When the topic changes, entries that were read often long ago then stay too long, and LRU is better (hit rate 0.54
against 0.77, on sticky clusters with a tenth in memory). Halved every step, the counts are better than both.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from polder.arrays import BoolArray, IntArray

__all__ = ["FrequentSet", "HotSet"]


class HotSet(Protocol):
    """Chooses which entries are resident, within a limit that is never exceeded."""

    resident: BoolArray
    """[entries] which entries are resident."""

    def step(self, activated: IntArray) -> IntArray:
        """One step reads these entries, each once. Updates `resident`, and returns those that were not resident."""


class FrequentSet:
    """Keeps the entries with the highest counts. One that was just read replaces others only if its count is higher."""

    def __init__(self, entries: int, limit: int, *, halflife_steps: float = 1.0) -> None:
        """`limit`: the most resident entries. `halflife_steps`: short where the same entries are read for a while, long
        where popularity is stable."""
        self._decay, self._limit = 0.5 ** (1 / halflife_steps), limit
        self._counts = np.zeros(entries)
        self.resident: BoolArray = np.zeros(entries, dtype=np.bool_)

    def step(self, activated: IntArray) -> IntArray:
        missing = activated[~self.resident[activated]]
        self._counts *= self._decay
        self._counts[activated] += 1
        candidates = np.concatenate([np.flatnonzero(self.resident), missing])
        # The sort is stable and residents come first, so among equals the resident stays.
        best = candidates[np.argsort(-self._counts[candidates], kind="stable")]
        self.resident[:] = False
        self.resident[best[: self._limit]] = True
        return missing
