"""Slots of borrowed memory whose owners take single ones back whenever the test says so; and block ids of small numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polder.arrays import IntArray, UintArray
from polder.errors import IntegrityError
from polder.tiers.slots import Slots, SlotStats


def ids_of(numbers: Sequence[int]) -> UintArray:
    """[n, 2]"""
    words = np.array(numbers, dtype=np.uint64)
    return np.column_stack([words, words])


class LosingSlots(Slots):
    def __init__(self, *, name: str, capacity: int) -> None:
        self.name, self.capacity, self.slot_bytes = name, capacity, 64
        self.exists = set(range(capacity))
        self.taken: set[int] = set()
        self.unreported: list[int] = []
        self.reported = 0

    # ------------------------------------------------------------------ the owners

    def vanish(self, slot: int) -> None:
        if slot in self.exists:
            self.exists.discard(slot)
            if slot in self.taken:
                self.unreported.append(slot)

    def come_back(self, slot: int) -> None:
        if slot not in self.unreported:
            self.exists.add(slot)

    # ------------------------------------------------------------------ Slots

    def take(self, count: int) -> IntArray:
        free = sorted(self.exists - self.taken)[:count]
        self.taken |= set(free)
        return np.array(free, dtype=np.int64)

    def give(self, slots: IntArray) -> None:
        for slot in slots.tolist():
            if slot in self.exists and slot not in self.taken:
                raise IntegrityError(f"slot {slot} is given back twice")
            self.taken.discard(slot)
            if slot in self.unreported:
                self.unreported.remove(slot)

    def lost(self) -> IntArray:
        lost, self.unreported = self.unreported, []
        self.taken -= set(lost)
        self.reported += len(lost)
        return np.array(lost, dtype=np.int64)

    def stats(self) -> SlotStats:
        return SlotStats(slots=len(self.exists), used=len(self.taken), slot_bytes=self.slot_bytes, lost=self.reported)

    def check_integrity(self) -> None:
        if not self.taken <= self.exists | set(self.unreported):
            raise IntegrityError("a slot is taken that does not exist")
