"""Pages on several disks: look up, write, read, forget, in batches.

Every disk keeps its own pages and its own index, so a disk that is lost loses nothing else, and disks can be added, removed or
put in another order between two runs. A page may have a copy on several disks. Which disk a page is written to, and which copy is
read, is the caller's choice (placement, schedule); without one, pages are spread by their keys over the disks, in proportion to the
disks' sizes.

No method raises for what a disk does. What cannot be read, or does not verify, is not ok; what cannot be written is not accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from polder.arrays import BoolArray, IntArray, UintArray
from polder.diskstore.disk import Disk, DiskConfig
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.health import DiskStatistics, State
from polder.diskstore.io import IoEngine, OpenFile, open_page_file
from polder.diskstore.keys import Keys, mix
from polder.errors import ConfigError

__all__ = ["DiskStore", "Places", "StoreConfig"]


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    disks: tuple[DiskConfig, ...]
    page_bytes: int
    """A multiple of 4096, 64 KiB at least."""
    parts: int = 1
    """Of equal size, multiples of 4096, that a page can be read in: each has a checksum of its own. Up to 496."""
    namespace: str
    """What must be equal for pages to be interchangeable; a directory made for another one is refused."""
    timeout_s: float = 5.0
    """A batch that takes longer is over: what is missing are misses."""
    errors_allowed: int = 8
    """After so many failed pages without a thousand good ones in between a disk is used no more in this run."""

    @property
    def part_bytes(self) -> int:
        return self.page_bytes // self.parts


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where n pages are, one column a disk."""

    keys: Keys
    slots: IntArray
    """[n, disks], -1 where that disk has no copy."""
    generations: UintArray
    """[n, disks]: a place that was given to another page meanwhile has another generation, and is a miss."""

    @property
    def present(self) -> BoolArray:
        """[n, disks]: which disks have a copy."""
        there: BoolArray = self.slots >= 0
        return there

    def rows(self, rows: IntArray) -> Places:
        """[m] of the n, in this order; one may come several times."""
        return Places(keys=self.keys[rows], slots=self.slots[rows], generations=self.generations[rows])


class DiskStore:
    """Thread-safe."""

    def __init__(
        self, config: StoreConfig, *, engine: IoEngine | None = None, open_file: OpenFile = open_page_file
    ) -> None:
        """Opens all disks; the store closes `engine`. A disk that cannot be used is "out" (see `statistics`), its pages misses.

        Raises ConfigError or BudgetError when a directory holds something else or a size cannot be meant.
        """
        if len({disk.directory.resolve() for disk in config.disks}) < len(config.disks):
            raise ConfigError("a directory is named twice: each disk has one of its own")
        self.config = config
        self._disks: list[Disk] = []
        try:
            for number, disk in enumerate(config.disks):
                opened = Disk(
                    number,
                    disk,
                    page_bytes=config.page_bytes,
                    parts=config.parts,
                    namespace=config.namespace,
                    errors_allowed=config.errors_allowed,
                    timeout_s=config.timeout_s,
                    open_file=open_file,
                )
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

    def lookup(self, keys: Keys) -> Places:
        """[n, 2] keys -> where their pages are. Nothing is read, and no use is noted."""
        found = [disk.find(keys) for disk in self._disks]
        none = np.empty((len(keys), 0))
        slots = np.column_stack([slots for slots, _ in found]) if found else none.astype(np.int64)
        generations = np.column_stack([gens for _, gens in found]) if found else none.astype(np.uint64)
        return Places(keys=keys, slots=slots, generations=generations)

    def write(self, keys: Keys, addresses: IntArray, disks: IntArray | None = None) -> BoolArray:
        """Writes n pages from memory: [n, 2] keys, [n] addresses of `page_bytes` each, best aligned to 4096.

        `disks`: [n] which disk each page goes to, though another one has it; -1: to none. Without it a page that some disk has
        is not written again. The least recently used pages of a full disk make room. A key stands for the same bytes for ever:
        to change them, forget it first. Returns [n]: which pages are on their disk now.
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
        self, places: Places, addresses: IntArray, disks: IntArray | None = None, parts: IntArray | None = None
    ) -> BoolArray:
        """Reads n pages into memory: [n] addresses of `page_bytes` each, best aligned to 4096.

        `disks`: [n] which copy to read, -1: none at all; without it the first. Where it fails another copy is tried. `parts`: [n]
        read only that part of each page, `part_bytes` long; side-by-side parts are one request. Several rows may be of one page. A
        copy with a part that does not verify is dropped as a whole.

        Returns [n]: which pages or parts arrived as they were written; at the other addresses is anything. Where a request that
        timed out may still write (`unsettled`) nothing has arrived, and no other copy is tried.

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
            if len(unsettled := self._engine.unsettled()):  # what verifies there now may be overwritten later
                hung = np.isin(addresses, unsettled)
                ok[hung], left[hung] = False, False
            disks = _first(left)
        return ok

    def forget(self, keys: Keys, disks: IntArray | None = None) -> int:
        """Drops these pages: all copies, or those on `disks` ([n]) alone. Returns how many copies there were."""
        chosen = (keys if disks is None else keys[disks == disk.number] for disk in self._disks)
        return sum(disk.forget(some) for disk, some in zip(self._disks, chosen, strict=True) if len(some))

    def unsettled(self) -> IntArray:
        """[k] addresses that a request which timed out may still read or write. Use them for nothing else before they are gone
        from here."""
        return self._engine.unsettled()

    # ------------------------------------------------------------------ disks

    @property
    def writable(self) -> BoolArray:
        """[disks]"""
        return np.array([disk.health.state == "ok" for disk in self._disks], dtype=np.bool_)

    @property
    def states(self) -> tuple[State, ...]:
        """One a disk."""
        return tuple(disk.health.state for disk in self._disks)

    @property
    def free(self) -> IntArray:
        """[disks] pages that can be written before one has to be evicted; 0 where nothing is written."""
        return np.array([disk.free for disk in self._disks], dtype=np.int64)

    @property
    def room(self) -> IntArray:
        """[disks] pages that are there or can be: less than there are slots where some went bad, 0 where a disk is out."""
        return np.array([disk.room for disk in self._disks], dtype=np.int64)

    @property
    def evicted(self) -> int:
        """Pages that made room for others since the store was opened."""
        return sum(disk.evicted for disk in self._disks)

    @property
    def corrupt_pages(self) -> int:
        """As in `statistics`, all disks together; unlike those it asks nothing of a disk, which may hang."""
        return sum(disk.health.corrupt_pages for disk in self._disks)

    @property
    def speeds(self) -> npt.NDArray[np.float64]:
        """[disks] pages a second, as measured by the reads so far; 0 where nothing is known."""
        return np.array([disk.health.pages_per_s for disk in self._disks], dtype=np.float64)

    def spread(self, keys: Keys, allowed: BoolArray) -> IntArray:
        """[n] a disk for each key among those [n, disks] that are allowed, -1 where none is: in proportion to the disks' slots.

        Each disk draws a number from the key, and the highest wins: so adding or removing a disk moves no page of the others.
        """
        draws = mix(keys[:, :1] ^ mix(keys[:, 1:] ^ self._salts)).astype(np.float64) / 2.0**64
        slots = np.array([max(1, disk.slots) for disk in self._disks], dtype=np.float64)
        weighted = np.where(allowed, np.log(np.clip(draws, 1e-18, 1 - 1e-12)) / slots, -np.inf)
        best: IntArray = np.where(allowed.any(axis=1), weighted.argmax(axis=1), -1) if slots.size else _first(allowed)
        return best

    def by_recency(self, disk: int) -> Keys:
        """[m, 2] keys of a disk's pages, the last used first; also of one that is out."""
        return self._disks[disk].by_recency()

    def statistics(self) -> tuple[DiskStatistics, ...]:
        """One a disk, in their order. Looks into their directories, and so waits for a disk that hangs."""
        return tuple(disk.statistics() for disk in self._disks)

    def check_integrity(self) -> None:
        """Raises IntegrityError when a disk's books do not balance."""
        for disk in self._disks:
            disk.check_integrity()

    def close(self) -> None:
        """Nothing may be under way. A disk on which a request hangs is left open: its file must not become another's."""
        self._engine.close()
        hung = len(self._engine.unsettled()) > 0
        for disk in self._disks:
            disk.settle()
            if not hung:
                disk.close()


def _first(choice: BoolArray) -> IntArray:
    """[n] the first column that is set, -1 where none is."""
    if not choice.shape[1]:
        return np.full(len(choice), -1, dtype=np.int64)
    first: IntArray = np.where(choice.any(axis=1), choice.argmax(axis=1), -1)
    return first
