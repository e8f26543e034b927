"""Which blocks of a full tier have to go: the contract, and exact LRU.

A tier has slots 0 .. capacity - 1; a block is known by a 64-bit key and by its depth, its position in the prefix it was stored
with. A block is useless while one before it in its prefix is gone, so every policy here gives up a prefix from its end.
`polder.tiers.density` has the policy that tiers use.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from polder.arrays import BoolArray, IntArray, UintArray
from polder.errors import IntegrityError

__all__ = [
    "EvictionPolicy",
    "Lru",
]


class EvictionPolicy(Protocol):
    """Learns what happens to the slots of one tier and says which to give up. Times are seconds of one monotonic clock."""

    def insert(self, slots: IntArray, keys: UintArray, depths: IntArray, now: float) -> None:
        """These blocks were stored in slots that were empty, first block of the prefix first."""

    def touch(self, slots: IntArray, now: float) -> None:
        """A request found these blocks, first block of its prefix first."""

    def missed(self, keys: UintArray, now: float) -> None:
        """A request asked for these blocks and they were absent; they may be stored next."""

    def remove(self, slots: IntArray) -> None:
        """These slots are empty now: evicted or dropped. What is remembered about their keys is bounded."""

    def victims(self, count: int, pinned: BoolArray) -> IntArray:
        """Up to `count` occupied slots to give up, worst first, none that is `pinned` (shape (capacity,)). Changes nothing."""

    def admits(self, keys: UintArray, depths: IntArray, now: float) -> BoolArray:
        """Which of these new blocks of one prefix are worth a victim, the tier being full. What is refused is at the end."""

    def check_integrity(self) -> None:
        """Raises IntegrityError if the books do not balance."""


class Lru:
    """Exactly the least recently used; of blocks used together the deepest first, and everything new is admitted.

    Each use of a slot appends it to a log with a new stamp; an entry whose stamp is not its slot's current one is stale. The log
    is compacted when it is full, so a use costs O(1) and the memory is 5 numbers a slot.
    """

    def __init__(self, capacity: int) -> None:
        self._stamp = np.full(capacity, -1, dtype=np.int64)  # -1: empty
        self._log_slot = np.empty(4 * capacity, dtype=np.int64)
        self._log_stamp = np.empty(4 * capacity, dtype=np.int64)
        self._head = self._tail = 0
        self._clock = 0

    def insert(self, slots: IntArray, keys: UintArray, depths: IntArray, now: float) -> None:
        self._use(slots)

    def touch(self, slots: IntArray, now: float) -> None:
        self._use(slots)

    def missed(self, keys: UintArray, now: float) -> None:
        pass

    def remove(self, slots: IntArray) -> None:
        self._stamp[slots] = -1

    def victims(self, count: int, pinned: BoolArray) -> IntArray:
        found: list[IntArray] = []
        have, at, width = 0, self._head, max(64, 2 * count)
        while have < count and at < self._tail:
            to = min(at + width, self._tail)
            slots = self._log_slot[at:to]
            live = self._stamp[slots] == self._log_stamp[at:to]
            if at == self._head and not live.any():
                self._head = to  # stale for ever
            chosen = slots[live & ~pinned[slots]][: count - have]
            found.append(chosen)
            have += len(chosen)
            at, width = to, 2 * width
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def admits(self, keys: UintArray, depths: IntArray, now: float) -> BoolArray:
        return np.ones(len(keys), dtype=np.bool_)

    def check_integrity(self) -> None:
        live = self._stamp[self._log_slot[self._head : self._tail]] == self._log_stamp[self._head : self._tail]
        if int(live.sum()) != int((self._stamp >= 0).sum()):
            raise IntegrityError(f"{int(live.sum())} live entries for {int((self._stamp >= 0).sum())} occupied slots")

    def _use(self, slots: IntArray) -> None:
        count = len(slots)
        if self._tail + count > len(self._log_slot):
            self._compact()
        # The last block is the least recent of its prefix.
        stamps = np.arange(self._clock, self._clock + count)
        self._stamp[slots[::-1]] = stamps
        self._log_slot[self._tail : self._tail + count] = slots[::-1]
        self._log_stamp[self._tail : self._tail + count] = stamps
        self._tail += count
        self._clock += count

    def _compact(self) -> None:
        slots, stamps = self._log_slot[self._head : self._tail], self._log_stamp[self._head : self._tail]
        live = self._stamp[slots] == stamps
        kept = int(live.sum())
        self._log_slot[:kept], self._log_stamp[:kept] = slots[live], stamps[live]
        self._head, self._tail = 0, kept
