"""Entries in memory: a slot for each, in one arena of fixed size. The caller chooses which entries stay.

Not thread-safe: the caller holds the entry store's lock.
"""

from __future__ import annotations

import numpy as np

from polder.arrays import BoolArray, IntArray
from polder.diskstore.io import Arena
from polder.errors import BudgetError, IntegrityError
from polder.units import format_bytes

__all__ = ["EntryMemory"]


class EntryMemory:
    """See the module's docstring."""

    def __init__(self, entries: int, *, size_bytes: int, entry_bytes: int) -> None:
        """Raises ConfigError unless `entry_bytes` is a multiple of 4096 and one entry fits."""
        self._arena = Arena(size_bytes // entry_bytes, entry_bytes)
        self.slot_of: IntArray = np.full(entries, -1, dtype=np.int64)
        """[entries] the slot of each entry, -1 for one that is not in memory."""
        self._free = np.arange(len(self._arena.addresses))[::-1].copy()
        self._free_count = len(self._free)
        self._held: IntArray = self._free[:0]
        self._abandoned: IntArray = self._free[:0]

    @property
    def bytes(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """[slots, entry_bytes] uint8."""
        return self._arena.bytes

    @property
    def slots(self) -> int:
        return len(self._free)

    @property
    def free(self) -> int:
        """The number of free slots."""
        return self._free_count

    @property
    def present(self) -> BoolArray:
        """[entries] which entries are in memory."""
        present: BoolArray = self.slot_of >= 0
        return present

    def addresses(self, ids: IntArray) -> IntArray:
        """[n] the addresses of entries that are in memory."""
        return self._arena.addresses[self.slot_of[ids]]

    def take(self, ids: IntArray) -> None:
        """Gives slots, with undefined content, to entries that have none. Raises BudgetError when too few are free."""
        if len(ids) > self._free_count:
            size = self._arena.page_bytes
            raise BudgetError(
                f"{format_bytes(len(ids) * size)} of entries are wanted at once, {format_bytes(self._free_count * size)} are "
                f"free beside what stays: raise memory_bytes, lower hot_bytes, or read them in parts"
            )
        self._free_count -= len(ids)
        self.slot_of[ids] = self._free[self._free_count : self._free_count + len(ids)]

    def release(self, ids: IntArray) -> None:
        """Frees the slots of those of these entries that are in memory."""
        slots = self.slot_of[ids]
        self._give_back(slots[slots >= 0])
        self.slot_of[ids] = -1

    def hold_back(self, ids: IntArray) -> None:
        """Like `release`, for entries that a disk may still write to: their slots are not reused before `settle`."""
        self._held = np.concatenate([self._held, self.slot_of[ids]])
        self.slot_of[ids] = -1

    def abandon(self, ids: IntArray) -> None:
        """Like `release`, but the slots are never reused: a read failed, and it is not known when it ends."""
        slots = self.slot_of[ids]
        self._abandoned = np.concatenate([self._abandoned, slots[slots >= 0]])
        self.slot_of[ids] = -1

    def settle(self, unsettled: IntArray) -> None:
        """Frees the slots that were held back, except those at these addresses."""
        if len(self._held):
            still = np.isin(self._arena.addresses[self._held], unsettled)
            self._give_back(self._held[~still])
            self._held = self._held[still]

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every slot is free, held, abandoned, or has one entry."""
        held = np.concatenate([self.slot_of[self.slot_of >= 0], self._held, self._abandoned])
        every = np.sort(np.concatenate([held, self._free[: self._free_count]]))
        if not np.array_equal(every, np.arange(self.slots)):
            raise IntegrityError(f"{len(held)} entries and {self._free_count} free slots of {self.slots}")

    def _give_back(self, slots: IntArray) -> None:
        self._free[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)
