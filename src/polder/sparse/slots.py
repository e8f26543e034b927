"""Which unit lies in which slot of a layer: least recently selected units make room.

All that lies in a slot is attended to, also what this step did not select: it costs no reading, and halves the distance
to dense. LRU is as good as the benefit score of the paper here.
"""

from __future__ import annotations

import numpy as np

from polder.arrays import IntArray

__all__ = ["Slots"]


class Slots:
    """The slots of one layer of one request. All are filled before the first step, and never empty again."""

    def __init__(self, units: int, count: int) -> None:
        if not 0 < count <= units:
            raise ValueError(f"{count} slots for {units} units")
        self.unit_of: IntArray = np.arange(count, dtype=np.int64)
        """[slots]"""
        self.slot_of: IntArray = np.full(units, -1, dtype=np.int64)
        """[units] -1 for one that is in no slot."""
        self.slot_of[:count] = np.arange(count)
        self._selected: IntArray = np.zeros(count, dtype=np.int64)
        self._clock = 0

    def fill(self, units: IntArray) -> None:
        """At the start: unit i of these lies in slot i."""
        self.slot_of[:] = -1
        self.unit_of[:] = units
        self.slot_of[units] = np.arange(len(units))

    def want(self, selected: IntArray) -> tuple[IntArray, IntArray]:
        """(units of `selected` that are in no slot, slots for them, in none of which lies one of `selected`).

        `selected` has at most as many units as there are slots. The units are there after `put`.
        """
        self._clock += 1
        slots = self.slot_of[selected]
        there = slots >= 0
        self._selected[slots[there]] = self._clock
        missing = selected[~there]
        oldest = np.argsort(self._selected, kind="stable")[: len(missing)]
        return missing, oldest

    def put(self, units: IntArray, slots: IntArray) -> None:
        """These units lie in these slots now. Those of a `want` that could not be read are left out: what was in their
        slots is there still."""
        self.slot_of[self.unit_of[slots]] = -1
        self.unit_of[slots], self.slot_of[units] = units, slots
        self._selected[slots] = self._clock
