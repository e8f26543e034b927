"""Slots: places of one block each, in one tier. What a tier has to be able to do, and the tier that is plain memory.

The contract of a tier has two halves, because vLLM has two. The half here lives in the scheduler's process and decides: which
slots are there, which are gone. The other half (transfer.py) lives in every worker and moves bytes: load from slots, store into
slots. Between them travel **recipes**: arrays that say where the bytes of slots are, one row a slot, opaque to everybody else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from polder.arrays import IntArray
from polder.errors import IntegrityError

__all__ = ["HostSlots", "Recipe", "SlotStatistics", "Slots"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Where the bytes of n slots are. For one worker's rank when it is carried out; for all ranks when it travels."""

    lender: str
    """Empty for a tier that is plain memory."""
    slots: IntArray
    """[n]: numbers of the slots."""
    chunks: IntArray
    """[n, ranks, k]: the lender's chunks that make up each slot, see borrowing.py. [n, 0, 0] for plain memory."""
    epochs: IntArray
    """[n, ranks, k]: the epoch of each chunk's lot when the slot was made."""


@dataclass(frozen=True, kw_only=True)
class SlotStatistics:
    slots: int
    """That exist now."""
    used: int
    slot_bytes: int
    lost: int
    """Taken back by their owner since the start."""


class Slots(Protocol):
    """The slots of one tier, numbered 0 .. capacity - 1. Not all need to exist at a time: memory that is borrowed comes and
    goes."""

    name: str
    capacity: int
    slot_bytes: int

    def take(self, count: int) -> IntArray:
        """Up to `count` free slots; they are the caller's until `give`, or until they are among `lost`."""

    def give(self, slots: IntArray) -> None:
        """These are free again. Slots that were lost meanwhile are passed over."""

    def lost(self) -> IntArray:
        """Slots, taken and not given back, that ceased to exist since the last call. They are not the caller's any more."""

    def recipes(self, slots: IntArray) -> list[tuple[IntArray, Recipe]]:
        """Where they are: (positions in `slots`, recipe) pairs that together cover all of them."""

    def statistics(self) -> SlotStatistics: ...

    def check_integrity(self) -> None: ...

    def close(self) -> None: ...


class HostSlots:
    """Slots in memory that is this engine's until it ends: its quota of the host region."""

    def __init__(self, *, name: str, size_bytes: int, slot_bytes: int) -> None:
        self.name, self.slot_bytes = name, slot_bytes
        self.capacity = size_bytes // slot_bytes if slot_bytes else 0
        self._taken = np.zeros(self.capacity, dtype=np.bool_)
        # A stack: what was used last is in the caches, and memory that was never touched stays untouched.
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

    def lost(self) -> IntArray:
        return np.empty(0, dtype=np.int64)

    def recipes(self, slots: IntArray) -> list[tuple[IntArray, Recipe]]:
        if not len(slots):
            return []
        none = np.empty((len(slots), 0, 0), dtype=np.int64)
        return [(np.arange(len(slots)), Recipe(lender="", slots=slots, chunks=none, epochs=none))]

    def statistics(self) -> SlotStatistics:
        return SlotStatistics(
            slots=self.capacity, used=self.capacity - len(self._free), slot_bytes=self.slot_bytes, lost=0
        )

    def check_integrity(self) -> None:
        """Raises IntegrityError unless free + taken = all."""
        if len(self._free) + int(self._taken.sum()) != self.capacity or self._taken[self._free].any():
            raise IntegrityError(
                f"{self.name}: {len(self._free)} slots free, {int(self._taken.sum())} taken of {self.capacity}"
            )

    def close(self) -> None:
        """The memory is the broker's."""
