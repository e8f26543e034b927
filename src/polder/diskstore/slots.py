"""The slots of one disk: which are free, which page is in which, and which was used least recently. Arrays with one row
a slot.

    free -> take -> busy -> publish -> used -> drop -> free        (evicted by `take`: used -> busy)
                      |                  |
                      +-> abandon: free  +-> drop while it is read: doomed -> unpin -> free
                      +-> retire: bad, until the disk is opened again

Not thread-safe: the caller holds the disk's lock.
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
    """Gives out the slots of one disk and finds the pages in them.

    `records` is what index.db should contain. Rows of the index that changed since they were stored are marked in
    `dirty`; rows in which only the order of use changed are marked in `touched`.
    """

    def __init__(self, records: Records) -> None:
        """Owns the array from now on. Of pages with the same key only the last written one is kept: after a power loss
        the index may contain both."""
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
        """The number of pages that can be found."""
        return self._table.count

    @property
    def free(self) -> int:
        """The number of slots that `take` returns without evicting a page."""
        return self._free_count

    @property
    def bad(self) -> int:
        return int((self._state == _BAD).sum())

    def find(self, keys: Keys) -> IntArray:
        """[n] slots, -1 where a key is absent."""
        return self._table.find(keys)

    # ------------------------------------------------------------------ write

    def take(self, count: int) -> IntArray:
        """Takes up to `count` slots to write to, in rising order. The least recently used pages make room."""
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
        """Notes for the index which pages these busy slots hold. They are not found yet. `digests`: [n, parts]."""
        self.records["key"][slots] = keys
        self.records["generation"][slots] = generations
        self.records["digest"][slots] = digests
        self._stamp(slots)
        self.dirty[slots // self._per_row] = True

    def publish(self, slots: IntArray) -> None:
        """The pages in these noted slots are found from now on. A slot whose key was published meanwhile by another
        write is freed."""
        known = self._table.find(self.records["key"][slots]) >= 0
        self.abandon(slots[known])
        fresh = slots[~known]
        self._state[fresh] = _USED
        self._table.add(fresh)

    def abandon(self, slots: IntArray) -> None:
        """Frees busy slots: nothing of use was written."""
        self._clear(slots)
        self._release(slots)

    def retire(self, slots: IntArray) -> None:
        """These busy slots cannot be written, and are not used again."""
        self._clear(slots)
        self._state[slots] = _BAD

    # ------------------------------------------------------------------ read

    def current(self, slots: IntArray, generations: UintArray) -> npt.NDArray[np.bool_]:
        """[n] which of these slots still hold the page that was written with that generation."""
        there: npt.NDArray[np.bool_] = (self._state[slots] == _USED) & (
            self.records["generation"][slots] == generations
        )
        return there

    def pin(self, slots: IntArray) -> None:
        """These slots are being read: nothing is written to them before `unpin`. A slot may come twice."""
        np.add.at(self._pins, slots, 1)

    def unpin(self, slots: IntArray) -> None:
        np.subtract.at(self._pins, slots, 1)
        over = slots[(self._state[slots] == _DOOMED) & (self._pins[slots] == 0)]
        if len(over):
            self._release(np.unique(over))

    def touch(self, slots: IntArray) -> None:
        """These slots were used. The first row counts as the most recent, because it begins the prefix."""
        self._stamp(slots)

    def drop(self, slots: IntArray) -> None:
        """Forgets the pages in these distinct used slots."""
        if not len(slots):
            return
        self._table.remove(slots)
        self._clear(slots)
        pinned = self._pins[slots] > 0
        self._state[slots[pinned]] = _DOOMED
        self._release(slots[~pinned])

    def by_recency(self) -> IntArray:
        """The slots of all pages, the most recently used first."""
        used = np.flatnonzero(self._state == _USED)
        order: IntArray = used[np.argsort(self.records["used"][used])[::-1]]
        return order

    def check_integrity(self) -> None:
        """Raises IntegrityError unless free + busy + used + doomed + bad = all, and the table has exactly the used
        ones."""
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
        """Takes up to `count` used slots that are not being read, the least recently used first.

        The oldest slots are selected in bulk. A slot that was used since has a new stamp and is skipped. All slots
        outside the selection were used later than those in it, so the order is exact.
        """
        found: list[IntArray] = []
        while count:
            if not len(self._aged) and not self._select_oldest(count):
                break
            part, at = self._aged[:count], self._aged_at[:count]
            self._aged, self._aged_at = self._aged[count:], self._aged_at[count:]
            still = (self._state[part] == _USED) & (self.records["used"][part] == at) & (self._pins[part] == 0)
            self._state[part[still]] = _BUSY  # so that they are not selected again
            found.append(part[still])
            count -= int(still.sum())
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _select_oldest(self, count: int) -> bool:
        used = np.flatnonzero((self._state == _USED) & (self._pins == 0))
        stamps = self.records["used"][used].astype(np.int64)
        width = min(len(used), max(count, _LEAST_AGED, len(used) // 64))
        oldest = np.argpartition(stamps, width - 1)[:width] if width else np.empty(0, dtype=np.int64)
        oldest = oldest[np.argsort(stamps[oldest])]
        self._aged, self._aged_at = used[oldest], stamps[oldest]
        return bool(width)
