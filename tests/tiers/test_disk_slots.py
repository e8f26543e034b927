"""The disk tier's slots in random lives: every slot is free, taken, unbound or retired, and the inventory is what it was."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from polder.diskstore.keys import Keys
from polder.errors import ConfigError, IntegrityError
from polder.tiers.disk.slots import DiskSlots
from tests.conftest import examples

CAPACITY = 12
some_slots = st.sets(st.integers(0, CAPACITY - 1), min_size=1)


def numbered(count: int) -> Keys:
    return np.random.default_rng(5).integers(0, 2**63, (count, 2), dtype=np.uint64)


class Lives(RuleBasedStateMachine):
    @initialize(former=st.integers(0, CAPACITY + 2))
    def begin(self, former: int) -> None:
        self.keys = numbered(CAPACITY + 2)
        self.slots = DiskSlots(name="disk", capacity=CAPACITY, slot_bytes=64, inventory=self.keys[:former])
        self.unclaimed = set(range(min(former, CAPACITY)))
        self.taken: set[int] = set()
        self.lost: set[int] = set()
        self.room = CAPACITY

    @rule(count=st.integers(0, CAPACITY))
    def take(self, count: int) -> None:
        spare = CAPACITY - len(self.taken) - len(self.unclaimed)
        slots = self.slots.take(count).tolist()
        assert len(set(slots)) == len(slots) <= count
        assert not set(slots) & self.taken, "a slot is taken twice"
        assert len(self.taken) + len(slots) <= max(self.room, len(self.taken)), "more than there is room for"
        gone = self.unclaimed - set(np.flatnonzero(self.slots._state == 2).tolist())
        assert gone == set(sorted(self.unclaimed)[len(self.unclaimed) - len(gone) :]), "not those used longest ago"
        assert not gone or len(slots) > spare - (CAPACITY - self.room) or len(slots) < count
        self.unclaimed -= gone
        self.taken |= set(slots)

    @rule(rows=st.lists(st.integers(0, CAPACITY + 1), max_size=6))
    def claim(self, rows: list[int]) -> None:
        slots = self.slots.claim(self.keys[rows].reshape(-1, 2))
        want = [row if row in self.unclaimed and row not in rows[:at] else -1 for at, row in enumerate(rows)]
        assert slots.tolist() == want
        self.unclaimed -= set(rows)
        self.taken |= {slot for slot in want if slot >= 0}

    @rule(slots=some_slots)
    def give(self, slots: set[int]) -> None:
        mine = np.array(sorted(slots & self.taken), dtype=np.int64)
        self.slots.give(mine)
        self.taken -= slots
        self.lost -= slots
        if not slots <= self.taken:
            with pytest.raises(IntegrityError):
                self.slots.give(np.array(sorted(slots - self.taken), dtype=np.int64))

    @rule(slots=some_slots)
    def report_lost(self, slots: set[int]) -> None:
        self.slots.report_lost(np.array(sorted(slots), dtype=np.int64))
        self.lost |= slots & self.taken
        self.unclaimed -= slots

    @rule()
    def tell(self) -> None:
        assert set(self.slots.lost().tolist()) == self.lost
        self.taken -= self.lost
        self.lost = set()

    @rule(room=st.integers(0, CAPACITY + 3))
    def set_room(self, room: int) -> None:
        self.slots.set_room(room)
        self.room = min(room, CAPACITY)
        over = len(self.taken) + len(self.unclaimed) - self.room
        if over > 0:
            self.unclaimed = set(sorted(self.unclaimed)[: max(0, len(self.unclaimed) - over)])

    @rule(rarely=st.integers(0, 9))
    def forget_unclaimed(self, rarely: int) -> None:
        if not rarely:
            self.slots.forget_unclaimed()
            self.unclaimed = set()

    @invariant()
    def books_add_up(self) -> None:
        if hasattr(self, "slots"):
            self.slots.check_integrity()
            assert self.slots.stats().used == len(self.taken)
            assert self.slots.unclaimed == len(self.unclaimed)
            assert self.slots.overcommitted == 0 or self.slots.stats().slots == len(self.taken)


TestLives = Lives.TestCase
TestLives.settings = examples(80, steps=50, derandomize=True)


def test_a_million_pages_of_a_former_run_cost_a_second_and_some_megabytes_at_the_start() -> None:
    keys = numbered(1_000_000)
    tracemalloc.start()
    started = time.process_time()
    slots = DiskSlots(name="disk", capacity=1_000_000, slot_bytes=64, inventory=keys)
    took = time.process_time() - started
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(f"{took:.2f} s, {held / 2**20:.0f} MiB")
    assert took < 2.0
    assert held < 80 << 20
    assert (slots.claim(keys[:1000]) == np.arange(1000)).all()
    assert len(slots.take(5000)) == 5000
    assert slots.unclaimed == 994_000


def test_a_key_that_comes_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        DiskSlots(name="disk", capacity=4, slot_bytes=64, inventory=numbered(1).repeat(2, axis=0))


def test_a_disk_that_dies_is_told_of_in_parts() -> None:
    slots = DiskSlots(name="disk", capacity=10_000, slot_bytes=64)
    taken = slots.take(10_000)
    slots.report_lost(taken)
    slots.set_room(2000)
    told = [len(slots.lost()) for _ in range(4)]
    assert told == [4096, 4096, 1808, 0]
    assert slots.stats().slots == 2000
    assert len(slots.take(3000)) == 2000
