"""The host tier: slots in host memory that belongs to this engine, and the copies to and from it."""

from __future__ import annotations

import numpy as np

from polder.arrays import IntArray
from polder.errors import IntegrityError
from polder.tiers.jobs import Mover, Part, Pieces
from polder.tiers.slots import Slots, SlotStats

__all__ = ["HostMemory", "HostSlots"]


class HostSlots(Slots):
    """Slots in host memory that belongs to this engine until it ends."""

    permanent = True

    def __init__(self, *, name: str, size_bytes: int, slot_bytes: int) -> None:
        self.name, self.slot_bytes = name, slot_bytes
        self.capacity = size_bytes // slot_bytes if slot_bytes else 0
        self._taken = np.zeros(self.capacity, dtype=np.bool_)
        # A stack: slots used recently are in the CPU's caches, and memory that was never touched stays untouched.
        self._free = list(range(self.capacity - 1, -1, -1))

    def take(self, count: int) -> IntArray:
        count = min(count, len(self._free))
        taken = np.array(self._free[len(self._free) - count :][::-1], dtype=np.int64)
        del self._free[len(self._free) - count :]
        self._taken[taken] = True
        return taken

    def give(self, slots: IntArray) -> None:
        if not self._taken[slots].all():
            raise IntegrityError(f"{self.name}: a slot is given back that was not taken")
        self._taken[slots] = False
        self._free.extend(slots.tolist())

    def stats(self) -> SlotStats:
        return SlotStats(slots=self.capacity, used=self.capacity - len(self._free), slot_bytes=self.slot_bytes, lost=0)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless free + taken = all."""
        if len(self._free) + int(self._taken.sum()) != self.capacity or self._taken[self._free].any():
            raise IntegrityError(
                f"{self.name}: {len(self._free)} slots free, {int(self._taken.sum())} taken of {self.capacity}"
            )


class HostMemory:
    """This rank's part of the host region: slots of equal size, one after another."""

    def __init__(self, address: int, slot_bytes: int) -> None:
        self._address, self._slot_bytes = address, slot_bytes

    def store(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
        mover.copy(self._slot(part, row), block)
        return True

    def load(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
        address, _ = self._slot(part, row)[0]
        mover.copy(block, [(address, sum(size for _, size in block))])
        return True

    def finish(self, size_bytes: int, started: float) -> None:
        """Every copy has been waited for already."""

    def close(self) -> None:
        """The memory belongs to whoever mapped it."""

    def _slot(self, part: Part, row: int) -> Pieces:
        return [(self._address + int(part.slots[row]) * self._slot_bytes, self._slot_bytes)]
