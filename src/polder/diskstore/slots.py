"""The books of one disk's slots: which are free, which page is in which, which was used least recently. Arrays, one row a slot.

    free -> take -> busy -> publish -> used -> drop -> free        (evicted by `take`: used -> busy)
                      |                  |
                      +-> abandon: free  +-> drop while it is read: doomed -> unpin -> free
                      +-> retire: bad, until the disk is opened again

Not thread-safe: the disk's lock is held around every call.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray, UintArray
from polder.diskstore.index import Records, per_row
from polder.diskstore.keys import Keys, KeyTable, distinct
from polder.errors import IntegrityError

__all__ = ["SlotBook"]


_FREE, _BUSY, _USED, _DOOMED, _BAD = range(5)
_LEAST_AGED = 64


class SlotBook:
    """See above. `records` is what index.db is to hold; rows of it that changed since they were stored are marked in `dirty`,
    and in `touched` those in which only the order of use did."""

    def __init__(self, records: Records) -> None:
        """Takes the array over. Of pages with the same key the last written one stays: after a loss of power the index may
        hold both."""
        self.records = records
        self._per_row = per_row(records)
        self._nothing = np.zeros(1, dtype=records.dtype)
        self.dirty = np.zeros(-(-len(records) // self._per_row), dtype=np.bool_)
        self.touched = np.zeros_like(self.dirty)
        self.evicted = 0
        self._state = np.zeros(len(records), dtype=np.uint8)
        self._pins = np.zeros(len(records), dtype=np.int32)
        used = np.flatnonzero(records["generation"])
        newest_first = used[np.argsort(records["generation"][used])[::-1]]
        kept = newest_first[distinct(records["key"][newest_first])]
        self._clear(np.setdiff1d(used, kept))
        self._state[kept] = _USED
        self._table = KeyTable(records["key"])
        self._table.add(kept)
        self._clock = int(records["used"].max(initial=0)) + 1
        self._free = np.flatnonzero(self._state == _FREE)[::-1].copy()  # a stack: the first slots are taken first
        self._free_count = len(self._free)
        self._free = np.concatenate((self._free, np.zeros(len(kept), dtype=np.int64)))
        self._aged = self._aged_at = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Pages that can be found."""
        return self._table.count

    @property
    def free(self) -> int:
        """Slots that `take` gives without evicting a page."""
        return self._free_count

    @property
    def bad(self) -> int:
        return int((self._state == _BAD).sum())

    def find(self, keys: Keys) -> IntArray:
        """[n] slots, -1 where a key is absent."""
        return self._table.find(keys)

    # ------------------------------------------------------------------ write

    def take(self, count: int) -> IntArray:
        """Up to `count` slots to write to, in rising order; the least recently used pages make room."""
        own = min(count, self._free_count)
        self._free_count -= own
        taken = self._free[self._free_count : self._free_count + own].copy()
        if own < count:
            victims = self._victims(count - own)
            self._table.remove(victims)
            self._clear(victims)
            self.evicted += len(victims)
            taken = np.concatenate((taken, victims))
        self._state[taken] = _BUSY
        taken.sort()
        return taken

    def note(self, slots: IntArray, keys: Keys, generations: UintArray, digests: UintArray) -> None:
        """Busy slots hold these pages: so the index will say. They are not found yet. `digests`: [n, parts]."""
        self.records["key"][slots] = keys
        self.records["generation"][slots] = generations
        self.records["digest"][slots] = digests
        self._stamp(slots)
        self.dirty[slots // self._per_row] = True

    def publish(self, slots: IntArray) -> None:
        """Busy slots that were noted are found from now on; those whose key came in meanwhile are free again."""
        known = self._table.find(self.records["key"][slots]) >= 0
        self.abandon(slots[known])
        fresh = slots[~known]
        self._state[fresh] = _USED
        self._table.add(fresh)

    def abandon(self, slots: IntArray) -> None:
        """Busy slots are free again: nothing of use was written."""
        self._clear(slots)
        self._release(slots)

    def retire(self, slots: IntArray) -> None:
        """Busy slots that cannot be written to are not used again."""
        self._clear(slots)
        self._state[slots] = _BAD

    # ------------------------------------------------------------------ read

    def current(self, slots: IntArray, generations: UintArray) -> npt.NDArray[np.bool_]:
        """Which of these slots hold the page that was written as that generation."""
        there: npt.NDArray[np.bool_] = (self._state[slots] == _USED) & (
            self.records["generation"][slots] == generations
        )
        return there

    def pin(self, slots: IntArray) -> None:
        """They are being read: nothing is written to them before `unpin`. A slot may come twice."""
        np.add.at(self._pins, slots, 1)

    def unpin(self, slots: IntArray) -> None:
        np.subtract.at(self._pins, slots, 1)
        over = slots[(self._state[slots] == _DOOMED) & (self._pins[slots] == 0)]
        if len(over):
            self._release(np.unique(over))

    def touch(self, slots: IntArray) -> None:
        """They were asked for; the first row most of all: it begins the prefix."""
        self._stamp(slots)

    def drop(self, slots: IntArray) -> None:
        """Distinct used slots: their pages are forgotten."""
        if not len(slots):
            return
        self._table.remove(slots)
        self._clear(slots)
        pinned = self._pins[slots] > 0
        self._state[slots[pinned]] = _DOOMED
        self._release(slots[~pinned])

    def by_recency(self) -> IntArray:
        """Slots of all pages, the last used first."""
        used = np.flatnonzero(self._state == _USED)
        order: IntArray = used[np.argsort(self.records["used"][used])[::-1]]
        return order

    def check_integrity(self) -> None:
        """Raises IntegrityError unless free + busy + used + doomed + bad = all, and the table knows the used ones."""
        counts = np.bincount(self._state, minlength=5).tolist()
        free = self._free[: self._free_count]
        if counts[_FREE] != self._free_count or (self._state[free] != _FREE).any() or len(np.unique(free)) != len(free):
            raise IntegrityError(f"{self._free_count} slots on the stack, {counts[_FREE]} are free")
        used = np.flatnonzero(self._state == _USED)
        if self._table.count != len(used) or not np.array_equal(self._table.find(self.records["key"][used]), used):
            raise IntegrityError(f"{self._table.count} keys for {len(used)} used slots")
        empty = self.records[self._state == _FREE]
        if (self._pins < 0).any() or empty["generation"].any() or empty["used"].any():
            raise IntegrityError("a free slot has a record, or a slot was unpinned too often")

    # ------------------------------------------------------------------

    def _clear(self, slots: IntArray) -> None:
        self.records[slots] = self._nothing
        self.dirty[slots // self._per_row] = True

    def _release(self, slots: IntArray) -> None:
        self._state[slots] = _FREE
        self._free[self._free_count : self._free_count + len(slots)] = np.sort(slots)[::-1]
        self._free_count += len(slots)

    def _stamp(self, slots: IntArray) -> None:
        self._clock += len(slots)
        self.records["used"][slots] = self._clock - 1 - np.arange(len(slots))
        self.touched[slots // self._per_row] = True

    def _victims(self, count: int) -> IntArray:
        """Up to `count` used slots, least recently used first, none that is being read; they are busy now.

        Those that were used least are sorted out many at a time. A slot among them that was used since has a new stamp and is
        passed over; all others have been used since these were: so the order is exact.
        """
        found: list[IntArray] = []
        while count:
            if not len(self._aged) and not self._sort_out(count):
                break
            part, at = self._aged[:count], self._aged_at[:count]
            self._aged, self._aged_at = self._aged[count:], self._aged_at[count:]
            still = (self._state[part] == _USED) & (self.records["used"][part] == at) & (self._pins[part] == 0)
            self._state[part[still]] = _BUSY  # or they would be sorted out again
            found.append(part[still])
            count -= int(still.sum())
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _sort_out(self, count: int) -> bool:
        used = np.flatnonzero((self._state == _USED) & (self._pins == 0))
        stamps = self.records["used"][used].astype(np.int64)
        width = min(len(used), max(count, _LEAST_AGED, len(used) // 64))
        oldest = np.argpartition(stamps, width - 1)[:width] if width else np.empty(0, dtype=np.int64)
        oldest = oldest[np.argsort(stamps[oldest])]
        self._aged, self._aged_at = used[oldest], stamps[oldest]
        return bool(width)
