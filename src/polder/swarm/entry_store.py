"""A store of entries smaller than a page on several disks, read a few at a time: the online half of the paper (section
6).

In sparse decoding an entry is the KV of one token in one layer, say 4 KiB. Each step reads the entries that its query
selects, and entries that are selected together once are often selected together again. So the store packs such entries
into the same page, puts pages that are read together on different disks, and reads only the wanted parts of a page:

    write        entries fill pages in the order in which they come
    read         one step's entries: from memory, and all others from all disks at once
    read_ahead   while others compute: reads what followed steps like this one
    EntryUpkeep  in idle moments (entry_upkeep.py): packs pages by what was read, and packs aged pages again

The store guarantees: entries marked `ok` are, byte for byte, those that were written, whatever the disks do. Memory has
a fixed size. No read waits for the upkeep. Nothing is evicted. The caller computes an entry that does not arrive, and
may write it again; if it was only late, it is still stored. Entries live as long as this object: `close` makes the
disks forget them.

vLLM's attention is dense, so its disk tier does not use this: there a block is a page, and a prefix is read as a whole.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polder.arrays import BoolArray, IntArray
from polder.diskstore.io import Arena
from polder.diskstore.store import DiskStore
from polder.errors import ConfigError
from polder.swarm.activations import Activations
from polder.swarm.adaptation import Drift
from polder.swarm.entry_memory import EntryMemory
from polder.swarm.entry_pages import EntryConfig, EntryPages
from polder.swarm.hotset import FrequentSet, HotSet
from polder.swarm.prediction import likeliest

__all__ = ["EntryRead", "EntryStore"]

_PAGES_AT_ONCE = 16
"""Pages written at a time."""
_RING_ENTRIES = 1 << 22
"""The number of ids remembered for all steps together, 4 bytes each. If steps are long, fewer are remembered."""
_VOTING_STEPS = 64
"""The number of steps that are remembered to read ahead."""
_VOTING_ENTRIES = 1 << 21
"""The number of ids remembered for it, for all steps together."""
_BASELINE_STEPS = 64
"""The cost of a step after packing is measured over so many steps."""


@dataclass(frozen=True, kw_only=True)
class EntryRead:
    """One step's entries, in the order in which they were asked for. Valid until the next `read` or `write`."""

    rows: IntArray
    """[n] the row of each entry in `EntryStore.memory.bytes`; -1 where `ok` is not set."""
    ok: BoolArray
    """[n] which entries arrived."""


class EntryStore:
    """See the module's docstring. One thread calls `write`, `read` and `read_ahead`; an EntryUpkeep may run in another
    one."""

    def __init__(self, store: DiskStore, config: EntryConfig, *, entries: int, hot: HotSet | None = None) -> None:
        """`entries`: the most entries there can be, each a part of one of the store's pages. `hot`: which entries stay
        in memory; by default a FrequentSet. Several EntryStores may share a DiskStore that has nothing but entries;
        what an earlier process left there is removed.

        Raises ConfigError when the store has other disks than `config`, or more than can be scheduled.
        """
        self.store, self.config = store, config
        self.pages = EntryPages(store, config, entries=entries)
        self.page_entries, self.entry_bytes = self.pages.page_entries, self.pages.entry_bytes
        self.map, self.stats, self.lock = self.pages.map, self.pages.stats, self.pages.lock
        self.memory = EntryMemory(entries, size_bytes=config.memory_bytes, entry_bytes=self.entry_bytes)
        self.ring = Activations(entries, max_steps=config.ring_steps, max_items=_RING_ENTRIES)
        self.drift: Drift | None = None
        """None until the cost of a step after packing is known."""
        self._hot = hot or FrequentSet(entries, config.hot_bytes // self.entry_bytes)
        self._unwritten: BoolArray = np.zeros(entries, dtype=np.bool_)
        self._kept_ahead: BoolArray = np.zeros(entries, dtype=np.bool_)
        self._scratch = Arena(_PAGES_AT_ONCE, store.config.page_bytes)
        self._gaps = Arena(max(1, config.gap_bytes // self.entry_bytes), self.entry_bytes)
        self._cost: list[tuple[int, int]] | None = None  # (pages, entries) of the first steps after packing
        self._told: IntArray | None = None
        self._before, self._after = (
            Activations(entries, max_steps=_VOTING_STEPS, max_items=_VOTING_ENTRIES) for _ in range(2)
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="polder-ahead")
        self._ahead: Future[None] | None = None

    # ------------------------------------------------------------------ write

    def write(self, ids: IntArray, data: npt.NDArray[np.uint8]) -> BoolArray:
        """Writes [n] entries, none twice, from `data` ([n, entry_bytes]). Those that do not fill a page wait in memory
        for more. An entry that is stored already stays as it is, because an id always stands for the same bytes.

        Returns [n]: which are stored; for the others there is no room on the disks. Raises ConfigError for an entry
        that comes twice, BudgetError when memory is too small.
        """
        if len(np.unique(ids)) < len(ids):
            raise ConfigError("entries: one is written twice at a time")
        self.wait()
        with self.lock:
            fresh = np.flatnonzero(~self._unwritten[ids] & (self.map.page_of[ids] < 0))
            self._let_go(ids[:0])
        while len(fresh):
            with self.lock:
                width = max(1, min(self.memory.free, _PAGES_AT_ONCE * self.page_entries - int(self._unwritten.sum())))
                some = ids[fresh[:width]]
                self.memory.release(some)
                self.memory.take(some)
                self.memory.bytes[self.memory.slot_of[some]] = data[fresh[:width]]
                self._unwritten[some] = True
            fresh = fresh[width:]
            waiting = np.flatnonzero(self._unwritten)
            self._store(waiting[: len(waiting) // self.page_entries * self.page_entries])
        with self.lock:
            return self._unwritten[ids] | (self.map.page_of[ids] >= 0)

    def flush(self) -> None:
        """Writes the waiting entries to a page that they do not fill."""
        self.wait()
        self._store(np.flatnonzero(self._unwritten))

    def _store(self, ids: IntArray) -> None:
        """Writes waiting entries to pages, in this order, spread over the disks by their speeds."""
        pages = -(-len(ids) // self.page_entries)
        if not pages:
            return
        members = np.full((pages, self.page_entries), -1, dtype=np.int64)
        members.reshape(-1)[: len(ids)] = ids
        with self.lock:
            parts = self._scratch.bytes.reshape(-1, self.entry_bytes)
            parts[: len(ids)] = self.memory.bytes[self.memory.slot_of[ids]]
        disks, nowhere = self.pages.deal(pages), np.full_like(members, -1)
        self.pages.put(members, nowhere, self._scratch.addresses[:pages], disks, np.ones(pages))
        with self.lock:
            self._unwritten[ids] = False
            self.memory.release(ids[~self._hot.resident[ids]])

    # ------------------------------------------------------------------ read

    def read(self, wanted: IntArray) -> EntryRead:
        """Reads [n] entries, none twice. Raises BudgetError when they do not fit into memory beside what stays
        there."""
        self.wait()
        stats = self.stats
        with self.lock:
            self._let_go(wanted)
            here = self.memory.present[wanted]
            if int((~here).sum()) > self.memory.free:  # entries that were read ahead in vain make room
                self._kept_ahead &= np.isin(np.arange(len(self._kept_ahead)), wanted)
                self._let_go(wanted)
            stays = self._hot.resident[wanted] | self._unwritten[wanted] | ~self._kept_ahead[wanted]
            missing = wanted[~here]
            self.memory.take(missing)
            self._hot.step(wanted)
            self._kept_ahead[:] = False
            self._note(wanted)
        stats.steps += 1
        stats.wanted += len(wanted)
        stats.resident += int((here & stays).sum())
        stats.ahead += int((here & ~stays).sum())
        lost = missing[~self._fetch(missing)]
        stats.lost += len(lost)
        with self.lock:
            rows = self.memory.slot_of[wanted]
        return EntryRead(rows=rows, ok=rows >= 0)

    def read_ahead(self, present: IntArray) -> None:
        """Begins to read the entries that followed steps with sets like `present`, and returns at once. `present` may
        be the set of the layer below or of the step before: it is remembered together with the next read."""
        self.wait()
        self._told = present
        if self.config.ahead_bytes >= self.entry_bytes and self._before.steps:
            self._ahead = self._thread.submit(self._read_ahead, present)

    def wait(self) -> None:
        """Waits for the reading ahead to end. All other methods do this first. Raises what made it fail."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.result()

    def _read_ahead(self, present: IntArray) -> None:
        with self.lock:
            before, after = self._before.profile(), self._after.profile()
            here = self.memory.present  # these need not be read
            most = self.config.ahead_bytes // self.entry_bytes - int(self._kept_ahead.sum())
        likely = likeliest(before, after, present, most=most, resident=here)
        with self.lock:
            missing = likely[self.map.page_of[likely] >= 0][: self.memory.free]
            self.memory.take(missing)
            self._kept_ahead[missing] = True
        ok = self._fetch(missing)
        self.stats.read_ahead += int(ok.sum())

    # ------------------------------------------------------------------

    def packed_anew(self) -> None:
        """Called by the upkeep after packing: later steps are compared with the cost of the next ones."""
        with self.lock:
            self.drift, self._cost = None, []
            self.stats.packed += 1

    def check_integrity(self) -> None:
        """Raises IntegrityError unless memory and map are consistent. Nothing may be under way."""
        self.wait()
        self.memory.check_integrity()
        self.map.check_integrity()

    def close(self) -> None:
        """Makes the disks forget all entries. No upkeep may be under way. The DiskStore stays open."""
        self.wait()
        self._thread.shutdown()
        rows = np.flatnonzero(self.map.live)
        self.store.forget(self.map.keys(rows))

    def _let_go(self, wanted: IntArray) -> None:
        """Frees the memory of entries that neither stay nor are wanted now."""
        stays = self._hot.resident | self._unwritten | self._kept_ahead
        stays[wanted] = True
        self.memory.settle(self.store.unsettled())
        self.memory.release(np.flatnonzero(self.memory.present & ~stays))

    def _fetch(self, ids: IntArray) -> BoolArray:
        """Reads entries into their slots. An entry that does not arrive loses its slot. Returns [n]: which arrived."""
        try:
            ok = self.pages.fetch(ids, self.memory.addresses(ids), self._gaps.addresses)
        except BaseException:  # otherwise the next step would take these slots for entries that were read
            with self.lock:
                self._gone(ids)
                self.memory.abandon(ids)
            raise
        with self.lock:
            self._gone(ids[~ok])
            self.memory.hold_back(ids[~ok])
            self.memory.settle(self.store.unsettled())
        return ok

    def _gone(self, ids: IntArray) -> None:
        self._hot.resident[ids] = False
        self._kept_ahead[ids] = False

    def _note(self, wanted: IntArray) -> None:
        self.ring.record(wanted)
        if self._told is not None and max(len(self._told), len(wanted)) <= _VOTING_ENTRIES:
            self._before.record(self._told)
            self._after.record(wanted)
        self._told = None
        pages = self.map.page_of[wanted]
        pages = pages[pages >= 0]
        touched = len(np.unique(pages))
        if self.drift is not None:
            self.drift.note(touched, len(pages))
        elif self._cost is not None and len(pages):
            self._cost.append((touched, len(pages)))
            if len(self._cost) == _BASELINE_STEPS:
                cost = np.array(self._cost).sum(axis=0)
                self.drift = Drift(after_clustering=float(cost[0] / cost[1]))
