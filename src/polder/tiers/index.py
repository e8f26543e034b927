"""The index of one engine's tiers: which blocks lie in which slots.

A block has an **entry** while it lies in some tier, and at most one **place** (a slot) in each tier. Tiers are numbered
from the fastest (0) to the slowest. There is one eviction policy for all tiers together; it orders entries, not places.
To make room, blocks that lie in two tiers lose their faster copy first, so together the tiers hold as many different
blocks as they have slots.

A place is in one of these states:

    absent -> prepare_store -> being written -> complete_store -> loadable
    loadable -> prepare_load -> pinned -> complete_load -> loadable

A place that is being written can be neither loaded nor evicted. A pinned place can be lost (its owner took the memory
back, so the load will fail) or dropped, but its slot is not used again before the load has ended.

The last tier may be written **behind** the one before it, in the background (see `Slots.behind`; the disk is). The
engine's blocks are never copied there directly: `prepare_spill` copies what lies in the tier before it. So a block may
lie in the last tier alone. When the engine computes or loads such a block again, it may get a place in the direct tiers
back; and a block that has to leave the direct tiers is not lost if it lies in the last one. Blocks that an earlier run
left there get entries when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polder.arrays import IntArray, UintArray
from polder.errors import IntegrityError
from polder.tiers.slots import block_ids
from polder.tiers.table import ABSENT, NOWHERE, PENDING, BlockTable, Places, Row

__all__ = ["ABSENT", "PENDING", "BlockIndex", "Places", "Spill"]

_RESERVE_SHARE = 32
"""Victims are chosen in bulk, so that this many choices replace the whole content of the direct tiers."""
_CLEARED_AT_ONCE = 1024
"""When a disk dies, the others may have too many pages: each spill evicts at most this many of them."""


@dataclass(frozen=True, kw_only=True)
class Spill:
    """A transfer from the host tier to the disk. Row i of both tables is the same block."""

    sources: Places
    targets: Places


class BlockIndex(BlockTable):
    """Decides where blocks go, and which blocks make room for them."""

    def adopt(self, keys: Sequence[bytes], now: float) -> None:
        """Gives entries to blocks that are unknown here but were left in a tier by an earlier run."""
        for tier, slots in enumerate(self._tiers):
            if not slots.unclaimed:
                continue
            unknown = [key for key in keys if key not in self._entry_of]
            ids = block_ids(unknown)
            claimed = slots.claim(ids)
            found = np.flatnonzero(claimed >= 0)
            if len(found):
                entries = np.array([self._new_entry(unknown[row], ids[row]) for row in found.tolist()], dtype=np.int64)
                self._lay(entries, tier, claimed[found])
                self._policy.insert(entries, ids[found, 0], found, now)

    # ------------------------------------------------------------------ load

    def prepare_load(self, keys: Sequence[bytes]) -> Places:
        """Pins the fastest place of each block. Raises IntegrityError unless all of them can be loaded."""
        tiers = self.find(keys)
        if (tiers < 0).any():
            raise IntegrityError(f"{int((tiers < 0).sum())} of {len(keys)} blocks cannot be loaded")
        entries = np.array([self._entry_of[key] for key in keys], dtype=np.int64)
        slots = self._place[entries, tiers]
        self._pin(entries, tiers, slots)
        self.was_read[entries] = True
        return self._places(np.arange(len(keys)), entries, tiers, slots)

    def complete_load(self, places: Places, failed: Sequence[int]) -> None:
        """The bytes were read. The places of rows in `failed` gave none, or wrong ones: they are dropped."""
        for row in failed:
            entry, tier, slot = int(places.entries[row]), int(places.tiers[row]), int(places.slots[row])
            if self._generation[tier, slot] == places.generations[row] and self._owner[tier, slot] == entry:
                self._locks[entry] -= self._pins[tier, slot]
                self._vacate(entry, tier)
                self._release(tier, slot)
                self._forget_if_empty(entry)
        for row, (entry, tier, slot) in enumerate(_rows(places)):
            if self._generation[tier, slot] != places.generations[row]:
                continue  # lost meanwhile
            self._pins[tier, slot] -= 1
            if self._owner[tier, slot] == entry:
                self._locks[entry] -= 1
            elif not self._pins[tier, slot]:
                self._release(tier, slot)

    # ------------------------------------------------------------------ store

    def prepare_store(self, keys: Sequence[bytes], depths: IntArray, now: float) -> Places:
        """Chooses where blocks that the engine has are to be written, and makes room for new ones.

        New blocks go to free slots, the fastest tier first, or to slots that are freed for them. Every block, new or
        known, also gets a copy in each direct tier that has free slots and lacks it: a faster one serves it sooner, a
        slower one keeps it when lent memory is recalled.
        """
        self.refresh()
        first = {key: i for i, key in reversed(list(enumerate(keys)))}  # a key that comes twice is written once
        fresh = [i for i in sorted(first.values()) if keys[i] not in self._entry_of]
        start = self._stripe_start(keys)
        rows = self._place_new(keys, depths, fresh, now)
        known = [(i, self._entry_of[keys[i]]) for i in sorted(first.values()) if keys[i] in self._entry_of]
        for tier, slots in enumerate(self._direct):
            lacking = [
                (i, entry)
                for i, entry in known
                if self._place[entry, tier] == NOWHERE and self._writing[entry, tier] == NOWHERE
            ]
            for (i, entry), slot in zip(lacking, slots.take(len(lacking)).tolist(), strict=False):
                rows.append(self._write(i, entry, tier, slot))
        rows.extend(self._promote(known))
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        positions, entries, tiers, slots_ = table[np.argsort(table[:, 0], kind="stable")].T
        new = (self._place[entries] == NOWHERE).all(axis=1)
        self.stripes[entries[new]] = start + positions[new]
        return self._places(positions, entries, tiers, slots_)

    def complete_store(self, places: Places, failed: Sequence[int]) -> None:
        """The bytes were written, except for the rows in `failed`: their slots are given back."""
        bad = set(failed)
        for row, (entry, tier, slot) in enumerate(_rows(places)):
            if self._generation[tier, slot] != places.generations[row] or self._writing[entry, tier] != slot:
                continue  # lost meanwhile
            self._writing[entry, tier] = NOWHERE
            self._locks[entry] -= 1
            if row in bad:
                self._release(tier, slot)
                self._forget_if_empty(entry)
            else:
                self._place[entry, tier] = slot
                self._copies[entry] += tier < self.behind

    # ------------------------------------------------------------------ spill: from the host tier to the disk

    def spillable(self, entries: IntArray) -> IntArray:
        """Which of these entries lie in the host tier, and neither lie on the disk nor are being written there."""
        host, disk = self._place[entries, self.source], self._place[entries, self.behind]
        chosen: IntArray = entries[(host >= 0) & (disk < 0) & (self._writing[entries, self.behind] < 0)]
        return chosen

    def adopt_entries(self, entries: IntArray) -> IntArray:
        """Gives spillable entries their places among the pages that an earlier run left. Returns those that have none
        there."""
        slots = self._tiers[self.behind]
        if not slots.unclaimed:
            return entries
        claimed = slots.claim(self.ids[entries])
        known = claimed >= 0
        self._lay(entries[known], self.behind, claimed[known])
        return entries[~known]

    def prepare_spill(self, entries: IntArray) -> tuple[Spill, IntArray] | None:
        """Pins distinct entries in the host tier and gives them slots on the disk. The worst blocks on the disk make
        room.

        Returns the spill, which may have fewer rows than `entries`, and the slots that were evicted for it; None when
        there is no room at all.
        """
        entries = self.spillable(entries)
        disk = self._tiers[self.behind]
        slots = disk.take(len(entries))
        evicted = np.empty(0, dtype=np.int64)
        if len(slots) < len(entries):
            missing = len(entries) - len(slots) + min(disk.overcommitted, _CLEARED_AT_ONCE)
            # On a large disk some more: to look through all of it costs as much for one block as for a thousand.
            evicted = self._clear_disk(max(missing, disk.capacity >> 12))
            slots = np.concatenate((slots, disk.take(len(entries) - len(slots))))
        entries = entries[: len(slots)]
        if not len(entries):
            return None
        at = np.arange(len(entries))
        host, target = np.full(len(entries), self.source), np.full(len(entries), self.behind)
        sources = self._place[entries, self.source]
        self._pin(entries, host, sources)
        for row, (entry, slot) in enumerate(zip(entries.tolist(), slots.tolist(), strict=True)):
            self._write(row, entry, self.behind, slot)
        spill = Spill(
            sources=self._places(at, entries, host, sources), targets=self._places(at, entries, target, slots)
        )
        return spill, evicted

    def complete_spill(self, spill: Spill, failed: Sequence[int], corrupt: Sequence[int]) -> None:
        """The pages were written, except for the rows in `failed`. `corrupt`: those of them whose host copy was
        wrong."""
        self.complete_store(spill.targets, failed)
        self.complete_load(spill.sources, corrupt)

    # ------------------------------------------------------------------ new and known blocks

    def _place_new(self, keys: Sequence[bytes], depths: IntArray, fresh: Sequence[int], now: float) -> list[Row]:
        """Entries and slots for new blocks, in the order of the prefix: what does not fit is its end. `fresh`: their
        positions."""
        rows: list[Row] = []
        ids = dict(zip(fresh, block_ids([keys[i] for i in fresh]), strict=True))
        todo = list(fresh)
        for tier, slots in enumerate(self._direct):
            taken = slots.take(len(todo)).tolist()
            rows.extend(self._enter(keys[i], ids[i], i, (tier, slot)) for i, slot in zip(todo, taken, strict=False))
            todo = todo[len(taken) :]
        if todo:
            wanted = self._policy.admits(np.array([ids[i][0] for i in todo], dtype=np.uint64), depths[todo], now)
            todo = [i for i, wants in zip(todo, wanted.tolist(), strict=True) if wants]
            # No block of this prefix makes room for one behind it.
            keep = {self._entry_of[key] for key in keys if key in self._entry_of}
            room = self._make_room(len(todo), keep)
            rows.extend(self._enter(keys[i], ids[i], i, place) for i, place in zip(todo, room, strict=False))
        if rows:
            at = np.array([row[0] for row in rows], dtype=np.int64)
            entries = np.array([row[1] for row in rows], dtype=np.int64)
            self._policy.insert(entries, self.ids[entries, 0], depths[at], now)
        return rows

    def _promote(self, known: list[tuple[int, int]]) -> list[Row]:
        """Makes room in the direct tiers for some of the known blocks, given as (position, entry), that lie on the disk
        alone.

        A block is promoted if it would have been found in the direct tiers had it been promoted at its last use: fewer
        blocks have come there since than these tiers hold. Where more than that is used in turn, each promotion would
        cost a copy and the place of a block that is as good.
        """
        nowhere = (
            (self._place[entry, : self.behind] < 0).all() and (self._writing[entry, : self.behind] < 0).all()
            for _, entry in known
        )
        alone = [row for row, is_alone in zip(known, nowhere, strict=True) if is_alone]
        if not alone:
            return []
        room = sum(tier.capacity for tier in self._direct)
        worth = [(at, entry) for at, entry in alone if self._entered - int(self._entered_when_used[entry]) < room]
        self._entered_when_used[[entry for _, entry in alone]] = self._entered
        freed = self._make_room(len(worth), {entry for _, entry in known})
        self._entered += len(freed)
        return [self._write(at, entry, *place) for (at, entry), place in zip(worth, freed, strict=False)]

    def _stripe_start(self, keys: Sequence[bytes]) -> int:
        """The stripe number of the first of these blocks: where a part of the prefix is known, its numbers continue."""
        for at, key in enumerate(keys):
            if (entry := self._entry_of.get(key)) is not None:
                return int(self.stripes[entry]) - at
        return int(block_ids(keys[:1])[0, 0]) & 0xFFFF if keys else 0

    # ------------------------------------------------------------------ room

    def _make_room(self, count: int, keep: set[int]) -> list[tuple[int, int]]:
        """Frees up to `count` places (tier, slot) in the direct tiers: first the faster copies of blocks that lie in
        two of them, then the places of the worst blocks. `keep`: entries that stay."""
        freed: list[tuple[int, int]] = []
        for entry in self._worst(count, keep, least_copies=2) if self.behind > 1 else ():
            freed.append(self._vacate(entry, int(np.flatnonzero(self._place[entry] != NOWHERE)[0])))
        if len(freed) < count:
            for entry in self._victims(count - len(freed), keep):
                tiers = np.flatnonzero(self._place[entry, : self.behind] != NOWHERE).tolist()
                freed.extend(self._vacate(entry, tier) for tier in tiers)
                self._forget_if_empty(entry)
        for tier, slot in freed[count:]:
            self._release(tier, slot)
        return sorted(freed[:count])

    def _victims(self, count: int, keep: set[int]) -> list[int]:
        """Up to `count` entries in the direct tiers that are not in use, the worst first.

        With a disk the policy orders far more entries than lie in the direct tiers, so victims are chosen in bulk
        there.
        """
        if self.behind == len(self._tiers):
            return self._worst(count, keep, least_copies=1)
        chosen = self._from_reserve(count, keep)
        if len(chosen) < count:
            some = max(count, sum(tier.capacity for tier in self._direct) // _RESERVE_SHARE)
            self._reserve = self._worst(some, set(), least_copies=1)[::-1]
            self._reserved[self._reserve] = True
            chosen = self._from_reserve(count, keep)
        return chosen if len(chosen) == count else self._worst(count, keep, least_copies=1)

    def _from_reserve(self, count: int, keep: set[int]) -> list[int]:
        """`count` reserved entries that were not asked for since they were chosen; none when there are too few."""
        chosen: list[int] = []
        while self._reserve and len(chosen) < count:
            entry = self._reserve.pop()
            if self._reserved[entry] and self._copies[entry] and not self._locks[entry] and entry not in keep:
                chosen.append(entry)
            self._reserved[entry] = False
        return chosen if len(chosen) == count else []

    def _worst(self, count: int, keep: set[int], *, least_copies: int) -> list[int]:
        pinned = (self._copies < least_copies) | (self._locks > 0)
        pinned[list(keep)] = True
        worst: list[int] = [] if pinned.all() else self._policy.victims(count, pinned).tolist()
        return worst

    def _clear_disk(self, count: int) -> IntArray:
        """Evicts up to `count` blocks from the disk, the worst that nobody uses. Returns their slots."""
        pinned = (self._place[:, self.behind] < 0) | (self._locks > 0)
        freed = []
        for entry in self._policy.victims(count, pinned).tolist():
            _, slot = self._vacate(entry, self.behind)
            self._forget_if_empty(entry)
            self._release(self.behind, slot)
            freed.append(slot)
        return np.array(freed, dtype=np.int64)

    def _enter(self, key: bytes, id_: UintArray, position: int, place: tuple[int, int]) -> Row:
        self._entered += 1
        return self._write(position, self._new_entry(key, id_), *place)


def _rows(places: Places) -> list[tuple[int, int, int]]:
    return list(zip(places.entries.tolist(), places.tiers.tolist(), places.slots.tolist(), strict=True))
