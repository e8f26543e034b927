"""Entries smaller than a page, kept on several disks and read a few at a time: the online half of Swarm (section 6).

For sparse decoding: an entry is the KV of one token in one layer, say 4 KiB; each step reads those that its query selects, and
entries that are selected together are so again and again. So they are packed into pages by what steps have read, pages that are
read together lie on different disks, and of a page only what is wanted is read:

    write        entries fill pages in the order in which they come
    read         one step's entries: those in memory, those that were read ahead, and the others from all disks at once
    read_ahead   while others compute: what followed steps like this one
    tend         in idle moments (entry_upkeep.py): packs pages by what was read, and what has aged again

Who reads may rely on this: `ok` entries are, byte for byte, those that were written, whatever disks do; memory keeps its size; no
read waits for `tend`; nothing is evicted. An entry that does not come is computed again by its caller, who may write it again; if
it was only late, it is still stored. Entries live as long as their store: `close` makes the disks forget them.

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
from polder.swarm.activations import Activations, Profile
from polder.swarm.adaptation import Drift
from polder.swarm.entry_memory import EntryMemory
from polder.swarm.entry_pages import EntryConfig, EntryPages
from polder.swarm.hotset import BenefitSet, HotSet
from polder.swarm.prediction import Predictor

__all__ = ["EntryRead", "EntryStore"]

_LATENCY_S = 80e-6
_PAGES_AT_ONCE = 16
"""Written."""
_VOTING_ENTRIES = 1 << 21
"""Of all remembered steps together, to read ahead."""
_BASELINE_STEPS = 64
"""After packing, until it is known what a step costs then."""


@dataclass(frozen=True, kw_only=True)
class EntryRead:
    """One step's entries, in the order asked for. Valid until the next `read` or `write`."""

    rows: IntArray
    """[n]: where in `EntryStore.memory.bytes`; -1 where `ok` is not set."""
    ok: BoolArray
    """[n]"""


class EntryStore:
    """See above. `write`, `read` and `read_ahead` are one thread's; an EntryUpkeep may be another's."""

    def __init__(self, store: DiskStore, config: EntryConfig, *, entries: int, hot: HotSet | None = None) -> None:
        """Of at most so many entries, each a part of one of the store's pages. Several may have the same store, which has nothing
        but entries: what a former process left there goes.

        `hot`: in place of the benefit score. Raises ConfigError when the store has other disks, or more than can be scheduled.
        """
        self.store, self.config = store, config
        self.pages = EntryPages(store, config, entries=entries)
        self.page_entries, self.entry_bytes = self.pages.page_entries, self.pages.entry_bytes
        self.map, self.figures, self.lock = self.pages.map, self.pages.figures, self.pages.lock
        self.memory = EntryMemory(entries, size_bytes=config.memory_bytes, entry_bytes=self.entry_bytes)
        self.ring = Activations(entries, max_steps=config.ring_steps, max_items=config.ring_entries)
        self.drift: Drift | None = None
        """None until it is known what a step costs after packing."""
        self._hot = hot or BenefitSet(
            np.full(entries, self.entry_bytes),
            config.hot_bytes,
            latency_s=_LATENCY_S,
            bytes_per_s=sum(disk.bytes_per_s for disk in config.disks) / len(config.disks),
            halflife_steps=config.halflife_steps,
        )
        self._unwritten: BoolArray = np.zeros(entries, dtype=np.bool_)
        self._kept_ahead: BoolArray = np.zeros(entries, dtype=np.bool_)
        self._scratch = Arena(_PAGES_AT_ONCE, store.config.page_bytes)
        self._gaps = Arena(max(1, config.gap_bytes // self.entry_bytes), self.entry_bytes)
        self._cost: list[tuple[int, int]] | None = None  # (pages, entries) of the first steps after packing
        self._told: IntArray | None = None
        self._before, self._after = (
            Activations(entries, max_steps=config.voting_steps, max_items=_VOTING_ENTRIES) for _ in range(2)
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="polder-ahead")
        self._ahead: Future[None] | None = None

    # ------------------------------------------------------------------ write

    def write(self, ids: IntArray, data: npt.NDArray[np.uint8]) -> BoolArray:
        """[n] entries, none twice; [n, entry_bytes]. What does not fill a page waits in memory for more. What is stored already
        stays as it is: it stands for the same bytes for ever.

        Returns [n]: which are stored; others had no room on the disks. Raises ConfigError for an entry that comes twice,
        BudgetError when memory is too small.
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
        """What waits is written to a page that it does not fill."""
        self.wait()
        self._store(np.flatnonzero(self._unwritten))

    def _store(self, ids: IntArray) -> None:
        """Entries that wait, to pages in this order, dealt over the disks by their speeds."""
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
        """[n] entries, none twice. Raises BudgetError when memory cannot hold so many beside what stays."""
        self.wait()
        figures = self.figures
        with self.lock:
            self._let_go(wanted)
            here = self.memory.present[wanted]
            if int((~here).sum()) > self.memory.free:  # what was read ahead in vain makes way
                self._kept_ahead &= np.isin(np.arange(len(self._kept_ahead)), wanted)
                self._let_go(wanted)
            stays = self._hot.resident[wanted] | self._unwritten[wanted] | ~self._kept_ahead[wanted]
            missing = wanted[~here]
            self.memory.take(missing)
            self._hot.step(wanted)
            self._kept_ahead[:] = False
            self._note(wanted)
        figures.steps += 1
        figures.wanted += len(wanted)
        figures.resident += int((here & stays).sum())
        figures.ahead += int((here & ~stays).sum())
        lost = missing[~self._fetch(missing)]
        figures.lost += len(lost)
        with self.lock:
            rows = self.memory.slot_of[wanted]
        return EntryRead(rows=rows, ok=rows >= 0)

    def read_ahead(self, present: IntArray) -> None:
        """Begins to read what followed steps that read something like this; returns at once. Entries of a layer below will do,
        or those of the step before: what is told here and what is read next are remembered together."""
        self.wait()
        self._told = present
        if self.config.ahead_bytes >= self.entry_bytes and self._before.steps:
            self._ahead = self._thread.submit(self._read_ahead, present)

    def wait(self) -> None:
        """Until what is read ahead has come; all others here do it first. Raises what broke that off."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.result()

    def _read_ahead(self, present: IntArray) -> None:
        with self.lock:
            before, after = self._before.profile(), self._after.profile()
            before, after = _last_of_both(before, after)
            here = self.memory.present  # what of it is read next stays anyway
            budget = self.config.ahead_bytes - int(self._kept_ahead.sum()) * self.entry_bytes
        likely = Predictor(before=before, after=after).ahead(
            present, budget_bytes=budget, item_bytes=self.entry_bytes, resident=here
        )
        with self.lock:
            missing = likely[self.map.page_of[likely] >= 0][: self.memory.free]
            self.memory.take(missing)
            self._kept_ahead[missing] = True
        ok = self._fetch(missing)
        self.figures.read_ahead += int(ok.sum())

    # ------------------------------------------------------------------

    def packed_anew(self) -> None:
        """Called by the upkeep: what the next steps cost is what later ones are compared with."""
        with self.lock:
            self.drift, self._cost = None, []
            self.figures.packed += 1

    def check_integrity(self) -> None:
        """Raises IntegrityError. Nothing may be under way."""
        self.wait()
        self.memory.check_integrity()
        self.map.check_integrity()

    def close(self) -> None:
        """The disks forget all entries. No upkeep may be under way; the store stays open."""
        self.wait()
        self._thread.shutdown()
        rows = np.flatnonzero(self.map.live)
        self.store.forget(self.map.keys(rows))

    def _let_go(self, wanted: IntArray) -> None:
        """What neither stays nor is wanted now."""
        stays = self._hot.resident | self._unwritten | self._kept_ahead
        stays[wanted] = True
        self.memory.settle(self.store.unsettled())
        self.memory.release(np.flatnonzero(self.memory.present & ~stays))

    def _fetch(self, ids: IntArray) -> BoolArray:
        """Reads entries into slots that they have; one that does not come has none any more."""
        try:
            ok = self.pages.fetch(ids, self.memory.addresses(ids), self._gaps.addresses)
        except BaseException:  # else the next step would take for read what was not
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
                self.drift = Drift(after_clustering=float(cost[0] / cost[1]), threshold=self.config.drift)


def _last_of_both(before: Profile, after: Profile) -> tuple[Profile, Profile]:
    """The steps that both rings still have: the longer steps are, the fewer one holds."""
    steps = min(before.steps, after.steps)
    return before.part(before.steps - steps, before.steps), after.part(after.steps - steps, after.steps)
