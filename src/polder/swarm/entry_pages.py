"""Pages of entries on the disks of a store. They are written as a whole, read in parts, and found through the map.

A new page is entered in the map after it was written, and a dead page is forgotten by the disks after it was removed
from the map. So a reader that uses what the map said a moment ago either finds the bytes, or finds nothing and looks
again.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from polder.arrays import BoolArray, FloatArray, IntArray
from polder.diskstore.model import DiskModel, page_speeds
from polder.diskstore.schedule import MAX_DISKS, exact
from polder.diskstore.store import DiskStore, PageLocations
from polder.errors import ConfigError
from polder.swarm.cost import cheapest_runs
from polder.swarm.entry_map import EntryMap, left_over
from polder.swarm.reads import ReadPlan

__all__ = ["EntryConfig", "EntryPages", "EntryStats"]


@dataclass(frozen=True, kw_only=True)
class EntryConfig:
    """Raises ConfigError for invalid sizes."""

    disks: tuple[DiskModel, ...]
    """How fast each disk of the store is, as published or measured."""
    memory_bytes: int
    """Memory for hot entries, the entries of a step, and entries that are read ahead."""
    hot_bytes: int
    """The part of it, at most, for entries that stay from step to step."""
    ahead_bytes: int = 0
    """The part of it, at most, for entries that are read ahead."""
    replica_share: float = 0.10
    """The share of pages with a second copy; no page has one on a single disk."""
    learn_steps: int = 200
    """Pages are packed by the sets of so many steps: the first ones, and those after reading has changed. 64 are too
    few."""
    ring_steps: int = 512
    """The number of steps that are remembered; the first packing uses up to as many."""
    host_s_per_request: float = 0.0
    """CPU time of a request. Where requests take longer than the disks do, gaps between them are read as well."""
    gap_bytes: int = 8 << 20
    """Memory for gaps that are read, besides memory_bytes. Gaps of one step are not larger together."""

    def __post_init__(self) -> None:
        if min(self.hot_bytes, self.ahead_bytes) < 0 or self.hot_bytes + self.ahead_bytes >= self.memory_bytes:
            raise ConfigError(
                f"entries: hot_bytes {self.hot_bytes} and ahead_bytes {self.ahead_bytes} leave nothing of memory_bytes "
                f"{self.memory_bytes} for what a step reads"
            )
        if not 1 <= self.learn_steps <= self.ring_steps:
            raise ConfigError(
                f"entries: learn_steps {self.learn_steps}; write a number up to ring_steps, {self.ring_steps}"
            )


@dataclass(kw_only=True)
class EntryStats:
    """Counters since the start. All but the last four count entries."""

    steps: int = 0
    wanted: int = 0
    resident: int = 0
    """Wanted entries that were in memory already, but not read ahead."""
    ahead: int = 0
    """Wanted entries that were read ahead."""
    lost: int = 0
    """Wanted entries that could not be read."""
    read_ahead: int = 0
    """Entries read ahead; this minus `ahead` were read in vain."""
    requests: int = 0
    """Requests to all disks."""
    packed: int = 0
    """How often pages were packed: all pages, or those that had aged."""
    rewritten_pages: int = 0
    without_room: int = 0
    """Pages that were not written for want of room: nothing is evicted for them."""


class EntryPages:
    """See the module's docstring. Thread-safe."""

    def __init__(self, store: DiskStore, config: EntryConfig, *, entries: int) -> None:
        """Removes pages that an earlier process left on the disks, since nobody can find them.

        Raises ConfigError when the store has other disks than `config`, or more than can be scheduled.
        """
        if len(config.disks) != len(store.config.disks):
            raise ConfigError(f"entries: models of {len(config.disks)} disks for a store on {len(store.config.disks)}")
        if len(config.disks) > MAX_DISKS:
            raise ConfigError(f"entries: {len(config.disks)} disks; at most {MAX_DISKS} can be scheduled")
        self.store, self.config = store, config
        self.page_entries, self.entry_bytes = store.config.parts, store.config.part_bytes
        self.map = EntryMap(entries, self.page_entries)
        self.stats = EntryStats()
        self.lock = threading.Lock()
        """Guards map, stats and the entry store's memory. Never held while waiting for a disk."""
        self._speeds = page_speeds(config.disks, self.entry_bytes)
        for disk in range(len(config.disks)):
            store.forget(left_over(store.by_recency(disk)))

    def deal(self, pages: int) -> IntArray:
        """[pages, 2] chooses disks for pages about which nothing is known yet: one copy each, where there is least for
        its speed."""
        with self.lock:
            held = np.bincount(self.map.disk_of[self.map.live, 0], minlength=len(self._speeds)).astype(np.float64)
        disks = np.full((pages, 2), -1, dtype=np.int64)
        for page in range(pages):
            disks[page, 0] = np.where(self.store.writable, (held + 1) / self._speeds, np.inf).argmin()
            held[disks[page, 0]] += 1
        return disks

    def put(self, members: IntArray, sources: IntArray, addresses: IntArray, disks: IntArray, fill: FloatArray) -> int:
        """Writes n pages of entries and enters them in the map. Returns how many pages were written.

        `members`: [n, parts] entries, -1 for none. `sources`: [n, parts] the page that each entry was in when its bytes
        were read; an entry that has moved since stays where it is. `addresses`: [n] the pages in memory. `disks`: [n,
        2]. Where the disk of the first copy does not accept a page, the others are tried; if none does, nothing
        changes. No page is evicted, because it may be the only copy of its entries.
        """
        with self.lock:
            rows = self.map.reserve(len(members))
            keys = self.map.keys(rows)
        count = len(self._speeds)
        done: BoolArray = np.zeros(len(members), dtype=np.bool_)
        for other in range(count):
            if done.all():
                break
            to = np.where(done, -1, (disks[:, 0] + other) % count)
            done |= self.store.write(keys, addresses, self._with_room(to))
        self.store.write(keys, addresses, self._with_room(np.where(done, disks[:, 1], -1)))
        present = self.store.lookup(keys).present
        done &= present.any(axis=1)
        dead = [rows[~done]]
        with self.lock:
            for page in np.flatnonzero(done).tolist():
                valid = np.where(self.map.page_of[members[page]] == sources[page], members[page], -1)
                if (valid < 0).all():
                    dead.append(rows[page : page + 1])
                    continue
                on = np.flatnonzero(present[page])
                on = on[np.argsort(on != disks[page, 0], kind="stable")]
                dead.append(self.map.put(int(rows[page]), valid, np.append(on, -1)[:2]))
                self.map.fill[rows[page]] = fill[page]
            self.stats.without_room += int((~done).sum())
        self.bury(np.concatenate(dead))
        return int(done.sum())

    def _with_room(self, disks: IntArray) -> IntArray:
        """[n] the given disks, with -1 instead of a disk that is full."""
        fits, free = disks.copy(), self.store.free
        for disk in range(len(free)):
            fits[np.flatnonzero(disks == disk)[free[disk] :]] = -1
        return fits

    def bury(self, rows: IntArray) -> None:
        """Makes the disks forget dead rows of the map, and frees the rows."""
        if len(rows):
            with self.lock:
                keys = self.map.keys(rows)
            self.store.forget(keys)
            with self.lock:
                self.map.cancel(rows)

    def fetch(self, ids: IntArray, addresses: IntArray, spare: IntArray) -> BoolArray:
        """Reads [n] entries to [n] addresses, from the disks that are done soonest. Returns [n]: which arrived.

        `spare`: addresses for unwanted entries that are read between wanted ones. Entries of which no disk has a copy
        are removed from the map.
        """
        spare = spare[~np.isin(spare, self.store.unsettled())]  # a hung read might write there and spoil a good entry
        ok = np.zeros(len(ids), dtype=np.bool_)
        left = np.arange(len(ids))
        while len(left):
            with self.lock:
                pages = self.map.page_of[ids[left]]
                left, pages = left[pages >= 0], pages[pages >= 0]
                page, row = np.unique(pages, return_inverse=True)  # many entries are of one page
                keys, part = self.map.keys(page), self.map.column[ids[left]]
            ok[left] = self._read_parts(self.store.lookup(keys).rows(row), part, addresses[left], spare)
            failed = ~ok[left]
            if not failed.any():
                break
            absent = failed & (self.store.lookup(keys).rows(row).slots < 0).all(axis=1)
            with self.lock:
                page_now = self.map.page_of[ids[left]]
                dead = self.map.lose(ids[left[absent & (page_now == pages)]])
            self.bury(dead)
            left = left[failed & (page_now != pages)]  # entries that moved meanwhile are read where they are now
        return ok

    def _read_parts(self, places: PageLocations, part: IntArray, addresses: IntArray, spare: IntArray) -> BoolArray:
        count, parts = len(part), self.page_entries
        on = exact(places.present @ (np.int64(1) << np.arange(len(self._speeds))), self._speeds)
        rows = np.flatnonzero(on >= 0)
        page_slot = places.slots[rows, on[rows]]
        plan = ReadPlan.of(rows, on[rows], page_slot * parts + part[rows], lost=rows[:0])
        best = cheapest_runs(
            plan,
            self.config.disks,
            self.entry_bytes,
            host_s_per_request=self.config.host_s_per_request,
            most_gap_slots=len(spare),
        )
        gap_disks, gap_slots = best.gaps()
        with self.lock:
            self.stats.requests += best.runs
        # A gap is narrower than a page, so it belongs to the page before or after it, and both are wanted.
        code = on[rows] * (1 << 40) + page_slot
        order = np.argsort(code, kind="stable")
        owner = rows[order[np.searchsorted(code[order], gap_disks * (1 << 40) + gap_slots // parts)]]
        every = np.concatenate([np.arange(count), owner])
        good = self.store.read(
            places.rows(every),
            np.concatenate([addresses, spare[: len(owner)]]),
            np.concatenate([on, gap_disks]),
            np.concatenate([part, gap_slots % parts]),
        )
        return good[:count]
