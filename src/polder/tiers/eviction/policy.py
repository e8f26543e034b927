"""Eviction policies: the interface, and exact LRU. The policy that tiers use is in density.py.

A policy numbers its entries ("slots" here) from 0 to capacity - 1. It knows a block by a 64-bit key and by its depth,
the position in the prefix that it was stored with. A block is useless when a block before it in its prefix is gone, so
every policy gives up a prefix from its end.
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
    """Learns what happens to the slots, and says which to give up. Times are seconds of one monotonic clock."""

    def insert(self, slots: IntArray, keys: UintArray, depths: IntArray, now: float) -> None:
        """These blocks were stored in slots that were empty, first block of the prefix first."""

    def touch(self, slots: IntArray, now: float) -> None:
        """A request found these blocks, first block of its prefix first."""

    def missed(self, keys: UintArray, now: float) -> None:
        """A request asked for these blocks and they were absent; they may be stored next."""

    def remove(self, slots: IntArray) -> None:
        """These slots are empty now: their blocks were evicted or dropped."""

    def victims(self, count: int, pinned: BoolArray) -> IntArray:
        """Up to `count` occupied slots to give up, the worst first, without `pinned` ones ([capacity]). Changes
        nothing."""

    def admits(self, keys: UintArray, depths: IntArray, now: float) -> BoolArray:
        """[n] which of these new blocks of one prefix are worth evicting another block for. The refused ones are at the
        end."""

    def check_integrity(self) -> None:
        """Raises IntegrityError if the accounts do not balance."""


class Lru:
    """Evicts the least recently used slot; among blocks used together, the deepest. Admits every new block.

    Each use appends the slot to a log with a new stamp. A log entry whose stamp is not its slot's current one is stale.
    The log is compacted when it is full, so a use costs O(1) and the memory is 5 numbers for each slot.
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
