"""Pages on several disks: look up, write, read and forget, in batches.

Every disk has its own pages and its own index. So losing a disk loses only its pages, and disks can be added, removed
or reordered between two runs. A page may have copies on several disks. The caller may choose to which disk a page is
written and which copy is read; otherwise pages are spread over the disks by a hash of their keys, in proportion to the
disks' sizes.

No method raises for what a disk does. A page that cannot be read, or does not verify, is reported as not ok; a page
that cannot be written is reported as not accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from polder.arrays import BoolArray, IntArray, UintArray
from polder.diskstore.config import StoreConfig
from polder.diskstore.disk import Disk
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.health import DiskStats, State
from polder.diskstore.io import IoEngine, OpenFile, open_page_file
from polder.diskstore.keys import Keys, mix
from polder.errors import ConfigError

__all__ = ["DiskStore", "PageLocations"]


@dataclass(frozen=True, kw_only=True)
class PageLocations:
    """Where n pages are, with one column for each disk."""

    keys: Keys
    slots: IntArray
    """[n, disks] -1 where the disk has no copy."""
    generations: UintArray
    """[n, disks] a slot that holds another page meanwhile has another generation; reading it is a miss."""

    @property
    def present(self) -> BoolArray:
        """[n, disks] which disks have a copy."""
        there: BoolArray = self.slots >= 0
        return there

    def rows(self, rows: IntArray) -> PageLocations:
        """[m] the given rows in this order; a row may come several times."""
        return PageLocations(keys=self.keys[rows], slots=self.slots[rows], generations=self.generations[rows])


class DiskStore:
    """Writes, reads and forgets pages on several disks. Thread-safe."""

    def __init__(
        self, config: StoreConfig, *, engine: IoEngine | None = None, open_file: OpenFile = open_page_file
    ) -> None:
        """Opens all disks. The store closes `engine`. A disk that cannot be used is "out", and its pages are misses;
        see `stats`.

        Raises ConfigError or BudgetError when a directory holds something else or a size is invalid.
        """
        if len({disk.directory.resolve() for disk in config.disks}) < len(config.disks):
            raise ConfigError("a directory is named twice: each disk has one of its own")
        self.config = config
        self._disks: list[Disk] = []
        try:
            for number, disk in enumerate(config.disks):
                opened = Disk(number, disk, config, open_file)
                self._disks.append(opened)
                twin = next((d for d in self._disks[:-1] if d.device and d.device == opened.device), None)
                if twin is not None:
                    raise ConfigError(
                        f"{disk.directory} is a copy of {twin.config.directory}: empty one of them to start it over"
                    )
        except BaseException:
            for opened in self._disks:
                opened.close()
            raise
        self._engine = engine or ThreadEngine()
        self._salts = np.array([xxhash.xxh3_64_intdigest(d.device.encode()) for d in self._disks], dtype=np.uint64)

    def lookup(self, keys: Keys) -> PageLocations:
        """[n, 2] keys -> where their pages are. Nothing is read, and the order of use does not change."""
        found = [disk.find(keys) for disk in self._disks]
        none = np.empty((len(keys), 0))
        slots = np.column_stack([slots for slots, _ in found]) if found else none.astype(np.int64)
        generations = np.column_stack([gens for _, gens in found]) if found else none.astype(np.uint64)
        return PageLocations(keys=keys, slots=slots, generations=generations)

    def write(self, keys: Keys, addresses: IntArray, disks: IntArray | None = None) -> BoolArray:
        """Writes n pages from memory: [n, 2] keys, [n] addresses of `page_bytes` each, best aligned to 4096.

        `disks`: [n] the disk that each page goes to, even if another disk has it; -1: none. Without it, a page that
        some disk has is not written again. The least recently used pages of a full disk make room. A key always stands
        for the same bytes: to change them, forget it first. Returns [n]: which pages are on their disk now.
        """
        accepted = np.zeros(len(keys), dtype=np.bool_)
        if disks is None:
            present = self.lookup(keys).present
            accepted |= present.any(axis=1)
            disks = np.where(accepted, -1, self.spread(keys, np.broadcast_to(self.writable, present.shape)))
        begun = []
        for disk in self._disks:
            rows = np.flatnonzero(disks == disk.number)
            if len(rows) and (writing := disk.begin_write(rows, keys[rows], addresses[rows])) is not None:
                begun.append((disk, writing))
        outcomes = (
            self._engine.write([writing.transfer for _, writing in begun], self.config.timeout_s) if begun else []
        )
        for (disk, writing), outcome in zip(begun, outcomes, strict=True):
            disk.end_write(writing, outcome)
        for disk in self._disks:
            rows = np.flatnonzero(disks == disk.number)
            accepted[rows] = disk.find(keys[rows])[0] >= 0
        return accepted

    def read(
        self, places: PageLocations, addresses: IntArray, disks: IntArray | None = None, parts: IntArray | None = None
    ) -> BoolArray:
        """Reads n pages into memory: [n] addresses of `page_bytes` each, best aligned to 4096.

        `disks`: [n] the disk to read each page from, -1: do not read it. Without it, the first copy is read. Where that
        fails, another copy is tried. `parts`: [n] read only this part of each page, `part_bytes` long; adjacent parts
        are one request. Several rows may name one page. A copy with a part that does not verify is dropped as a whole.

        Returns [n]: which pages or parts arrived as they were written. The memory of the others is undefined. Where a
        request that timed out may still write (`unsettled`), nothing counts as arrived, and no other copy is tried.

        Raises ConfigError for a part that pages do not have.
        """
        if parts is not None and len(parts) and not 0 <= parts.min() <= parts.max() < self.config.parts:
            raise ConfigError(
                f"parts {parts.min()} to {parts.max()} of a page: they are numbered from 0 to {self.config.parts - 1}"
            )
        ok = np.zeros(len(places.keys), dtype=np.bool_)
        left = places.present.copy()
        if disks is None:
            disks = _first(left)
        left[disks < 0] = False
        while (disks >= 0).any():
            begun = []
            for disk in self._disks:
                rows = np.flatnonzero(disks == disk.number)
                left[rows, disk.number] = False
                rows = rows[places.slots[rows, disk.number] >= 0]
                if not len(rows):
                    continue
                at = places.slots[rows, disk.number], places.generations[rows, disk.number], addresses[rows]
                reading = disk.begin_read(rows, places.keys[rows], *at, None if parts is None else parts[rows])
                if reading is not None:
                    begun.append((disk, reading))
            outcomes = self._engine.read([r.transfer for _, r in begun], self.config.timeout_s) if begun else []
            for (disk, reading), outcome in zip(begun, outcomes, strict=True):
                ok[reading.rows] = disk.end_read(reading, outcome)
            left[ok] = False
            if len(unsettled := self._engine.unsettled()):  # what verifies there now may still be overwritten
                hung = np.isin(addresses, unsettled)
                ok[hung], left[hung] = False, False
            disks = _first(left)
        return ok

    def forget(self, keys: Keys, disks: IntArray | None = None) -> int:
        """Drops all copies of these pages, or only those on `disks` ([n]). Returns how many copies there were."""
        chosen = (keys if disks is None else keys[disks == disk.number] for disk in self._disks)
        return sum(disk.forget(some) for disk, some in zip(self._disks, chosen, strict=True) if len(some))

    def unsettled(self) -> IntArray:
        """[k] addresses of pages that a request which timed out may still read or write. They must not be used for
        anything else while they are listed here."""
        return self._engine.unsettled()

    # ------------------------------------------------------------------ disks

    @property
    def writable(self) -> BoolArray:
        """[disks] which disks are read and written."""
        return np.array([disk.health.state == "ok" for disk in self._disks], dtype=np.bool_)

    @property
    def states(self) -> tuple[State, ...]:
        """The state of each disk."""
        return tuple(disk.health.state for disk in self._disks)

    @property
    def free(self) -> IntArray:
        """[disks] the number of pages that can be written before one has to be evicted; 0 where nothing is written."""
        return np.array([disk.free for disk in self._disks], dtype=np.int64)

    @property
    def room(self) -> IntArray:
        """[disks] the number of pages that each disk can hold: without bad slots, and 0 where a disk is out."""
        return np.array([disk.room for disk in self._disks], dtype=np.int64)

    @property
    def evicted(self) -> int:
        """The number of pages evicted since the store was opened."""
        return sum(disk.evicted for disk in self._disks)

    @property
    def corrupt_pages(self) -> int:
        """The number of pages on all disks that did not verify."""
        return sum(disk.health.corrupt_pages for disk in self._disks)

    @property
    def speeds(self) -> npt.NDArray[np.float64]:
        """[disks] pages a second, measured by the reads so far; 0 where nothing is known."""
        return np.array([disk.health.pages_per_s for disk in self._disks], dtype=np.float64)

    def spread(self, keys: Keys, allowed: BoolArray) -> IntArray:
        """[n] chooses a disk for each key among the allowed ones ([n, disks]), in proportion to the disks' slots; -1
        where none is.

        This is weighted rendezvous hashing: adding or removing a disk moves no page between the others.
        """
        draws = mix(keys[:, :1] ^ mix(keys[:, 1:] ^ self._salts)).astype(np.float64) / 2.0**64
        slots = np.array([max(1, disk.slots) for disk in self._disks], dtype=np.float64)
        weighted = np.where(allowed, np.log(np.clip(draws, 1e-18, 1 - 1e-12)) / slots, -np.inf)
        best: IntArray = np.where(allowed.any(axis=1), weighted.argmax(axis=1), -1) if slots.size else _first(allowed)
        return best

    def by_recency(self, disk: int) -> Keys:
        """[m, 2] keys of a disk's pages, the most recently used first; also of a disk that is out."""
        return self._disks[disk].by_recency()

    def stats(self) -> tuple[DiskStats, ...]:
        """The stats of each disk."""
        return tuple(disk.stats() for disk in self._disks)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every disk's slots are accounted for."""
        for disk in self._disks:
            disk.check_integrity()

    def close(self) -> None:
        """Closes all disks; nothing may be under way. If a request hangs, the files stay open, so that it cannot hit
        another file."""
        self._engine.close()
        hung = len(self._engine.unsettled()) > 0
        for disk in self._disks:
            disk.settle()
            if not hung:
                disk.close()


def _first(choice: BoolArray) -> IntArray:
    """[n] the first column that is set; -1 where none is."""
    if not choice.shape[1]:
        return np.full(len(choice), -1, dtype=np.int64)
    first: IntArray = np.where(choice.any(axis=1), choice.argmax(axis=1), -1)
    return first
