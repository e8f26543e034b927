"""The index of tiers the last of which is a disk.

The engine's blocks never wait for a disk: `prepare_store` writes to the tiers before it only, and what lies in the last of those,
the host tier, is copied on from there (`prepare_spill`). So a block may lie on disk alone. For the faster tiers it is then as a
new one, and room is made for it when the engine has it again; and a block that has to leave them is not lost if it is on disk.

Blocks that a former run left on the disks have no entry until a request asks for them (`adopt`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.errors import ConfigError
from polder.tiers.disk_slots import DiskSlots
from polder.tiers.eviction import EvictionPolicy
from polder.tiers.index import BlockIndex, Places, key_numbers
from polder.tiers.pages import short_keys
from polder.tiers.slots import HostSlots, Slots

__all__ = ["DiskIndex", "Spill"]

_NOWHERE = -1
_LONG_AGO = -(1 << 62)
_RESERVE_SHARE = 32
"""Blocks that leave the faster tiers next are chosen so many times in one turnover of them."""

_CLEARED_AT_ONCE = 1024
"""Where a disk died the others may have too many pages: so many go with each spill."""


@dataclass(frozen=True, kw_only=True)
class Spill:
    """Row i of both is about the same block: where it is pinned in the host tier, and where it is written to on disk."""

    sources: Places
    targets: Places


class DiskIndex(BlockIndex):
    """See above. Not thread-safe."""

    def __init__(self, tiers: Sequence[Slots], policy: EvictionPolicy) -> None:
        """Raises ConfigError unless the last tier is a disk and the one before it plain memory."""
        if len(tiers) < 2 or not isinstance(tiers[-1], DiskSlots) or not isinstance(tiers[-2], HostSlots):
            raise ConfigError("tiers: a disk is written from host memory: set a host tier right before it")
        super().__init__(tiers, policy)
        self.host, self.disk = len(tiers) - 2, len(tiers) - 1
        self._written = self._tiers[:-1]
        self._slots: DiskSlots = tiers[-1]
        self.stripes: IntArray = np.zeros(self.capacity, dtype=np.int64)
        """Of each entry: consecutive numbers for consecutive blocks, see Pages."""
        self._entered = 0  # blocks that came to the faster tiers, ever
        self._entered_when_used = np.full(
            self.capacity, _LONG_AGO, dtype=np.int64
        )  # that, at an entry's last load from disk
        self._reserve: list[int] = []  # entries that leave the faster tiers next, the worst last
        self._reserved: npt.NDArray[np.bool_] = np.zeros(self.capacity, dtype=np.bool_)

    # ------------------------------------------------------------------ what a former run left

    def adopt(self, keys: Sequence[bytes], now: float) -> int:
        """Gives blocks that are unknown here, and among the pages of a former run, their entries. Returns how many."""
        if not self._slots.unbound:
            return 0
        unknown = [key for key in keys if key not in self._entry_of]
        slots = self._slots.claim(short_keys(unknown))
        found = np.flatnonzero(slots >= 0)
        if len(found):
            entries = np.array([self._free.pop() for _ in range(len(found))], dtype=np.int64)
            for row, entry in zip(found.tolist(), entries.tolist(), strict=True):
                self._entry_of[unknown[row]], self._keys[entry] = entry, unknown[row]
            self._reserved[entries] = self.was_read[entries] = False
            self._entered_when_used[entries] = _LONG_AGO
            self._lay(entries, slots[found])
            self._policy.insert(entries, key_numbers([unknown[row] for row in found.tolist()]), found, now)
        return len(found)

    # ------------------------------------------------------------------ from host to disk

    def spillable(self, entries: IntArray) -> IntArray:
        """Which of these entries lie in the host tier and neither lie on the disk nor are written there."""
        host, disk = self._place[entries, self.host], self._place[entries, self.disk]
        chosen: IntArray = entries[(host >= 0) & (disk < 0) & (self._writing[entries, self.disk] < 0)]
        return chosen

    def numbers(self, entries: IntArray) -> npt.NDArray[np.uint64]:
        return key_numbers([self._keys[entry] for entry in entries.tolist()])

    def settle_known(self, entries: IntArray) -> IntArray:
        """Of spillable entries those that have to be written: pages of a former run are adopted instead."""
        if not self._slots.unbound:
            return entries
        slots = self._slots.claim(short_keys([self._keys[entry] for entry in entries.tolist()]))
        known = slots >= 0
        self._lay(entries[known], slots[known])
        return entries[~known]

    def prepare_spill(self, entries: IntArray) -> tuple[Spill, IntArray] | None:
        """Pins spillable, distinct entries in the host tier and gives them slots on the disk, as many as there is room for; the
        worst blocks on the disk make room. Returns also the slots whose blocks did. None: there is no room at all.
        """
        entries = self.spillable(entries)
        slots = self._slots.take(len(entries))
        evicted = np.empty(0, dtype=np.int64)
        if len(slots) < len(entries):
            missing = len(entries) - len(slots) + min(self._slots.overcommitted, _CLEARED_AT_ONCE)
            # On a large disk some more: to look through all of them costs as much for one as for a thousand.
            evicted = self._clear_disk(max(missing, self._slots.capacity >> 12))
            slots = np.concatenate((slots, self._slots.take(len(entries) - len(slots))))
        entries = entries[: len(slots)]
        if not len(entries):
            return None
        rows = range(len(entries))
        at = np.arange(len(entries))
        keys = tuple(self._keys[entry] for entry in entries.tolist())
        sources = self._place[entries, self.host]
        self._pins[self.host, sources] += 1
        self._locks[entries] += 1
        for row, entry, slot in zip(rows, entries.tolist(), slots.tolist(), strict=True):
            self._write(row, entry, self.disk, slot)
        host, disk = np.full(len(entries), self.host), np.full(len(entries), self.disk)
        spill = Spill(
            sources=self._places(keys, at, entries, host, sources), targets=self._places(keys, at, entries, disk, slots)
        )
        return spill, evicted

    def complete_spill(self, spill: Spill, failed: Sequence[int], corrupt: Sequence[int]) -> None:
        """The pages are written, but for the rows in `failed`. `corrupt`: those of them whose bytes in the host tier were wrong."""
        self.complete_store(spill.targets, failed)
        self.complete_load(spill.sources, corrupt)

    def in_host(self, places: Places) -> IntArray:
        """Entries of these places that lie in the host tier and not on the disk: for `prepare_spill`, some time."""
        return self.spillable(np.unique(places.entries))

    # ------------------------------------------------------------------ as without a disk

    def touch(self, keys: Sequence[bytes], now: float) -> None:
        super().touch(keys, now)
        get = self._entry_of.get
        self._reserved[[entry for key in keys if (entry := get(key)) is not None]] = False

    def prepare_store(self, keys: Sequence[bytes], depths: IntArray, now: float) -> Places:
        get = self._entry_of.get
        # Where the prefix is known its numbers go on; a new one begins anywhere.
        start = next(
            (int(self.stripes[entry]) - at for at, key in enumerate(keys) if (entry := get(key)) is not None), None
        )
        places = super().prepare_store(keys, depths, now)
        if len(places.keys):
            if start is None:
                start = int(key_numbers(keys[:1])[0]) & 0xFFFF
            fresh = self._copies[places.entries] == 0
            self.stripes[places.entries[fresh]] = start + places.positions[fresh]
        return places

    def drop_all(self) -> None:
        self._slots.forget_inventory()
        super().drop_all()
        self._reserve.clear()
        self._reserved[:] = False

    # ------------------------------------------------------------------ inside

    def _lay(self, entries: IntArray, slots: IntArray) -> None:
        """These slots, which are taken, hold the pages of these entries."""
        self._place[entries, self.disk], self._owner[self.disk, slots] = slots, entries
        self._copies[entries] += 1

    def _enter(self, key: bytes, position: int, tier: int, slot: int) -> tuple[int, int, int, int]:
        row = super()._enter(key, position, tier, slot)
        self._reserved[row[1]] = False
        self._entered_when_used[row[1]] = _LONG_AGO
        self._entered += 1
        return row

    def _promote(self, known: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
        alone = [
            (at, entry)
            for at, entry in known
            if (self._place[entry, : self.disk] < 0).all() and (self._writing[entry, : self.disk] < 0).all()
        ]
        alone = self._worth_promoting(alone)
        freed = self._make_room(len(alone), {entry for _, entry in known}) if alone else []
        self._entered += len(freed)
        return [self._write(at, entry, *place) for (at, entry), place in zip(alone, freed, strict=False)]

    def _worth_promoting(self, alone: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those that would have been found in the faster tiers had they been promoted at their last use: fewer blocks have come
        there since than these tiers hold. Where what is used in turn is more than that, every promotion costs a copy, and the
        place of a block that is as good."""
        room = sum(tier.capacity for tier in self._written)
        worth = [(at, entry) for at, entry in alone if self._entered - int(self._entered_when_used[entry]) < room]
        self._entered_when_used[[entry for _, entry in alone]] = self._entered
        return worth

    def _make_room(self, count: int, keep: set[int]) -> list[tuple[int, int]]:
        """As without a disk, but what is on disk, too, leaves the faster tiers only."""
        freed: list[tuple[int, int]] = []
        for entry in self._next_victims(count, keep, least_copies=2) if self.disk > 1 else ():
            freed.append(self._vacate(entry, int(np.flatnonzero(self._place[entry] >= 0)[0])))
        if len(freed) < count:
            for entry in self._next_victims(count - len(freed), keep, least_copies=1):
                fast = np.flatnonzero(self._place[entry, : self.disk] >= 0).tolist()
                freed.extend(self._vacate(entry, tier) for tier in fast)
                self._forget_if_empty(entry)
        for tier, slot in freed[count:]:
            self._release(tier, slot)
        return sorted(freed[:count])

    def _next_victims(self, count: int, keep: set[int], *, least_copies: int) -> list[int]:
        """Up to `count` entries with so many copies in the faster tiers, the worst first, none that is in use."""
        if least_copies > 1:
            return self._worst_in_fast_tiers(count, keep, least_copies)
        chosen = self._from_reserve(count, keep)
        if len(chosen) < count:
            some = max(count, sum(tier.capacity for tier in self._written) // _RESERVE_SHARE)
            self._reserve = self._worst_in_fast_tiers(some, set(), least_copies)[::-1]
            self._reserved[self._reserve] = True
            chosen = self._from_reserve(count, keep)
        if len(chosen) < count:
            chosen = self._worst_in_fast_tiers(count, keep, least_copies)
        return chosen

    def _from_reserve(self, count: int, keep: set[int]) -> list[int]:
        """Those that were not asked for since they were chosen; what is passed over now is chosen again later."""
        chosen: list[int] = []
        while self._reserve and len(chosen) < count:
            entry = self._reserve.pop()
            here = self._reserved[entry] and (self._place[entry, : self.disk] >= 0).any()
            if here and not self._locks[entry] and entry not in keep:
                chosen.append(entry)
            self._reserved[entry] = False
        if len(chosen) < count:  # none of them has been vacated yet: they may be chosen again
            return []
        return chosen

    def _worst_in_fast_tiers(self, count: int, keep: set[int], least_copies: int) -> list[int]:
        owners = np.concatenate([self._owner[tier, : slots.capacity] for tier, slots in enumerate(self._written)])
        entries, copies = np.unique(owners[owners >= 0], return_counts=True)
        entries = entries[(copies >= least_copies) & (self._locks[entries] == 0)]
        pinned = np.ones(self.capacity, dtype=np.bool_)
        pinned[entries] = False
        pinned[list(keep)] = True
        worst: list[int] = self._policy.victims(count, pinned).tolist() if not pinned.all() else []
        return worst

    def _clear_disk(self, count: int) -> IntArray:
        """Makes room for `count` pages, or fewer: the worst blocks on disk that nobody uses. Returns their slots."""
        pinned = (self._place[:, self.disk] < 0) | (self._locks > 0)
        freed = []
        for entry in self._policy.victims(count, pinned).tolist():
            _, slot = self._vacate(entry, self.disk)
            self._forget_if_empty(entry)
            self._release(self.disk, slot)
            freed.append(slot)
        return np.array(freed, dtype=np.int64)
