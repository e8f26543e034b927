"""The disk tier in a worker: pages of a DiskStore, read and written a whole part at a time.

    load    find the pages' copies -> read each from the disk that is free soonest -> copy into the engine's blocks
    spill   copy from the host tier -> compare the checksum -> forget the pages that had these slots -> write

Pages pass through an arena of aligned memory. Two thirds of it are for loads, in halves, so that the next pages are
read while these are copied; the rest is for spills. Memory that a hung request may still use (`DiskStore.unsettled`) is
not used.

The scheduler decides which page is evicted: each of its slots (slots.py) stands for one page. `SlotMirror` notes
which page that is, so that it is forgotten before the slot gets another page. While both agree, the store evicts
nothing by itself. Pages that it loses nevertheless, with a disk, are reported by `state`.

No method raises for what a disk does. A part waits not much longer than the store's timeout for a disk that hangs:
after the first read that times out, it does not read from that disk again.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.diskstore.io import Arena
from polder.diskstore.keys import Keys
from polder.diskstore.store import DiskStore, PageLocations
from polder.errors import ConfigError
from polder.memory import _libc
from polder.tiers.disk.mirror import COPIES, SlotMirror, disk_capacity
from polder.tiers.disk.reads import Chunk, PageReader
from polder.tiers.disk.striping import Striping
from polder.tiers.jobs import HostRows, Mover, Part, PartResult, Pieces, Reason, TierState

__all__ = ["DiskMemory"]

_FORGET_AT_ONCE = 1 << 14
_LEAST_READS = 2.0
"""A page that is read less often gets no second copy."""
_LEFT_TO_THE_KERNEL: list[Arena] = []
"""Arenas that a hung request may still write to. They are kept until the process ends."""


class DiskMemory:
    """See the module's docstring. A BatchMemory."""

    def __init__(
        self,
        store: DiskStore,
        arena: Arena,
        *,
        host_address: int,
        host_slot_bytes: int,
        capacity: int,
        inventory: Keys | None = None,
    ) -> None:
        """`host_address`, `host_slot_bytes`: this rank's part of the host tier, as for HostMemory. `capacity`: the
        slots of the tier. `inventory`: the same as the scheduler's DiskSlots has; other pages in the store are
        forgotten. The caller closes the store.

        Raises ConfigError for an arena of less than three pages, or pages that do not hold a slot of the host tier.
        """
        size = store.config.page_bytes
        if arena.page_bytes != size or len(arena.addresses) < 3 or size < host_slot_bytes:
            raise ConfigError(
                f"disk tier: {len(arena.addresses)} staging pages of {arena.page_bytes} bytes for blocks of {host_slot_bytes}: "
                f"three pages of {size} bytes are the least, and a page has to hold a block"
            )
        self._store, self._arena = store, arena
        self._host_address, self._host_slot_bytes, self._capacity = host_address, host_slot_bytes, capacity
        third = len(arena.addresses) // 3
        self._reader = PageReader(store, (arena.addresses[:third], arena.addresses[third : 2 * third]))
        self._spill_rows = np.arange(2 * third, len(arena.addresses))
        self._sizes = store.room  # [disks] pages, at the start
        self._striping = Striping(self._reader.speeds())
        self._mirror = SlotMirror(capacity)
        self._lock = threading.Lock()  # guards the mirror
        self._stopped = False
        if inventory is not None:
            self._mirror.bind(np.arange(len(inventory[:capacity])), inventory[:capacity])
        self._forget(self._mirror.strays(store))
        self._lost = self._mirror.compare(store)  # slots that `state` has not reported yet
        self._seen = self._condition()

    # ------------------------------------------------------------------ load

    def load_part(self, part: Part, blocks: Sequence[Pieces], mover: Mover) -> PartResult:
        failed: dict[int, Reason] = {}
        size = 0
        for chunk in () if self._stopped else self._reader.read(part.ids):
            failed |= chunk.failed
            if self._stopped:  # the engine's blocks may be gone
                break
            moved = self._copy_out(chunk, blocks, mover)
            if moved is None:
                failed |= dict.fromkeys(chunk.rows.tolist(), "error")
            else:
                size += moved
        if self._stopped:
            failed = dict.fromkeys(range(len(part.rows)), "error")
        lost = part.ids[[at for at, why in failed.items() if why != "error"]]
        with self._lock:
            ours = self._mirror.find(part.ids)
            self._mirror.was_read(ours[ours >= 0])
            # Looked up again: a spill may have brought a page back meanwhile.
            gone = self._mirror.find(lost[~_anywhere(self._store.lookup(lost))])
            self._mirror.unbind(np.unique(gone[gone >= 0]))
        return PartResult(failed=failed, size_bytes=size)

    def _copy_out(self, chunk: Chunk, blocks: Sequence[Pieces], mover: Mover) -> int | None:
        """Copies all pages of a chunk in one call. Returns the bytes, or None when the copy failed."""
        target: list[tuple[int, int]] = []
        source: list[tuple[int, int]] = []
        for row, address in zip(chunk.rows.tolist(), chunk.addresses.tolist(), strict=True):
            target.extend(blocks[row])
            source.append((address, sum(size for _, size in blocks[row])))
        try:
            mover.copy(target, source)
        except Exception:  # a miss, as for a row in TierWorker
            return None
        return sum(size for _, size in source)

    # ------------------------------------------------------------------ spill

    def spill_part(self, part: Part, host: HostRows, mover: Mover) -> PartResult:
        failed: dict[int, Reason] = {}
        at = 0
        while at < len(part.rows):
            usable = self._usable_rows()
            if self._stopped or not len(usable):
                failed |= dict.fromkeys(range(at, len(part.rows)), "error")
                break
            rows = np.arange(at, min(at + len(usable), len(part.rows)))
            failed |= self._spill_some(part, rows, usable[: len(rows)], host, mover)
            at += len(rows)
        written = len(part.rows) - len(failed)
        return PartResult(failed=failed, size_bytes=written * self._arena.page_bytes)

    def _spill_some(
        self, part: Part, rows: IntArray, staging: IntArray, host: HostRows, mover: Mover
    ) -> dict[int, Reason]:
        failed: dict[int, Reason] = {}
        for row, page in zip(rows.tolist(), staging.tolist(), strict=True):
            reason = self._copy_in(int(part.sources[row]), page, host, row, mover)
            if reason is not None:
                failed[row] = reason
        keys, slots = part.ids[rows], part.slots[rows]
        with self._lock:
            # The pages that had these slots have to go, and pages of these keys, which may be older than the last `drop`.
            known = self._mirror.find(keys)
            old = np.unique(np.concatenate((slots, known[known >= 0])))
            leaving = self._mirror.keys[old[self._mirror.bound[old]]]
            self._mirror.unbind(old)
        self._forget(np.concatenate((leaving, keys[_anywhere(self._store.lookup(keys))])))
        good = np.array([row not in failed for row in rows.tolist()], dtype=np.bool_)
        disks = np.full(len(rows), -1, dtype=np.int64)
        disks[good] = self._choose_disks(part.stripes[rows[good]])
        written = good & self._store.write(keys, self._arena.addresses[staging], disks)
        with self._lock:
            self._mirror.bind(slots[written], keys[written])
        return failed | dict.fromkeys(rows[good & ~written].tolist(), "error")

    def _copy_in(self, slot: int, page: int, host: HostRows, row: int, mover: Mover) -> Reason | None:
        """Copies a block from the host tier. The copy is verified, because nobody can change it any more."""
        sizes = host.sizes[row]
        size = sum(sizes)
        if not size:
            return "lost"
        start = int(self._arena.addresses[page])
        _libc.copy_bytes(start, self._host_address + slot * self._host_slot_bytes, size)
        ctypes.memset(start + size, 0, self._arena.page_bytes - size)
        borders = (start + np.cumsum((0, *sizes[:-1]))).tolist()
        found = mover.checksum_in_host(list(zip(borders, sizes, strict=True)), host.seeds[row])
        return None if found == host.sums[row] else "corrupt"

    def _choose_disks(self, stripes: IntArray) -> IntArray:
        self._striping.follow(self._reader.speeds())
        free = self._store.free
        missing = len(stripes) - int(free.sum())
        if missing > 0:
            self._drop_copies(missing, below=np.inf)
            free = self._store.free
        return self._striping.choose(stripes, free, self._sizes)

    # ------------------------------------------------------------------ second copies

    def replicate(self, copies: int) -> PartResult:
        """Gives the pages that are read most a second copy; those that are read least lose theirs for it."""
        staging = self._usable_rows()[:copies]
        if self._stopped or not len(staging) or int(self._store.writable.sum()) < 2:
            return PartResult(failed={}, size_bytes=0)
        with self._lock:
            mirror = self._mirror
            hot = np.flatnonzero(mirror.bound & ~mirror.twice & (mirror.reads >= _LEAST_READS))
            hot = hot[np.argsort(-mirror.reads[hot], kind="stable")][: len(staging)]
            over = int(mirror.twice.sum()) + len(hot) - int(self._store.room.sum() * COPIES)
            least = float(mirror.reads[hot[-1]]) / 2 if len(hot) else 0.0
        if over > 0:
            hot = hot[: max(0, len(hot) - over + self._drop_copies(over, below=least))]
        keys = self._mirror.keys[hot]
        places = self._store.lookup(keys)
        addresses = self._arena.addresses[staging[: len(hot)]]
        disks = self._store.spread(keys, (self._store.free > 0) & ~places.present & _anywhere(places)[:, None])
        for disk, free in enumerate(self._store.free.tolist()):
            disks[np.flatnonzero(disks == disk)[free:]] = -1
        here = self._store.read(places, addresses, np.where(disks >= 0, places.present.argmax(axis=1), -1))
        written = self._store.write(keys[here], addresses[here], disks[here])
        with self._lock:
            twice = hot[here][written]
            self._mirror.twice[twice] = self._mirror.bound[twice]
        return PartResult(failed={}, size_bytes=int(written.sum()) * self._arena.page_bytes)

    def _drop_copies(self, count: int, *, below: float) -> int:
        """Removes up to `count` second copies, of pages that were read less than `below`, those read least first."""
        with self._lock:
            twice = np.flatnonzero(self._mirror.twice & (self._mirror.reads < below))
            least = twice[np.argsort(self._mirror.reads[twice], kind="stable")][:count]
            self._mirror.twice[least] = False
            keys = self._mirror.keys[least]
        present = self._store.lookup(keys).present
        first, last = present.argmax(axis=1), present.shape[1] - 1 - present[:, ::-1].argmax(axis=1)
        either = np.where(keys[:, 0] % 2 == 0, first, last)  # so that copies are removed from all disks alike
        return self._store.forget(keys, np.where(present.sum(axis=1) > 1, either, -1)) if len(keys) else 0

    # ------------------------------------------------------------------ the rest

    def drop(self) -> PartResult:
        """Forgets all pages. After `stop`, the pages stay on the disks for a run that can use them."""
        with self._lock:
            self._mirror = SlotMirror(self._capacity)
        if not self._stopped:
            self._forget(self._mirror.strays(self._store))
        return PartResult(failed={}, size_bytes=0)

    def state(self) -> TierState:
        with self._lock:
            condition = self._condition()
            if condition != self._seen:
                self._seen = condition
                self._lost = np.concatenate((self._lost, self._mirror.compare(self._store)))
            lost, self._lost = self._lost, self._lost[:0]
        gauges = {"disks_ok": 0.0 if self._stopped else float(self._store.writable.sum())}
        return TierState(lost=lost, room=min(self._capacity, disk_capacity(self._store)), gauges=gauges)

    def stop(self) -> None:
        self._stopped = True
        self._reader.stop()

    def close(self) -> None:
        """Nothing may be under way except requests that hang; the memory that they may write to is kept."""
        if np.isin(self._store.unsettled(), self._arena.addresses).any():
            _LEFT_TO_THE_KERNEL.append(self._arena)

    def _condition(self) -> tuple[object, ...]:
        """A value that changes whenever the store has lost pages without a read noticing it."""
        return (*self._store.states, self._store.evicted)

    def _usable_rows(self) -> IntArray:
        held: npt.NDArray[np.bool_] = np.isin(self._arena.addresses[self._spill_rows], self._store.unsettled())
        return self._spill_rows[~held]

    def _forget(self, keys: Keys) -> None:
        for at in range(0, len(keys), _FORGET_AT_ONCE):
            self._store.forget(keys[at : at + _FORGET_AT_ONCE])


def _anywhere(places: PageLocations) -> npt.NDArray[np.bool_]:
    """[n] which pages have a copy on any disk."""
    some: npt.NDArray[np.bool_] = places.slots.max(axis=1, initial=-1) >= 0
    return some
