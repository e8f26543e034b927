"""The accounts of the index: entries, their places in the tiers, and who uses them. The decisions are in index.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polder.arrays import BoolArray, IntArray
from polder.diskstore.keys import Keys
from polder.errors import ConfigError, IntegrityError
from polder.tiers.eviction.policy import EvictionPolicy
from polder.tiers.slots import Slots, block_ids

__all__ = ["ABSENT", "NOWHERE", "PENDING", "BlockTable", "Places", "Row"]

ABSENT = -1
PENDING = -2
NOWHERE = -1
_LONG_AGO = -(1 << 62)

Row = tuple[int, int, int, int]
"""(position, entry, tier, slot)"""


@dataclass(frozen=True, kw_only=True)
class Places:
    """n places that a transfer reads or writes. A block may come several times, once for each tier."""

    positions: IntArray
    """[n] which of the caller's keys."""
    entries: IntArray
    tiers: IntArray
    slots: IntArray
    generations: IntArray
    """[n] changes when a slot is lost or everything is dropped, so that a late report does not touch its next block."""

    def __len__(self) -> int:
        return len(self.entries)


class BlockTable:
    """Which blocks lie in which slots. Not thread-safe: it belongs to the scheduler's thread. All arrays are allocated
    once."""

    def __init__(self, tiers: Sequence[Slots], policy: EvictionPolicy) -> None:
        """`policy` has a capacity of at least the sum of the tiers' capacities.

        Raises ConfigError unless a tier that is written behind is the last one and comes right after permanent memory.
        """
        self._tiers, self._policy = tuple(tiers), policy
        self._direct = tuple(tier for tier in tiers if not tier.behind)
        self.behind = len(self._direct)
        """The number of the tier that is written behind, if there is one."""
        self.source = self.behind - 1
        """The number of the tier that it is written from."""
        behind = self._tiers[self.behind :]
        if behind and not (len(behind) == 1 and behind[0].behind and self._direct and self._direct[-1].permanent):
            raise ConfigError("tiers: a disk is written from host memory: set a host tier right before it")
        count, widest = sum(t.capacity for t in tiers), max((t.capacity for t in tiers), default=0)
        self.capacity = count
        self._entry_of: dict[bytes, int] = {}
        self._keys: list[bytes] = [b""] * count
        self._free = list(range(count - 1, -1, -1))
        self.ids: Keys = np.zeros((count, 2), dtype=np.uint64)
        """[entries, 2] see `block_ids`."""
        self.stripes: IntArray = np.zeros(count, dtype=np.int64)
        """[entries] consecutive numbers for consecutive blocks of a prefix, from a start that differs between prefixes.
        """
        self.was_read: BoolArray = np.zeros(count, dtype=np.bool_)
        self._place = np.full((count, len(tiers)), NOWHERE, dtype=np.int64)
        self._writing = np.full((count, len(tiers)), NOWHERE, dtype=np.int64)
        self._copies = np.zeros(count, dtype=np.int8)  # places in direct tiers
        self._locks = np.zeros(count, dtype=np.int32)  # how often one of the places is written or pinned
        self._owner = np.full((len(tiers), widest), NOWHERE, dtype=np.int64)
        self._pins = np.zeros((len(tiers), widest), dtype=np.int64)
        self._doomed = np.zeros((len(tiers), widest), dtype=np.bool_)  # dropped while pinned
        self._generation = np.zeros((len(tiers), widest), dtype=np.int64)
        self._entered = 0  # blocks that came to the direct tiers, ever
        self._entered_when_used = np.full(count, _LONG_AGO, dtype=np.int64)  # `_entered` at an entry's last promotion
        self._reserve: list[int] = []  # victims chosen in bulk, the worst last
        self._reserved: BoolArray = np.zeros(count, dtype=np.bool_)
        self.evicted = self.evicted_unread = 0

    def __len__(self) -> int:
        return len(self._entry_of)

    # ------------------------------------------------------------------ look up

    def find(self, keys: Sequence[bytes]) -> IntArray:
        """[n] the fastest tier that each block can be loaded from; PENDING while it is only being written; or
        ABSENT."""
        entries = np.array([self._entry_of.get(key, NOWHERE) for key in keys], dtype=np.int64)
        found = np.full(len(keys), ABSENT, dtype=np.int64)
        known = entries >= 0
        found[known] = PENDING
        for tier in range(len(self._tiers) - 1, -1, -1):
            found[known & (self._place[entries, tier] != NOWHERE)] = tier
        return found

    def slot(self, key: bytes, tier: int) -> int:
        """The slot that a block can be loaded from, -1 where it has none in this tier."""
        entry = self._entry_of.get(key, NOWHERE)
        return int(self._place[entry, tier]) if entry >= 0 else NOWHERE

    def keys(self, entries: IntArray) -> list[bytes]:
        return [self._keys[entry] for entry in entries.tolist()]

    def touch(self, keys: Sequence[bytes], now: float) -> None:
        """A request has asked for these blocks, first block of the prefix first."""
        entries = [self._entry_of.get(key, NOWHERE) for key in keys]
        known = np.array([entry for entry in entries if entry != NOWHERE], dtype=np.int64)
        if len(known):
            self._policy.touch(known, now)
            self._reserved[known] = False
        if len(known) < len(keys):
            missed = [key for key, entry in zip(keys, entries, strict=True) if entry == NOWHERE]
            self._policy.missed(block_ids(missed)[:, 0], now)

    # ------------------------------------------------------------------ drop

    def refresh(self) -> int:
        """Forgets places whose memory was taken back by its owner, or whose disk was lost. Returns how many."""
        count = 0
        for tier, slots in enumerate(self._tiers):
            for slot in slots.lost().tolist():
                count += 1
                self._lose(tier, slot)
        return count

    def drop_all(self) -> None:
        """Forgets everything, transfers under way included. The caller sees that they end before any later transfer
        begins."""
        for tier, slots in enumerate(self._tiers):
            slots.forget_unclaimed()
            busy = np.flatnonzero((self._owner[tier] != NOWHERE) | self._doomed[tier])
            slots.give(busy)
            self._generation[tier, busy] += 1
            self._owner[tier, busy] = NOWHERE
            self._pins[tier, busy] = 0
            self._doomed[tier, busy] = False
        entries = np.array(sorted(self._entry_of.values()), dtype=np.int64)
        if len(entries):
            self._policy.remove(entries)
        self._place[entries] = self._writing[entries] = NOWHERE
        self._copies[entries] = self._locks[entries] = 0
        self._free.extend(entries.tolist())
        self._entry_of.clear()
        self._reserve.clear()
        self._reserved[:] = False

    def check_integrity(self) -> None:
        """Raises IntegrityError unless entries, places, locks and the tiers' own books agree."""
        if len(self._entry_of) + len(self._free) != self.capacity:
            raise IntegrityError(f"{len(self._entry_of)} entries and {len(self._free)} free ones of {self.capacity}")
        for key, entry in self._entry_of.items():
            here = np.concatenate([self._place[entry], self._writing[entry]])
            if self._keys[entry] != key or (here == NOWHERE).all():
                raise IntegrityError(f"entry {entry} lies nowhere, or under another key")
        locks = (self._writing != NOWHERE).sum(axis=1)
        for tier, slots in enumerate(self._tiers):
            placed = np.concatenate([self._place[:, tier], self._writing[:, tier]])
            placed = placed[placed != NOWHERE]
            doomed = int(self._doomed[tier].sum())
            if len(np.unique(placed)) != len(placed) or (self._owner[tier, placed] == NOWHERE).any():
                raise IntegrityError(f"{slots.name}: two blocks in one slot, or a slot without an owner")
            if slots.stats().used != len(placed) + doomed:
                raise IntegrityError(f"{slots.name}: {slots.stats().used} slots taken, {len(placed)} + {doomed} in use")
            slots.check_integrity()
            owned = np.flatnonzero(self._owner[tier] != NOWHERE)
            np.add.at(locks, self._owner[tier, owned], self._pins[tier, owned])
        copies = (self._place[:, : self.behind] != NOWHERE).sum(axis=1)
        if not np.array_equal(copies, self._copies) or not np.array_equal(locks, self._locks):
            raise IntegrityError("the entries' counts of copies or locks are wrong")
        self._policy.check_integrity()

    # ------------------------------------------------------------------ one entry, one place

    def _new_entry(self, key: bytes, id_: Keys) -> int:
        entry = self._free.pop()
        self._entry_of[key], self._keys[entry], self.ids[entry] = entry, key, id_
        self.was_read[entry] = self._reserved[entry] = False
        self._entered_when_used[entry] = _LONG_AGO
        return entry

    def _write(self, position: int, entry: int, tier: int, slot: int) -> Row:
        self._writing[entry, tier], self._owner[tier, slot] = slot, entry
        self._locks[entry] += 1
        return position, entry, tier, slot

    def _lay(self, entries: IntArray, tier: int, slots: IntArray) -> None:
        """These taken slots hold the blocks of these entries already."""
        self._place[entries, tier], self._owner[tier, slots] = slots, entries
        self._copies[entries] += tier < self.behind

    def _pin(self, entries: IntArray, tiers: IntArray, slots: IntArray) -> None:
        np.add.at(self._pins, (tiers, slots), 1)
        np.add.at(self._locks, entries, 1)

    def _places(self, positions: IntArray, entries: IntArray, tiers: IntArray, slots: IntArray) -> Places:
        generations = self._generation[tiers, slots].copy()
        return Places(positions=positions, entries=entries, tiers=tiers, slots=slots, generations=generations)

    def _vacate(self, entry: int, tier: int) -> tuple[int, int]:
        """Takes a place from an entry; the slot is nobody's then."""
        slot = int(self._place[entry, tier])
        self._place[entry, tier] = self._owner[tier, slot] = NOWHERE
        self._copies[entry] -= tier < self.behind
        return tier, slot

    def _forget_if_empty(self, entry: int) -> None:
        if self._locks[entry] or (self._place[entry] != NOWHERE).any():
            return
        del self._entry_of[self._keys[entry]]
        self._policy.remove(np.array([entry], dtype=np.int64))
        self.evicted += 1
        self.evicted_unread += not self.was_read[entry]
        self._free.append(entry)

    def _release(self, tier: int, slot: int) -> None:
        """The slot holds no block any more. It is given back as soon as nobody reads it."""
        self._owner[tier, slot] = NOWHERE
        self._doomed[tier, slot] = self._pins[tier, slot] > 0
        if not self._doomed[tier, slot]:
            self._tiers[tier].give(np.array([slot], dtype=np.int64))

    def _lose(self, tier: int, slot: int) -> None:
        """The slot ceased to exist: whatever refers to it refers to an older generation."""
        entry = int(self._owner[tier, slot])
        if entry != NOWHERE:
            if self._writing[entry, tier] == slot:
                self._writing[entry, tier] = NOWHERE
                self._locks[entry] -= 1
            else:
                self._locks[entry] -= self._pins[tier, slot]
                self._vacate(entry, tier)
            self._forget_if_empty(entry)
        self._generation[tier, slot] += 1
        self._owner[tier, slot] = NOWHERE
        self._pins[tier, slot] = 0
        self._doomed[tier, slot] = False
