"""The index of one engine's tiers: from block hash to places.

A block has an entry while it lies in some tier, and at most one place in each. Tiers are numbered from the fastest (0) to the
slowest. The eviction policy sees entries, not places, so there is one order of worth over all tiers together; what is in two tiers
is the first to make room, by losing its faster copy, so that together the tiers hold as many different blocks as they have slots.

All arrays have one row an entry or a slot and are made once. Between `prepare_store` and `complete_store` a place is written: it
can be neither loaded nor evicted. Between `prepare_load` and `complete_load` a place is pinned: it can be lost (its owner took the
memory back: the load will fail) or dropped, but its slot is not used again before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.errors import IntegrityError
from polder.tiers.eviction import EvictionPolicy
from polder.tiers.slots import Slots

__all__ = ["ABSENT", "PENDING", "BlockIndex", "Places", "key_numbers"]

ABSENT = -1
PENDING = -2
_NOWHERE = -1


@dataclass(frozen=True, kw_only=True)
class Places:
    """Places of blocks that a transfer reads or writes; row i is about `keys[i]`, and a key may come several times."""

    keys: tuple[bytes, ...]
    positions: IntArray
    """Which of the caller's keys."""
    entries: IntArray
    tiers: IntArray
    slots: IntArray
    generations: IntArray


def key_numbers(keys: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    """64 bits of each key: what policies and checksums know blocks by. Both ends count: vLLM puts the hash first and the group
    last."""
    words = np.frombuffer(b"".join(key[:8] + key[-8:] for key in keys), dtype="<u8").reshape(-1, 2)
    numbers: npt.NDArray[np.uint64] = words[:, 0] ^ words[:, 1]
    return numbers


class BlockIndex:
    """See above. Not thread-safe: it lives in the scheduler's thread."""

    def __init__(self, tiers: Sequence[Slots], policy: EvictionPolicy) -> None:
        """`policy` has a capacity of at least the sum of the tiers'."""
        self._tiers, self._policy = tuple(tiers), policy
        self._written = self._tiers
        """Those that `prepare_store` writes to: all but one that is written behind another, see disk_index.py."""
        count, widest = sum(t.capacity for t in tiers), max((t.capacity for t in tiers), default=0)
        self.capacity = count
        self._entry_of: dict[bytes, int] = {}
        self._keys: list[bytes] = [b""] * count
        self._free = list(range(count - 1, -1, -1))
        self._place = np.full((count, len(tiers)), _NOWHERE, dtype=np.int64)
        self._writing = np.full((count, len(tiers)), _NOWHERE, dtype=np.int64)
        self._copies = np.zeros(count, dtype=np.int64)  # places of each entry
        self._locks = np.zeros(count, dtype=np.int64)  # and how often one of them is written or pinned
        self.was_read = np.zeros(count, dtype=np.bool_)
        self._owner = np.full((len(tiers), widest), _NOWHERE, dtype=np.int64)
        self._pins = np.zeros((len(tiers), widest), dtype=np.int64)
        self._doomed = np.zeros((len(tiers), widest), dtype=np.bool_)
        self._generation = np.zeros((len(tiers), widest), dtype=np.int64)
        self.evicted = self.evicted_unread = 0

    def __len__(self) -> int:
        return len(self._entry_of)

    # ------------------------------------------------------------------ look up

    def find(self, keys: Sequence[bytes]) -> IntArray:
        """For each key the fastest tier that it can be loaded from, PENDING while it is only being written, or ABSENT."""
        get = self._entry_of.get
        entries = np.array([get(key, _NOWHERE) for key in keys], dtype=np.int64)
        found = np.full(len(keys), ABSENT, dtype=np.int64)
        known = entries >= 0
        found[known] = PENDING
        for tier in range(len(self._tiers) - 1, -1, -1):
            found[known & (self._place[entries, tier] != _NOWHERE)] = tier
        return found

    def touch(self, keys: Sequence[bytes], now: float) -> None:
        """A request has asked for these blocks, first block of the prefix first."""
        get = self._entry_of.get
        entries = [get(key, _NOWHERE) for key in keys]
        known = np.array([entry for entry in entries if entry != _NOWHERE], dtype=np.int64)
        if len(known):
            self._policy.touch(known, now)
        if len(known) < len(keys):
            self._policy.missed(key_numbers([k for k, e in zip(keys, entries, strict=True) if e == _NOWHERE]), now)

    # ------------------------------------------------------------------ load

    def prepare_load(self, keys: Sequence[bytes]) -> Places:
        """Pins the fastest place of each key. All must be loadable; raises IntegrityError otherwise."""
        tiers = self.find(keys)
        if (tiers < 0).any():
            raise IntegrityError(f"{int((tiers < 0).sum())} of {len(keys)} blocks cannot be loaded")
        entries = np.array([self._entry_of[key] for key in keys], dtype=np.int64)
        slots = self._place[entries, tiers]
        np.add.at(self._pins, (tiers, slots), 1)
        np.add.at(self._locks, entries, 1)
        self.was_read[entries] = True
        return self._places(tuple(keys), np.arange(len(keys)), entries, tiers, slots)

    def complete_load(self, places: Places, failed: Sequence[int]) -> None:
        """The bytes are read. Places whose rows are in `failed` gave none, or wrong ones: they are dropped."""
        self._drop_places(places, failed)
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
        """Chooses where blocks that the engine holds are to be written, making room for new ones.

        New blocks go where slots are free, fastest tier first, or where one is made free. Every block, new or known, also gets a
        copy in each tier that has free slots and lacks it: a faster one serves it sooner, a slower one saves it when lent memory is
        recalled.
        """
        self.refresh()
        first = {key: i for i, key in reversed(list(enumerate(keys)))}  # a key that comes twice is written once
        fresh = [i for i in sorted(first.values()) if keys[i] not in self._entry_of]
        rows: list[tuple[int, int, int, int]] = []  # position, entry, tier, slot
        placed = self._place_new(keys, depths, fresh, now)
        rows.extend(placed)
        known = [(i, self._entry_of[keys[i]]) for i in sorted(first.values()) if keys[i] in self._entry_of]
        for tier, slots in enumerate(self._written):
            lacking = [
                (i, entry)
                for i, entry in known
                if self._place[entry, tier] == _NOWHERE and self._writing[entry, tier] == _NOWHERE
            ]
            for (i, entry), slot in zip(lacking, slots.take(len(lacking)).tolist(), strict=False):
                rows.append(self._write(i, entry, tier, slot))
        rows.extend(self._promote(known))
        table = np.array(rows, dtype=np.int64).reshape(-1, 4)
        table = table[np.argsort(table[:, 0], kind="stable")]
        positions, entries, tiers, slots_ = table.T
        return self._places(tuple(keys[i] for i in positions.tolist()), positions, entries, tiers, slots_)

    def complete_store(self, places: Places, failed: Sequence[int]) -> None:
        """The bytes are written, but for the rows in `failed`; those places are given back."""
        bad = set(failed)
        for row, (entry, tier, slot) in enumerate(_rows(places)):
            if self._generation[tier, slot] != places.generations[row] or self._writing[entry, tier] != slot:
                continue  # lost meanwhile
            self._writing[entry, tier] = _NOWHERE
            self._locks[entry] -= 1
            if row in bad:
                self._release(tier, slot)
                self._forget_if_empty(entry)
            else:
                self._place[entry, tier] = slot
                self._copies[entry] += 1

    # ------------------------------------------------------------------ drop

    def refresh(self) -> int:
        """Forgets places whose memory was taken back by its owner. Returns how many."""
        count = 0
        for tier, slots in enumerate(self._tiers):
            for slot in slots.lost().tolist():
                count += 1
                self._lose(tier, slot)
        return count

    def drop_all(self) -> None:
        """Forgets everything, transfers under way included: the caller sees to it that they end before any later one begins."""
        for tier, slots in enumerate(self._tiers):
            busy = np.flatnonzero((self._owner[tier] != _NOWHERE) | self._doomed[tier])
            slots.give(busy)
            self._generation[tier, busy] += 1
            self._owner[tier, busy] = _NOWHERE
            self._pins[tier, busy] = 0
            self._doomed[tier, busy] = False
        entries = np.array(sorted(self._entry_of.values()), dtype=np.int64)
        if len(entries):
            self._policy.remove(entries)
        self._place[entries] = self._writing[entries] = _NOWHERE
        self._copies[entries] = self._locks[entries] = 0
        self._free.extend(entries.tolist())
        self._entry_of.clear()

    def check_integrity(self) -> None:
        """Raises IntegrityError unless entries, places, owners and the tiers' own books agree."""
        if len(self._entry_of) + len(self._free) != self.capacity:
            raise IntegrityError(f"{len(self._entry_of)} entries and {len(self._free)} free ones of {self.capacity}")
        for key, entry in self._entry_of.items():
            here = np.concatenate([self._place[entry], self._writing[entry]])
            if self._keys[entry] != key or (here == _NOWHERE).all():
                raise IntegrityError(f"entry {entry} lies nowhere, or under another key")
        copies, writing = (self._place != _NOWHERE).sum(axis=1), (self._writing != _NOWHERE).sum(axis=1)
        if not np.array_equal(copies, self._copies) or (self._locks < writing).any():
            raise IntegrityError("the entries' counts of copies or locks are wrong")
        for tier, slots in enumerate(self._tiers):
            placed = np.concatenate([self._place[:, tier], self._writing[:, tier]])
            placed = placed[placed != _NOWHERE]
            doomed = int(self._doomed[tier].sum())
            if len(np.unique(placed)) != len(placed) or (self._owner[tier, placed] == _NOWHERE).any():
                raise IntegrityError(f"{slots.name}: two blocks in one slot, or a slot without an owner")
            if slots.statistics().used != len(placed) + doomed:
                raise IntegrityError(
                    f"{slots.name}: {slots.statistics().used} slots taken, {len(placed)} + {doomed} in use"
                )
            slots.check_integrity()
        self._policy.check_integrity()

    # ------------------------------------------------------------------ inside

    def _places(
        self, keys: tuple[bytes, ...], positions: IntArray, entries: IntArray, tiers: IntArray, slots: IntArray
    ) -> Places:
        generations = self._generation[tiers, slots].copy()
        return Places(
            keys=keys, positions=positions, entries=entries, tiers=tiers, slots=slots, generations=generations
        )

    def _place_new(
        self, keys: Sequence[bytes], depths: IntArray, fresh: list[int], now: float
    ) -> list[tuple[int, int, int, int]]:
        """Entries and slots for new blocks, in the order of the prefix: what does not fit is its end."""
        rows: list[tuple[int, int, int, int]] = []
        todo = list(fresh)
        for tier, slots in enumerate(self._written):
            taken = slots.take(len(todo)).tolist()
            rows.extend(self._enter(keys[i], i, tier, slot) for i, slot in zip(todo, taken, strict=False))
            todo = todo[len(taken) :]
        if todo:
            numbers = key_numbers([keys[i] for i in todo])
            wanted = self._policy.admits(numbers, depths[todo], now)
            todo = [i for i, wants in zip(todo, wanted.tolist(), strict=True) if wants]
            # No block of this prefix makes room for one behind it.
            keep = {self._entry_of[key] for key in keys if key in self._entry_of}
            for i, (tier, slot) in zip(todo, self._make_room(len(todo), keep), strict=False):
                rows.append(self._enter(keys[i], i, tier, slot))
        if rows:
            at = np.array([row[0] for row in rows], dtype=np.int64)
            entries = np.array([row[1] for row in rows], dtype=np.int64)
            self._policy.insert(entries, key_numbers([keys[i] for i in at.tolist()]), depths[at], now)
        return rows

    def _promote(self, known: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
        """Rows for (position, entry) of known blocks for which room has to be made: without a disk there are none."""
        return []

    def _make_room(self, count: int, keep: set[int]) -> list[tuple[int, int]]:
        """Frees `count` slots, or fewer: first the faster copies of what is in two tiers, then the worst blocks."""
        freed: list[tuple[int, int]] = []
        busy = self._locks > 0
        busy[list(keep)] = True
        twice = ~busy & (self._copies > 1)
        for entry in self._policy.victims(count, ~twice).tolist() if twice.any() else ():
            tier = int(np.flatnonzero(self._place[entry] != _NOWHERE)[0])
            freed.append(self._vacate(entry, tier))
        if len(freed) < count:
            for entry in self._policy.victims(count - len(freed), busy).tolist():
                freed.extend(
                    self._vacate(entry, tier) for tier in np.flatnonzero(self._place[entry] != _NOWHERE).tolist()
                )
                self._forget_if_empty(entry)
        for tier, slot in freed[count:]:
            self._release(tier, slot)
        return sorted(freed[:count])

    def _enter(self, key: bytes, position: int, tier: int, slot: int) -> tuple[int, int, int, int]:
        entry = self._free.pop()
        self._entry_of[key], self._keys[entry] = entry, key
        self.was_read[entry] = False
        return self._write(position, entry, tier, slot)

    def _write(self, position: int, entry: int, tier: int, slot: int) -> tuple[int, int, int, int]:
        self._writing[entry, tier], self._owner[tier, slot] = slot, entry
        self._locks[entry] += 1
        return position, entry, tier, slot

    def _drop_places(self, places: Places, rows: Sequence[int]) -> None:
        for row in rows:
            entry, tier, slot = int(places.entries[row]), int(places.tiers[row]), int(places.slots[row])
            if self._generation[tier, slot] == places.generations[row] and self._owner[tier, slot] == entry:
                self._locks[entry] -= self._pins[tier, slot]
                self._vacate(entry, tier)
                self._release(tier, slot)
                self._forget_if_empty(entry)

    def _vacate(self, entry: int, tier: int) -> tuple[int, int]:
        """Takes a place from an entry; the slot is nobody's then."""
        slot = int(self._place[entry, tier])
        self._place[entry, tier] = self._owner[tier, slot] = _NOWHERE
        self._copies[entry] -= 1
        return tier, slot

    def _forget_if_empty(self, entry: int) -> None:
        if not self._copies[entry] and not self._locks[entry]:
            del self._entry_of[self._keys[entry]]
            self._policy.remove(np.array([entry], dtype=np.int64))
            self.evicted += 1
            self.evicted_unread += not self.was_read[entry]
            self._free.append(entry)

    def _release(self, tier: int, slot: int) -> None:
        """The slot has no block any more; it is given back when nobody reads it."""
        self._owner[tier, slot] = _NOWHERE
        self._doomed[tier, slot] = self._pins[tier, slot] > 0
        if not self._doomed[tier, slot]:
            self._tiers[tier].give(np.array([slot], dtype=np.int64))

    def _lose(self, tier: int, slot: int) -> None:
        """The slot ceased to exist: whatever refers to it refers to an older generation."""
        entry = int(self._owner[tier, slot])
        if entry != _NOWHERE:
            if self._writing[entry, tier] == slot:
                self._writing[entry, tier] = _NOWHERE
                self._locks[entry] -= 1
            else:
                self._locks[entry] -= self._pins[tier, slot]
                self._vacate(entry, tier)
            self._forget_if_empty(entry)
        self._generation[tier, slot] += 1
        self._owner[tier, slot] = _NOWHERE
        self._pins[tier, slot] = 0
        self._doomed[tier, slot] = False


def _rows(places: Places) -> list[tuple[int, int, int]]:
    return list(zip(places.entries.tolist(), places.tiers.tolist(), places.slots.tolist(), strict=True))
