"""The index with a disk behind the host tier: the lives of test_index.py, and what a disk adds to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from polder.arrays import IntArray
from polder.errors import ConfigError
from polder.tiers.disk.slots import DiskSlots
from polder.tiers.eviction.density import HitDensity
from polder.tiers.eviction.policy import Lru
from polder.tiers.host import HostSlots
from polder.tiers.index import ABSENT, BlockIndex, Spill
from polder.tiers.slots import block_ids
from tests.conftest import examples
from tests.tiers.test_index import KEYS, Lives, rows, some_keys

DISK = 6
HOST_TIER, DISK_TIER = 1, 2


@dataclass
class Spilling:
    spill: Spill
    keys: list[bytes]
    lost: set[int]
    """Rows whose slots were reported lost since."""
    found: list[bytes]
    """What the host slots held when it began."""


class DiskLives(Lives):
    def make_index(self) -> BlockIndex:
        self.disk = DiskSlots(name="disk", capacity=DISK, slot_bytes=64, inventory=block_ids(KEYS[-3:]))
        tell = self.disk.lost

        def lost() -> IntArray:
            slots = tell()
            self.note_lost(set(slots.tolist()))
            return slots

        self.disk.lost = lost  # type: ignore[method-assign]
        self.spills: list[Spilling] = []
        self.void_spills: list[Spill] = []
        return BlockIndex([self.peer, self.host, self.disk], Lru(self.peer.capacity + self.host.capacity + DISK))

    def __init__(self) -> None:
        super().__init__()
        self.holds = {(DISK_TIER, slot): key for slot, key in enumerate(KEYS[-3:])}

    def no_second_copy_was_left(self, keys: set[bytes]) -> None:
        super().no_second_copy_was_left(keys.union(*(job.keys for job in self.spills)))

    # ------------------------------------------------------------------ what may happen

    @rule(keys=some_keys)
    def ask_for_what_a_former_run_left(self, keys: list[bytes]) -> None:
        before = self.index.find(keys)
        self.index.adopt(keys, self.now)
        found = self.index.find(keys)
        assert (found[before != ABSENT] == before[before != ABSENT]).all()
        self.committed |= {key for key, tier in zip(keys, found.tolist(), strict=True) if tier == DISK_TIER}

    @rule(data=st.data())
    def spill(self, data: st.DataObject) -> None:
        index = self.index
        entries = index.spillable(np.arange(index.capacity))
        if not len(entries):
            return
        chosen = data.draw(st.lists(st.sampled_from(entries.tolist()), min_size=1, unique=True))
        known = {key for key in KEYS if index.slot(key, DISK_TIER) >= 0}
        left = index.adopt_entries(np.array(chosen, dtype=np.int64))
        prepared = index.prepare_spill(left)
        if prepared is None:
            self.note_absent()
            return
        spill, _ = prepared
        names = index.keys(spill.targets.entries)
        for tier, slot in rows(spill.targets):
            assert tier == DISK_TIER
            busy = {place for job in (*self.stores, *self.loads) for place in self.alive(job)}
            busy |= {place for other in self.spills for place in self.alive_of(other)}
            assert (tier, slot) not in busy, "a slot is given away while a transfer uses it"
        for row, (tier, slot) in enumerate(rows(spill.sources)):
            assert tier == HOST_TIER
            assert self.holds[tier, slot] == names[row], "a spill reads something else"
            self.holds[rows(spill.targets)[row]] = b"half of " + names[row]
        assert not known & set(names), "what is on disk is written again"
        self.spills.append(Spilling(spill, names, set(), [self.holds[place] for place in rows(spill.sources)]))
        self.note_absent()

    @precondition(lambda self: self.spills)
    @rule(data=st.data(), corrupt=st.booleans())
    def spill_ends(self, data: st.DataObject, corrupt: bool) -> None:
        job = self.spills.pop(data.draw(st.integers(0, len(self.spills) - 1)))
        count = len(job.keys)
        for row, place in enumerate(rows(job.spill.sources)):
            assert self.holds[place] == job.found[row], "a host slot was overwritten while it was spilled"
        failed = data.draw(st.sets(st.integers(0, count - 1)))
        bad = data.draw(st.sets(st.sampled_from(sorted(failed)))) if corrupt and failed else set()
        for row, place in enumerate(rows(job.spill.targets)):
            if row not in job.lost and row not in failed:
                self.holds[place] = job.keys[row]
                self.committed.add(job.keys[row])
        self.index.complete_spill(job.spill, sorted(failed), sorted(bad))
        self.note_absent()

    @rule(slots=st.sets(st.integers(0, DISK - 1), min_size=1), seen=st.booleans())
    def a_rank_loses_pages(self, slots: set[int], seen: bool) -> None:
        self.disk.report_lost(np.array(sorted(slots), dtype=np.int64))
        if seen:  # or later: until then they may be found, and their loads fail
            self.index.refresh()
            self.note_absent()

    def note_lost(self, slots: set[int]) -> None:
        for job in (*self.stores, *self.loads):
            job.lost |= {
                row for row, (tier, slot) in enumerate(rows(job.places)) if tier == DISK_TIER and slot in slots
            }
        for spilling in self.spills:
            spilling.lost |= {row for row, (_, slot) in enumerate(rows(spilling.spill.targets)) if slot in slots}

    @rule(room=st.integers(0, DISK))
    def disks_come_and_go(self, room: int) -> None:
        self.disk.set_room(room)
        assert self.disk.stats().slots >= room or self.disk.overcommitted == 0

    def drop_everything(self, ended: bool) -> None:
        self.void_spills += [] if ended else [job.spill for job in self.spills]
        self.spills = []
        super().drop_everything(ended)
        assert self.disk.stats().used == self.disk.unclaimed == 0

    @precondition(lambda self: self.void_spills)
    @rule(failed=st.booleans())
    def a_spill_that_was_dropped_ends(self, failed: bool) -> None:
        spill = self.void_spills.pop()
        bad = list(range(len(spill.targets))) if failed else []
        self.index.complete_spill(spill, bad, bad)

    # ------------------------------------------------------------------

    def alive_of(self, job: Spilling) -> set[tuple[int, int]]:
        targets = {place for row, place in enumerate(rows(job.spill.targets)) if row not in job.lost}
        return targets | set(rows(job.spill.sources))

    def being_written(self) -> list[list[bytes]]:
        return [*super().being_written(), *(job.keys for job in self.spills)]


TestDiskLives = DiskLives.TestCase
TestDiskLives.settings = examples(100, steps=50, derandomize=True)


# ---------------------------------------------------------------- what a disk changes


def stored(index: BlockIndex, keys: list[bytes], now: float) -> None:
    index.complete_store(index.prepare_store(keys, np.arange(len(keys)), now), [])


def spilled(index: BlockIndex) -> None:
    prepared = index.prepare_spill(index.spillable(np.arange(index.capacity)))
    assert prepared is not None
    index.complete_spill(prepared[0], [], [])


def make(host: int, disk: int, former: list[bytes] | None = None) -> BlockIndex:
    slots = DiskSlots(name="disk", capacity=disk, slot_bytes=64, inventory=block_ids(former or []))
    return BlockIndex([HostSlots(name="host", size_bytes=host * 64, slot_bytes=64), slots], HitDensity(host + disk))


def test_nothing_is_stored_to_disk_but_from_the_host_tier() -> None:
    index = make(4, 8)
    places = index.prepare_store(KEYS[:6], np.arange(6), 0.0)
    assert set(places.tiers.tolist()) == {0}
    assert len(places) == 4


def test_what_is_on_disk_leaves_the_host_tier_without_being_lost() -> None:
    index = make(4, 8)
    for at in (0, 4):
        stored(index, KEYS[at : at + 4], float(at))
        spilled(index)
    assert index.find(KEYS[:8]).tolist() == [1] * 4 + [0] * 4
    assert index.evicted == 0


def test_a_block_on_disk_alone_gets_its_place_in_the_host_tier_back() -> None:
    index = make(4, 8)
    for at in (0, 4):
        stored(index, KEYS[at : at + 4], float(at))
        spilled(index)
    index.touch(KEYS[:2], 9.0)
    stored(index, KEYS[:2], 9.0)
    assert index.find(KEYS[:2]).tolist() == [1, 1], "nobody knows yet whether they come again soon"
    stored(index, KEYS[:2], 9.5)
    assert index.find(KEYS[:2]).tolist() == [0, 0]
    index.check_integrity()


def test_a_page_of_a_former_run_is_not_written_again() -> None:
    index = make(4, 8, former=KEYS[:2])
    stored(index, KEYS[:3], 0.0)
    assert index.keys(index.adopt_entries(index.spillable(np.arange(12)))) == [KEYS[2]]
    assert all(index.slot(key, 1) >= 0 for key in KEYS[:2])
    index.check_integrity()


def test_a_disk_needs_host_memory_right_before_it() -> None:
    disk = DiskSlots(name="disk", capacity=4, slot_bytes=64)
    host = HostSlots(name="host", size_bytes=256, slot_bytes=64)
    for tiers in ([disk], [disk, host], [host, disk, host]):
        with pytest.raises(ConfigError, match="host tier"):
            BlockIndex(tiers, Lru(12))  # type: ignore[arg-type]
