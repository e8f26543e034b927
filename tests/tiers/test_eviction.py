"""Policies: never a victim that is pinned or empty, books that balance, bounded memory, and LRU's order equal to a model's.

A machine stores, uses, drops and evicts prefixes of random conversations, as an index of a tier does, and asks for victims with
random slots pinned.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from polder.arrays import IntArray
from polder.tiers.eviction.density import HitDensity
from polder.tiers.eviction.policy import EvictionPolicy, Lru
from tests.conftest import examples

CAPACITY = 24
KEYS = np.random.default_rng(1).integers(0, 2**64, size=(8, 16), dtype=np.uint64)
"""Eight conversations of up to sixteen blocks."""
NOTHING_PINNED = np.zeros(CAPACITY, dtype=np.bool_)


class PolicyMachine(RuleBasedStateMachine):
    """A tier of 24 slots under one policy."""

    policy: EvictionPolicy

    def make(self) -> EvictionPolicy:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.policy = self.make()
        self.now = 0.0
        self.slot_of: dict[int, int] = {}
        self.order: list[int] = []  # keys, the most recent last

    @rule(
        conversation=st.integers(0, 7), length=st.integers(1, 16), later_s=st.sampled_from([0.0, 0.01, 0.5, 7.0, 90.0])
    )
    def request(self, conversation: int, length: int, later_s: float) -> None:
        self.now += later_s
        keys = KEYS[conversation, :length]
        slots = np.array([self.slot_of.get(int(key), -1) for key in keys])
        held, absent = slots[slots >= 0], np.flatnonzero(slots < 0)
        self.policy.touch(held, self.now)
        self.policy.missed(keys[absent], self.now)
        free = sorted(set(range(CAPACITY)) - set(self.slot_of.values()))
        late = absent[len(free) :]
        if len(late):
            wanted = self.policy.admits(keys[late], late, self.now)
            assert wanted.dtype == np.bool_
            assert len(wanted) == len(late)
            assert not (np.diff(wanted.astype(int)) > 0).any(), "what is refused is at the end"
            pinned = NOTHING_PINNED.copy()
            pinned[held] = True
            gone = self.victims(int(wanted.sum()), pinned)
            self.drop(gone)
            free += gone.tolist()
        take = absent[: len(free)]
        places = np.array(free[: len(take)], dtype=np.int64)
        self.policy.insert(places, keys[take], take, self.now)
        self.policy.touch(held, self.now)
        for key, place in zip(keys[take].tolist(), places.tolist(), strict=True):
            self.slot_of[key] = place
        held_keys = [int(key) for key, slot in zip(keys, slots, strict=True) if slot >= 0]
        for key in [*keys[take].tolist()[::-1], *held_keys[::-1]]:
            if key in self.order:
                self.order.remove(key)
            self.order.append(key)

    @precondition(lambda self: self.slot_of)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        slots = data.draw(st.lists(st.sampled_from(sorted(self.slot_of.values())), unique=True))
        self.drop(np.array(slots, dtype=np.int64))

    @rule(count=st.integers(0, CAPACITY + 2), pinned=st.sets(st.integers(0, CAPACITY - 1)))
    def ask(self, count: int, pinned: set[int]) -> None:
        mask = NOTHING_PINNED.copy()
        mask[list(pinned)] = True
        first = self.victims(count, mask)
        assert len(first) == min(count, len(set(self.slot_of.values()) - pinned))
        assert first.tolist() == self.victims(count, mask).tolist(), "asking changes nothing"

    @invariant()
    def books_balance(self) -> None:
        self.policy.check_integrity()

    def victims(self, count: int, pinned: np.ndarray) -> IntArray:
        chosen = self.policy.victims(count, pinned)
        assert len(set(chosen.tolist())) == len(chosen) <= count
        assert set(chosen.tolist()) <= set(self.slot_of.values())
        assert not pinned[chosen].any()
        return chosen

    def drop(self, slots: IntArray) -> None:
        self.policy.remove(slots)
        gone = set(slots.tolist())
        self.slot_of = {key: slot for key, slot in self.slot_of.items() if slot not in gone}
        self.order = [key for key in self.order if key in self.slot_of]


class LruMachine(PolicyMachine):
    def make(self) -> EvictionPolicy:
        return Lru(CAPACITY)

    @invariant()
    def order_is_the_model_s(self) -> None:
        victims = self.policy.victims(CAPACITY, NOTHING_PINNED)
        assert victims.tolist() == [self.slot_of[key] for key in self.order]


class DensityMachine(PolicyMachine):
    def make(self) -> EvictionPolicy:
        return HitDensity(CAPACITY, estimate_every_s=1.0)


TestLru = LruMachine.TestCase
TestDensity = DensityMachine.TestCase
TestLru.settings = TestDensity.settings = examples(40, steps=30)


def _bytes(thing: object, seen: set[int]) -> int:
    """Bytes of all arrays that `thing` holds."""
    if id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, np.ndarray):
        return thing.nbytes
    return sum(_bytes(value, seen) for value in getattr(thing, "__dict__", {}).values())


@pytest.mark.parametrize("make", [Lru, HitDensity])
def test_memory_is_bounded_by_the_capacity(make: type[Lru] | type[HitDensity]) -> None:
    capacity = 256
    policy: EvictionPolicy = make(capacity)
    slots = np.arange(capacity)
    rng = np.random.default_rng(3)
    sizes = []
    for turn in range(200):
        keys = rng.integers(0, 2**64, size=capacity, dtype=np.uint64)
        policy.missed(keys, float(turn))
        policy.insert(slots, keys, slots, float(turn))
        policy.touch(slots, turn + 0.5)
        policy.remove(policy.victims(capacity, np.zeros(capacity, dtype=np.bool_)))
        sizes.append(_bytes(policy, set()))
    assert max(sizes[20:]) <= max(sizes[:20])
    assert max(sizes) < 400 * capacity + 100_000


@pytest.mark.parametrize("make", [Lru, HitDensity])
def test_a_prefix_loses_its_end_first(make: type[Lru] | type[HitDensity]) -> None:
    policy: EvictionPolicy = make(32)
    slots, keys = np.arange(32), np.arange(32, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    policy.insert(slots[:16], keys[:16], slots[:16], 0.0)
    policy.insert(slots[16:], keys[16:], slots[:16], 1.0)
    policy.touch(slots[:16], 9.0)
    assert policy.victims(32, np.zeros(32, dtype=np.bool_)).tolist() == [*range(31, 15, -1), *range(15, -1, -1)]


def test_of_users_who_read_in_turn_some_are_kept_whole() -> None:
    """Ten users read 10 blocks each, one after the other, and the cache holds 50: LRU hits nothing at all."""
    hits = {make: _hits_of_users_in_turn(make) for make in (Lru, HitDensity)}
    assert hits[Lru] == 0.0
    assert hits[HitDensity] > 0.3


def _hits_of_users_in_turn(make: type[Lru] | type[HitDensity]) -> float:
    from polder.sim.replay import replay
    from polder.sim.traces import Trace

    rounds, users, length = 60, 10, 10
    blocks = np.tile(np.arange(users * length), rounds)
    trace = Trace(
        name="in turn",
        block_tokens=16,
        times_s=np.arange(rounds * users) * 2.0,
        starts=np.arange(rounds * users + 1) * length,
        blocks=blocks,
    )
    return replay(trace, 50, make).hit_ratio
