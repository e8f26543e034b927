"""Where entries lie: in which page, and in which part of it. Pages are rows of a table; a page that changes becomes a
new row.

An entry is in one live page or in none. A page whose entries have all moved to other pages is dead: its row can be
reused, and the caller forgets its key. Keys are never used twice, not even by another map or process, so nobody finds
what a disk still has of a dead page or of a process that was killed.

Not thread-safe: the caller holds the entry store's lock.
"""

from __future__ import annotations

import itertools
import secrets

import numpy as np

from polder.arrays import BoolArray, FloatArray, IntArray
from polder.diskstore.keys import Keys
from polder.errors import IntegrityError
from polder.swarm.clusters import Packing

__all__ = ["EntryMap", "left_over"]

_PROCESS = np.uint64(secrets.randbits(64))
_MAPS = itertools.count()
_SERIALS = 1 << 44
"""Each map has so many keys, for all pages of its life."""


def left_over(keys: Keys) -> Keys:
    """[m, 2] those of the keys ([n, 2]) that other processes made."""
    found: Keys = keys[keys[:, 0] != _PROCESS]
    return found


class EntryMap:
    """`entries`: how many there can be. A page has `page_entries` parts, one for each entry."""

    def __init__(self, entries: int, page_entries: int) -> None:
        self.page_of: IntArray = np.full(entries, -1, dtype=np.int64)
        """[entries] the row of each entry's page, -1 for none."""
        self.column: IntArray = np.zeros(entries, dtype=np.int64)
        """[entries] which part of that page the entry is."""
        self.members: IntArray = np.empty((0, page_entries), dtype=np.int64)
        """[rows, parts] entries, -1 where there is none (any more)."""
        self.disk_of: IntArray = np.empty((0, 2), dtype=np.int64)
        """[rows, 2] the disks of the first and the second copy, -1 for none. A dead row has neither."""
        self.fill: FloatArray = np.empty(0)
        """[rows] the share of a page that was wanted when it was read, as of the last packing; 1 for later pages."""
        self._serial = np.empty(0, dtype=np.uint64)
        self._next = next(_MAPS) * _SERIALS
        self._free: list[int] = []

    @property
    def live(self) -> BoolArray:
        """[rows] which rows are pages with entries."""
        return self.disk_of[:, 0] >= 0

    def keys(self, rows: IntArray) -> Keys:
        """[n, 2] the keys of these rows."""
        return np.column_stack([np.full(len(rows), _PROCESS), self._serial[rows]])

    def packing(self) -> Packing:
        """A copy of all pages; dead ones are empty."""
        return Packing(members=self.members.copy(), page_of=self.page_of.copy())

    def reserve(self, pages: int) -> IntArray:
        """Reserves rows for new pages, with new keys. They are dead until `put`."""
        while len(self._free) < pages:
            self._grow(max(pages, len(self._serial)))
        rows = np.array([self._free.pop() for _ in range(pages)], dtype=np.int64)
        self._serial[rows] = np.arange(self._next, self._next + pages, dtype=np.uint64)
        self._next += pages
        return rows

    def cancel(self, rows: IntArray) -> None:
        """Frees reserved rows."""
        self._free += rows.tolist()

    def put(self, row: int, members: IntArray, disks: IntArray) -> IntArray:
        """Makes a reserved row the page of these entries ([parts], -1 for none), with copies on these disks ([2]).

        Returns the rows that are dead now: the caller forgets their keys and then frees them with `cancel`.
        """
        ids = members[members >= 0]
        before = np.unique(self.page_of[ids])
        self._take_out(ids)
        self.members[row], self.disk_of[row], self.fill[row] = members, disks, 1.0
        self.page_of[ids], self.column[ids] = row, np.flatnonzero(members >= 0)
        return self._buried(before[before >= 0])

    def lose(self, ids: IntArray) -> IntArray:
        """Removes these entries from their pages. Returns the rows that are dead now, as `put` does."""
        rows = np.unique(self.page_of[ids])
        self._take_out(ids)
        return self._buried(rows[rows >= 0])

    def check_integrity(self) -> None:
        """Raises IntegrityError unless entries and pages name each other, and rows are live, dead or free."""
        row, column = np.nonzero(self.members >= 0)
        ids = self.members[row, column]
        if not (np.array_equal(self.page_of[ids], row) and np.array_equal(self.column[ids], column)):
            raise IntegrityError("an entry is not where its page says")
        if len(ids) != int((self.page_of >= 0).sum()):
            raise IntegrityError(f"{int((self.page_of >= 0).sum())} entries are in pages that have {len(ids)}")
        holds = (self.members >= 0).any(axis=1)
        if (holds != self.live).any() or self.live[self._free].any() or len(set(self._free)) != len(self._free):
            raise IntegrityError("a page without entries is live, or a free one is")

    def _take_out(self, ids: IntArray) -> None:
        there = ids[self.page_of[ids] >= 0]
        self.members[self.page_of[there], self.column[there]] = -1
        self.page_of[ids] = -1

    def _buried(self, rows: IntArray) -> IntArray:
        dead = rows[(self.members[rows] < 0).all(axis=1)]
        self.disk_of[dead] = -1
        return dead

    def _grow(self, more: int) -> None:
        more = max(more, 64)
        first = len(self._serial)
        self._free += range(first + more - 1, first - 1, -1)
        self._serial = np.concatenate([self._serial, np.zeros(more, dtype=np.uint64)])
        self.fill = np.concatenate([self.fill, np.ones(more)])
        self.members = np.concatenate([self.members, np.full((more, self.members.shape[1]), -1, dtype=np.int64)])
        self.disk_of = np.concatenate([self.disk_of, np.full((more, 2), -1, dtype=np.int64)])
