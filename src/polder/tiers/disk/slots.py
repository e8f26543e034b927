"""The slots of the disk tier, as the scheduler counts them.

A slot stands for room for one page on every rank. On which disk a page lies is decided by the workers (memory.py).
At the start some slots hold pages of an earlier run, the **inventory**. Their blocks get an entry in the index only
when a request asks for them (`claim`), so a million of them cost no Python objects. Unclaimed pages are the first to
make room.

    free -> take -> taken -> give -> free          unclaimed -> claim -> taken
    taken, reported lost -> `lost` -> free         unclaimed -> take -> taken      (its page is forgotten)
    free or unclaimed -> retired, while the disks have less room than there are slots, and back

free + taken + unclaimed + retired = capacity.
"""

from __future__ import annotations

import numpy as np

from polder.arrays import IntArray
from polder.diskstore.keys import Keys, KeyTable, distinct
from polder.errors import ConfigError, IntegrityError
from polder.tiers.slots import Slots, SlotStats

__all__ = ["DiskSlots"]

_FREE, _TAKEN, _UNCLAIMED, _RETIRED = range(4)
_LOST_AT_ONCE = 4096
"""A disk that dies loses many pages at once. `lost` returns at most so many in one step."""


class DiskSlots(Slots):
    """See the module's docstring. Not thread-safe: it belongs to the scheduler's thread."""

    behind = True

    def __init__(self, *, name: str, capacity: int, slot_bytes: int, inventory: Keys | None = None) -> None:
        """`slot_bytes`: what a block takes on the disks of all ranks together. `inventory`: [n, 2] distinct keys of
        pages that every rank has, the most recently used first; slot i holds row i. Rows beyond `capacity` are ignored.

        Raises ConfigError when a key comes twice.
        """
        self.name, self.capacity, self.slot_bytes = name, capacity, slot_bytes
        keys = np.empty((0, 2), dtype=np.uint64) if inventory is None else inventory[:capacity]
        if len(distinct(keys)) < len(keys):
            raise ConfigError(f"{name}: a key comes twice in the inventory")
        count = len(keys)
        self._keys = keys.astype(np.uint64)
        self._table = KeyTable(self._keys)
        self._table.add(np.arange(count))
        self._state = np.full(capacity, _FREE, dtype=np.uint8)
        self._state[:count] = _UNCLAIMED
        self._last = count  # all unclaimed slots are below this one
        self._stack = np.arange(capacity - 1, count - 1, -1, dtype=np.int64)  # a stack: the last one is taken first
        self._stack = np.concatenate((self._stack, np.zeros(count, dtype=np.int64)))
        self._free = capacity - count
        self._taken = self._retired = 0
        self._room = capacity
        self._lost: dict[int, None] = {}  # taken slots whose pages are lost, until `lost` has returned them
        self._lost_ever = 0

    # ------------------------------------------------------------------ what a former run left

    @property
    def unclaimed(self) -> int:
        """The number of pages of the inventory that nobody has asked for."""
        return self._table.count

    def claim(self, keys: Keys) -> IntArray:
        """[n] the slots of these keys ([n, 2]), -1 where the inventory has none. They are taken now. A key that comes
        twice is found once."""
        slots = np.full(len(keys), -1, dtype=np.int64)
        if self._table.count and len(keys):
            rows = distinct(keys)
            slots[rows] = self._table.find(keys[rows])
            found = slots[slots >= 0]
            if len(found):
                self._table.remove(found)
                self._state[found] = _TAKEN
                self._taken += len(found)
        return slots

    def forget_unclaimed(self) -> None:
        """Frees the unclaimed slots: their pages are not valid any more."""
        self._give_up(self._table.count)

    # ------------------------------------------------------------------ Slots

    def take(self, count: int) -> IntArray:
        if count > self._free:
            self._give_up(count - self._free)
        count = min(count, self._free)
        taken = self._stack[self._free - count : self._free][::-1].copy()
        self._free -= count
        self._state[taken] = _TAKEN
        self._taken += count
        return taken

    def give(self, slots: IntArray) -> None:
        if (self._state[slots] != _TAKEN).any():
            raise IntegrityError(f"{self.name}: a slot is given back that was not taken")
        if self._lost:
            for slot in slots.tolist():
                self._lost.pop(slot, None)
        self._taken -= len(slots)
        self._put_back(slots)

    def lost(self) -> IntArray:
        some = list(self._lost)[:_LOST_AT_ONCE]
        lost = np.array(some, dtype=np.int64)
        if len(lost):
            self.give(lost)
        return lost

    def stats(self) -> SlotStats:
        return SlotStats(
            slots=self.capacity - self._retired, used=self._taken, slot_bytes=self.slot_bytes, lost=self._lost_ever
        )

    def check_integrity(self) -> None:
        """Raises IntegrityError unless free + taken + unclaimed + retired = capacity, by the books and by the slots'
        states."""
        counts = np.bincount(self._state, minlength=4).tolist()
        booked = [self._free, self._taken, self._table.count, self._retired]
        if counts != booked or sum(booked) != self.capacity:
            raise IntegrityError(
                f"{self.name}: booked as free, taken, unclaimed, retired {booked}, but {counts} of {self.capacity}"
            )
        free = self._stack[: self._free]
        if len(np.unique(free)) != len(free) or (self._state[free] != _FREE).any():
            raise IntegrityError(f"{self.name}: a slot on the stack is not free, or there twice")
        unclaimed = np.flatnonzero(self._state == _UNCLAIMED)
        if not np.array_equal(self._table.find(self._keys[unclaimed]), unclaimed):
            raise IntegrityError(f"{self.name}: an unclaimed slot is not found by its key")
        if any(self._state[slot] != _TAKEN for slot in self._lost):
            raise IntegrityError(f"{self.name}: a slot is lost that was not taken")

    def close(self) -> None:
        """The pages stay on the disks for the next run."""

    # ------------------------------------------------------------------ the workers report

    def report_lost(self, slots: IntArray) -> None:
        """A rank has lost the pages in these slots: they were evicted, or their disk died."""
        slots = np.unique(slots)
        unclaimed = slots[self._state[slots] == _UNCLAIMED]
        if len(unclaimed):
            self._table.remove(unclaimed)
            self._put_back(unclaimed)
        taken = slots[self._state[slots] == _TAKEN].tolist()
        self._lost_ever += len(unclaimed) + sum(slot not in self._lost for slot in taken)
        self._lost.update(dict.fromkeys(taken))

    def set_room(self, blocks: int) -> None:
        """Sets the number of pages that the rank with the least room can hold. Slots beyond that are retired as they
        become free."""
        self._room = max(0, min(blocks, self.capacity))
        self._give_up(self.overcommitted - self._free)
        count = min(self.overcommitted, self._free)
        self._free -= count
        self._state[self._stack[self._free : self._free + count]] = _RETIRED
        self._retired += count
        spare = self._room + self._retired - self.capacity
        if spare > 0:
            back = np.flatnonzero(self._state == _RETIRED)[:spare]
            self._retired -= len(back)
            self._push(back)

    @property
    def losing(self) -> bool:
        return bool(self._lost)

    @property
    def overcommitted(self) -> int:
        return max(0, self.capacity - self._room - self._retired)

    # ------------------------------------------------------------------

    def _put_back(self, slots: IntArray) -> None:
        count = min(len(slots), self.overcommitted)
        self._state[slots[:count]] = _RETIRED
        self._retired += count
        self._push(slots[count:])

    def _push(self, slots: IntArray) -> None:
        self._state[slots] = _FREE
        self._stack[self._free : self._free + len(slots)] = slots[::-1]
        self._free += len(slots)

    def _give_up(self, count: int) -> None:
        """Gives up pages of the inventory, the least recently used first."""
        while count > 0 and self._table.count:
            first = max(0, self._last - max(count, 1024))
            slots = (first + np.flatnonzero(self._state[first : self._last] == _UNCLAIMED))[-count:]
            # No slot from the first one given up on is unclaimed any more.
            self._last = int(slots[0]) if len(slots) == count else first
            if len(slots):
                self._table.remove(slots)
                self._put_back(slots)
                count -= len(slots)
