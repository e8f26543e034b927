"""Packs the pages of an entry store by what is read together: a first time, and again when reading has changed.

When a step costs a quarter more than after the last packing, aged pages are packed again, but only after enough further
steps to learn from: packed by the first steps of a new topic, pages were hardly better than before (docs/log.md).

A round is planned on copies, which takes a second for 30,000 entries, and carried out some pages at a time: their
entries are read, written to new pages, and only then entered in the map. Whatever stops a round, every entry is where
the map says. While pages move, the disks hold some entries twice. So the first round needs as much free room as the
entries take; without it there is no round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polder.arrays import FloatArray, IntArray
from polder.diskstore.io import Arena
from polder.diskstore.model import page_speeds
from polder.swarm.activations import Profile
from polder.swarm.adaptation import page_fill, repack
from polder.swarm.clusters import PackConfig, Packing, pack, reading_order
from polder.swarm.entry_store import EntryStore
from polder.swarm.placement import anti_affine, with_replicas

__all__ = ["EntryUpkeep"]


@dataclass(frozen=True, kw_only=True)
class _Round:
    """The pages to write, in the order in which they will lie on the disks."""

    members: IntArray
    """[pages, parts]"""
    disks: IntArray
    """[pages, 2]"""
    fill: FloatArray
    """[pages]"""
    cooled: IntArray
    """Rows of the map whose second copies are not worth their room any more."""


class EntryUpkeep:
    """Called by one thread, at low priority."""

    def __init__(self, entries: EntryStore, *, pages_at_once: int = 16) -> None:
        """`pages_at_once`: how many pages one call of `advance` moves."""
        self._of = entries
        self._scratch = Arena(pages_at_once, entries.store.config.page_bytes)
        self._round: _Round | None = None
        self._at = 0
        self._aged_at: int | None = None
        self._wait_until = 0

    def advance(self) -> bool:
        """Plans a round if one is due, and carries out a part of it. Returns whether there is more to do now."""
        if self._round is None:
            self._round, self._at = self._roomy(self._plan()), 0
            if self._round is not None:
                self._cool(self._round.cooled)
        if self._round is None or self._hangs():
            return False
        self._move(self._round)
        if self._at < len(self._round.members):
            return True
        self._round = None
        self._of.packed_anew()
        return False

    def _plan(self) -> _Round | None:
        of = self._of
        with of.lock:
            first = of.stats.packed == 0
            if not (of.stats.steps >= max(self._wait_until, of.config.learn_steps) if first else self._aged(of)):
                return None
            self._aged_at = None
            profile, packing = of.ring.profile(), of.map.packing()
            disk_of, fill = of.map.disk_of.copy(), of.map.fill.copy()
        speeds = page_speeds(of.config.disks, of.store.config.page_bytes)
        config = PackConfig(page_blocks=of.page_entries)
        if first:
            packed = pack(profile, config, blocks=np.flatnonzero(packing.page_of >= 0))
            none = np.full((packed.pages, 2), -1, dtype=np.int64)
            none[:, 0] = anti_affine(profile.mapped(packed.page_of, size=packed.pages), speeds)
            return self._ordered(profile, packed, none, np.arange(packed.pages), speeds, none[:, 0])
        live = np.flatnonzero(disk_of[:, 0] >= 0)
        profile = profile.part(max(0, profile.steps - of.config.learn_steps), profile.steps)
        packing = Packing.of(packing.members[live], blocks=len(packing.page_of))
        again = repack(profile, packing, disk_of[live, 0], speeds, fill_before=fill[live], config=config)
        kept = disk_of[live]
        kept[again.moved] = -1
        kept[:, 0] = again.disk_of
        return self._ordered(profile, again.packing, kept, again.moved, speeds, live)

    def _aged(self, of: EntryStore) -> bool:
        """Whether reading has changed, and enough steps have passed since to learn from."""
        if of.drift is None or not of.drift.drifted:
            self._aged_at = None
            return False
        if self._aged_at is None:
            self._aged_at = of.stats.steps
        return of.stats.steps - self._aged_at >= of.config.learn_steps

    def _ordered(
        self, profile: Profile, packing: Packing, disks: IntArray, moved: IntArray, speeds: FloatArray, rows: IntArray
    ) -> _Round:
        """Orders the pages to write. `disks`: [pages, 2] with the second copies as they are. `rows`: [pages] rows of
        the map, for pages that are not `moved`. Pages that have become hot are written anew with a second copy.
        """
        of_pages = profile.mapped(packing.page_of, size=packing.pages)
        share = self._of.config.replica_share if len(speeds) > 1 else 0.0
        copies = with_replicas(disks[:, 0], of_pages.counts(), speeds, share=share)
        hot, has = copies[:, 1] >= 0, disks[:, 1] >= 0
        write = np.union1d(moved, np.flatnonzero(hot & ~has))
        order = reading_order(of_pages)
        chosen = order[np.isin(order, write)]
        return _Round(
            members=packing.members[chosen],
            disks=copies[chosen],
            fill=page_fill(profile, packing)[chosen],
            cooled=rows[has & ~hot],
        )

    def _roomy(self, planned: _Round | None) -> _Round | None:
        """The round, or None where the disks have no room for it; it is planned again later."""
        of = self._of
        if planned is None or len(planned.members) <= int(of.store.free.sum()):
            return planned
        with of.lock:
            of.stats.without_room += len(planned.members)
            self._wait_until = of.stats.steps + of.config.learn_steps
        return None

    def _cool(self, rows: IntArray) -> None:
        """Removes second copies of these rows where another copy exists; a disk may have died since."""
        of = self._of
        with of.lock:
            keys, second = of.map.keys(rows), of.map.disk_of[rows, 1].copy()
        elsewhere = of.store.lookup(keys).present
        elsewhere[np.arange(len(rows)), second] = False
        kept = elsewhere.any(axis=1)
        with of.lock:
            of.map.disk_of[rows[kept], 1] = -1
        of.store.forget(keys, np.where(kept, second, -1))

    def _hangs(self) -> bool:
        """Whether a hung request may still write to the memory that pages pass through."""
        lowest, hung = int(self._scratch.addresses[0]), self._of.store.unsettled()
        return bool(((hung >= lowest) & (hung < lowest + self._scratch.bytes.size)).any())

    def _move(self, planned: _Round) -> None:
        of = self._of
        some = slice(self._at, self._at + len(self._scratch.addresses))
        self._at = some.stop
        members, count = planned.members[some].copy(), len(planned.members[some])
        parts = self._scratch.bytes.reshape(-1, of.entry_bytes)
        addresses = (self._scratch.addresses[:, None] + np.arange(of.page_entries) * of.entry_bytes).reshape(-1)
        at = np.flatnonzero(members.reshape(-1) >= 0)
        ids = members.reshape(-1)[at]
        with of.lock:
            sources = np.where(members >= 0, of.map.page_of[members], -1)
        there = sources.reshape(-1)[at] >= 0
        there[there] = of.pages.fetch(ids[there], addresses[at[there]], addresses[:0])
        parts[at[~there]] = 0
        members.reshape(-1)[at[~there]] = -1
        full = np.flatnonzero((members >= 0).any(axis=1))
        written = of.pages.put(
            members[full],
            sources[full],
            self._scratch.addresses[:count][full],
            planned.disks[some][full],
            planned.fill[some][full],
        )
        with of.lock:
            of.stats.rewritten_pages += written
