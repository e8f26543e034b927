"""Which page of the store each slot of the scheduler's disk tier stands for, and how often it was read; and the
inventory, the pages of an earlier run that both begin with. Arrays with one row for each slot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.diskstore.keys import Keys, KeyTable, distinct
from polder.diskstore.store import DiskStore

__all__ = ["COPIES", "RESERVE", "SlotMirror", "common_inventory", "disk_capacity", "inventory"]

COPIES = 0.05
"""The share of a store's pages that second copies may take."""
RESERVE = COPIES + 0.03
"""The share that the scheduler does not use: room for second copies, and so that each page can go to the disk whose
turn it is."""
_AT_ONCE = 1 << 16


def disk_capacity(store: DiskStore) -> int:
    """The number of slots that this rank can promise. The tier has as many as the rank with the fewest."""
    return int(int(store.room.sum()) * (1.0 - RESERVE))


def inventory(store: DiskStore, capacity: int) -> Keys:
    """[n, 2] keys of the pages that can be read, the most recently used first, each once, `capacity` at most.

    Each disk knows only its own order. They are merged by rank: the share of its disk's pages that were used later.
    """
    keys, ranks = [np.empty((0, 2), dtype=np.uint64)], [np.empty(0)]
    for disk, state in enumerate(store.states):
        if state != "out":
            mine = store.by_recency(disk)
            keys.append(mine)
            ranks.append(np.arange(len(mine)) / max(1, len(mine)))
    merged = np.concatenate(keys)[np.argsort(np.concatenate(ranks), kind="stable")]
    found: Keys = merged[distinct(merged)][:capacity]
    return found


def common_inventory(inventories: Sequence[Keys]) -> Keys:
    """The pages that all ranks have, in the order of the first rank."""
    first = inventories[0]
    everywhere = np.ones(len(first), dtype=np.bool_)
    for other in inventories[1:]:
        table = KeyTable(other)
        table.add(np.arange(len(other)))
        everywhere &= table.find(first) >= 0
    return first[everywhere]


class SlotMirror:
    """See the module's docstring. Not thread-safe."""

    def __init__(self, capacity: int) -> None:
        self.keys: Keys = np.zeros((capacity, 2), dtype=np.uint64)
        self.bound: npt.NDArray[np.bool_] = np.zeros(capacity, dtype=np.bool_)
        self.reads: npt.NDArray[np.float32] = np.zeros(capacity, dtype=np.float32)
        """[slots] reads, halved from time to time."""
        self.twice: npt.NDArray[np.bool_] = np.zeros(capacity, dtype=np.bool_)
        """[slots] which pages have a second copy."""
        self._table = KeyTable(self.keys)
        self._since = 0  # reads since `reads` was halved

    def __len__(self) -> int:
        return self._table.count

    def find(self, keys: Keys) -> IntArray:
        """[n] slots, -1 where there is none."""
        return self._table.find(keys)

    def bind(self, slots: IntArray, keys: Keys) -> None:
        """These unbound slots stand for these distinct pages, which have no slot, from now on."""
        self.keys[slots] = keys
        self.bound[slots] = True
        self.reads[slots], self.twice[slots] = 0, False
        self._table.add(slots)

    def unbind(self, slots: IntArray) -> None:
        """These distinct slots stand for no page any more."""
        slots = slots[self.bound[slots]]
        self._table.remove(slots)
        self.bound[slots] = self.twice[slots] = False

    def was_read(self, slots: IntArray) -> None:
        self.reads[slots] += 1
        self._since += len(slots)
        if self._since > max(1024, len(self)):
            self.reads *= 0.5
            self._since = 0

    def compare(self, store: DiskStore) -> IntArray:
        """Finds and unbinds slots whose pages the store has lost, and returns them. Notes which pages have a second
        copy."""
        gone = [np.empty(0, dtype=np.int64)]
        bound = np.flatnonzero(self.bound)
        for at in range(0, len(bound), _AT_ONCE):
            some = bound[at : at + _AT_ONCE]
            copies = store.lookup(self.keys[some]).present.sum(axis=1)
            self.twice[some] = copies > 1
            gone.append(some[copies == 0])
        lost = np.concatenate(gone)
        self.unbind(lost)
        return lost

    def strays(self, store: DiskStore) -> Keys:
        """Keys of pages in the store that no slot stands for."""
        keys = np.concatenate([store.by_recency(disk) for disk in range(len(store.states))])
        found: Keys = keys[self.find(keys) < 0]
        return found
