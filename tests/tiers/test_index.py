"""BlockIndex in random lives, against a model that knows which block's bytes every slot holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polder.errors import IntegrityError
from polder.tiers.eviction.policy import Lru
from polder.tiers.host import HostSlots
from polder.tiers.index import ABSENT, PENDING, BlockIndex, Places
from polder.tiers.slots import Slots
from tests.conftest import examples
from tests.tiers.fakes import LosingSlots

PEER, HOST = 5, 4
KEYS = [bytes([i]) * 16 for i in range(14)]
FOREIGN = b"foreign"

Slot = tuple[int, int]  # tier, slot
some_keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=6)


def rows(places: Places) -> list[Slot]:
    return list(zip(places.tiers.tolist(), places.slots.tolist(), strict=True))


def spans(tiers: list[Slots]) -> BlockIndex:
    return BlockIndex(tiers, Lru(sum(tier.capacity for tier in tiers)))


@dataclass
class Job:
    places: Places
    keys: list[bytes]
    """One for each row."""
    lost: set[int]
    """Rows whose slots were taken back since."""


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.peer = LosingSlots(name="peer", capacity=PEER)
        self.host = HostSlots(name="host", size_bytes=HOST * 64, slot_bytes=64)
        self.index = self.make_index()
        self.now = 0.0
        self.holds: dict[Slot, bytes] = {}  # what is really in a slot
        self.committed: set[bytes] = set()  # may be found
        self.stores: list[Job] = []
        self.loads: list[Job] = []
        self.void: list[tuple[str, Places]] = []  # under way when everything was dropped

    def make_index(self) -> BlockIndex:
        return spans([self.peer, self.host])

    # ------------------------------------------------------------------ what may happen

    @rule(keys=some_keys)
    def store_at_once(self, keys: list[bytes]) -> None:
        self.store(keys)
        self.end_store(self.stores.pop(), set())

    @rule(keys=some_keys)
    def store(self, keys: list[bytes]) -> None:
        self.now += 1
        self.index.refresh()
        self.note_absent()
        before = set(self.committed)
        places = self.index.prepare_store(keys, np.arange(len(keys), dtype=np.int64), self.now)
        busy = {slot for job in (*self.stores, *self.loads) for slot in self.alive(job)}
        assert len(set(rows(places))) == len(rows(places)), "a slot is given to two blocks"
        assert not busy & set(rows(places)), "a slot is given away while a transfer uses it"
        names = self.index.keys(places.entries)
        assert [keys[i] for i in places.positions.tolist()] == names
        for row, slot in enumerate(rows(places)):
            self.holds[slot] = FOREIGN if row % 2 else b"half of " + names[row]
        gone = {key for key in before if self.index.find([key])[0] == ABSENT}
        assert not gone & set(keys), "a block of the prefix made room for another one of it"
        if gone:
            self.no_second_copy_was_left(set(keys))
        self.stores.append(Job(places, names, set()))
        self.note_absent()

    def no_second_copy_was_left(self, keys: set[bytes]) -> None:
        busy = keys.union(*(job.keys for job in (*self.stores, *self.loads)))
        for key in set(KEYS) - busy:
            copies = sum(self.index.slot(key, tier) >= 0 for tier in (0, 1))
            assert copies < 2, "a block was evicted while another one had two copies"

    @precondition(lambda self: self.stores)
    @rule(data=st.data())
    def store_ends(self, data: st.DataObject) -> None:
        job = self.stores.pop(data.draw(st.integers(0, len(self.stores) - 1)))
        failed = data.draw(st.sets(st.integers(0, len(job.keys) - 1))) if job.keys else set()
        self.end_store(job, failed | (job.lost if data.draw(st.booleans()) else set()))

    def end_store(self, job: Job, failed: set[int]) -> None:
        for row, slot in enumerate(rows(job.places)):
            if row not in job.lost:
                self.holds[slot] = job.keys[row]
            if row not in failed:  # what is lost after it was written may be found until the index looks
                self.committed.add(job.keys[row])
        self.index.complete_store(job.places, sorted(failed))
        self.note_absent()

    @rule(keys=some_keys)
    def load(self, keys: list[bytes]) -> None:
        found = self.index.find(keys)
        if (found < 0).any():
            with pytest.raises(IntegrityError):
                self.index.prepare_load(keys)
        keys = [key for key, tier in zip(keys, found.tolist(), strict=True) if tier >= 0]
        places = self.index.prepare_load(keys)
        assert places.tiers.tolist() == found[found >= 0].tolist()
        lost = {row for row, (tier, slot) in enumerate(rows(places)) if tier == 0 and self.vanished(slot)}
        job = Job(places, keys, lost)
        if keys:
            self.loads.append(job)

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def load_what_is_there(self, data: st.DataObject) -> None:
        self.load(data.draw(st.lists(st.sampled_from(sorted(self.committed)), min_size=1, max_size=4)))

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), fails=st.booleans())
    def load_ends(self, data: st.DataObject, fails: bool) -> None:
        job = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        failed = set(job.lost)
        if fails and job.keys:
            failed |= data.draw(st.sets(st.integers(0, len(job.keys) - 1)))
        self.index.complete_load(job.places, sorted(failed))
        for row in failed:
            tier, slot = rows(job.places)[row]
            if row not in job.lost:
                assert self.index.slot(job.keys[row], tier) != slot, "a place that gave wrong bytes is still there"
        self.note_absent()

    @rule(keys=some_keys)
    def ask(self, keys: list[bytes]) -> None:
        self.now += 1
        self.index.touch(keys, self.now)

    @rule(data=st.data(), seen=st.booleans(), again=st.booleans())
    def an_owner_takes_back(self, data: st.DataObject, seen: bool, again: bool) -> None:
        used = sorted(self.peer.taken - set(self.peer.unreported))
        if not used:
            return
        slot = data.draw(st.sampled_from(used))
        self.peer.vanish(slot)
        self.holds[0, slot] = FOREIGN
        for job in (*self.stores, *self.loads):
            job.lost |= {row for row, place in enumerate(rows(job.places)) if place == (0, slot)}
        if seen:
            self.index.refresh()
            self.note_absent()
        if again:
            self.peer.come_back(slot)

    @rule(slot=st.integers(0, PEER - 1))
    def an_owner_lends(self, slot: int) -> None:
        self.peer.come_back(slot)

    @rule(ended=st.booleans(), rarely=st.integers(0, 15))
    def drop_all(self, ended: bool, rarely: int) -> None:
        if rarely == 11:
            self.drop_everything(ended)

    def drop_everything(self, ended: bool) -> None:
        self.index.drop_all()
        if not ended:
            self.void += [("load", job.places) for job in self.loads] + [("store", job.places) for job in self.stores]
        self.loads, self.stores, self.committed = [], [], set()
        assert len(self.index) == 0
        assert (self.index.find(KEYS) == ABSENT).all()
        assert self.host.stats().used == 0
        assert not self.peer.taken

    @precondition(lambda self: self.void)
    @rule(failed=st.booleans())
    def what_was_dropped_under_way_ends(self, failed: bool) -> None:
        kind, places = self.void.pop()
        rows = list(range(len(places))) if failed else []
        (self.index.complete_load if kind == "load" else self.index.complete_store)(places, rows)

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def books_add_up(self) -> None:
        self.index.check_integrity()
        assert len(self.index) <= self.index.capacity

    @invariant()
    def what_is_found_was_committed_and_its_slot_still_holds_it(self) -> None:
        for key, tier in zip(KEYS, self.index.find(KEYS).tolist(), strict=True):
            if tier >= 0:
                assert key in self.committed
                slot = self.index.slot(key, tier)
                lost = tier == 0 and self.vanished(slot)
                assert lost or self.holds[tier, slot] == key
            elif tier == PENDING:
                assert any(key in keys for keys in self.being_written())

    @invariant()
    def what_is_loaded_stays_until_it_is_or_is_lost(self) -> None:
        for job in self.loads:
            for row, slot in enumerate(rows(job.places)):
                assert row in job.lost or self.holds[slot] == job.keys[row]

    # ------------------------------------------------------------------

    def vanished(self, slot: int) -> bool:
        return slot in self.peer.unreported

    def being_written(self) -> list[list[bytes]]:
        return [job.keys for job in self.stores]

    def alive(self, job: Job) -> set[Slot]:
        return {slot for row, slot in enumerate(rows(job.places)) if row not in job.lost}

    def note_absent(self) -> None:
        """What is absent once stays so until it is stored again."""
        found = dict(zip(KEYS, self.index.find(KEYS).tolist(), strict=True))
        self.committed = {key for key in self.committed if found[key] >= 0}


TestLives = Lives.TestCase
TestLives.settings = examples(100, steps=50, derandomize=True)


def test_a_prefix_that_does_not_fit_loses_its_end() -> None:
    host = HostSlots(name="host", size_bytes=3 * 64, slot_bytes=64)
    index = spans([host])
    places = index.prepare_store(KEYS[:5], np.arange(5, dtype=np.int64), 0.0)
    assert index.keys(places.entries) == KEYS[:3]


def test_known_blocks_get_their_copies_in_all_tiers_with_room() -> None:
    tiers: list[Slots] = [LosingSlots(name="peer", capacity=2), HostSlots(name="host", size_bytes=128, slot_bytes=64)]
    index = spans(tiers)
    places = index.prepare_store(KEYS[:2], np.arange(2, dtype=np.int64), 0.0)
    found = zip(index.keys(places.entries), places.tiers.tolist(), strict=True)
    assert sorted(found) == [(k, t) for k in KEYS[:2] for t in (0, 1)]


def test_a_block_in_two_tiers_gives_up_its_faster_copy_first() -> None:
    tiers: list[Slots] = [LosingSlots(name="peer", capacity=2), HostSlots(name="host", size_bytes=128, slot_bytes=64)]
    index = spans(tiers)
    index.complete_store(index.prepare_store(KEYS[:2], np.arange(2, dtype=np.int64), 0.0), [])
    index.complete_store(index.prepare_store(KEYS[2:4], np.arange(2, dtype=np.int64), 1.0), [])
    assert index.find(KEYS[:4]).tolist() == [1, 1, 0, 0]
    assert index.evicted == 0


def test_a_load_from_a_slot_that_was_lost_leaves_the_block_that_came_after_alone() -> None:
    peer = LosingSlots(name="peer", capacity=1)
    index = spans([peer])
    one = np.zeros(1, dtype=np.int64)
    index.complete_store(index.prepare_store(KEYS[:1], one, 0.0), [])
    old = index.prepare_load(KEYS[:1])
    peer.vanish(0)
    index.refresh()
    peer.come_back(0)
    index.complete_store(index.prepare_store(KEYS[1:2], one, 1.0), [])
    new = index.prepare_load(KEYS[1:2])
    index.complete_load(old, [0])
    assert index.find(KEYS[:2]).tolist() == [ABSENT, 0]
    assert not len(index.prepare_store(KEYS[:1], one, 2.0)), "the slot is given away while it is read"
    index.complete_load(new, [])
    index.check_integrity()
