"""Windowed units of a real BlockPool: used last, opened and closed under running requests, never a block with others' bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from tests.conftest import examples

pytest.importorskip("vllm")
from vllm.v1.core.kv_cache_utils import BlockHash

from polder.engines.vllm.core.blocks import BlockUnits, BusyBlocks
from tests.engines.test_blocks import UNIT_BLOCKS, UNITS, Pool, Scheduler, cached

WINDOWED = 3
REGULAR = UNITS - WINDOWED
FIRST = REGULAR * UNIT_BLOCKS
EACH = 2
"""Windowed units of a donor."""


class Windowed(Pool):
    """Pool's requests, shrinks and grows, while regular units become donors of windowed ones and come back."""

    @initialize(mapped=st.sets(st.integers(1, REGULAR - 1)))
    def start(self, mapped: set[int]) -> None:
        self.carried: dict[int, list[int]] = {}
        self.units = BlockUnits(self.scheduler, UNIT_BLOCKS, [0, *mapped], BusyBlocks.MOVE, windowed_units=WINDOWED)

    @rule(prompt=st.integers(0, 5), length=st.integers(1, 6))
    def admit(self, prompt: int, length: int) -> None:
        free, content = self.free(), dict(self.content)
        before = self.count
        super().admit(prompt=prompt, length=length)
        if self.count > before:
            request = f"r{self.count}"
            pairs = zip(self.scheduler.requests[request], self.expected[request], strict=True)
            self.check_regular_first(
                [b.block_id for b, name in pairs if b.block_id in free and content.get(b.block_id) != name]
            )

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data(), full=st.booleans())
    def lengthen(self, data: st.DataObject, full: bool) -> None:
        """A token more than fits a request's blocks: another block, which others can find once it is full."""
        request = data.draw(st.sampled_from(self.scheduler.running)).request_id
        if not self.free():
            return
        (block,) = self.pool.get_new_blocks(1)
        self.check_regular_first([block.block_id])
        self.count += 1
        name = f"{request}/own{self.count}".encode()
        self.scheduler.requests[request].append(block)
        self.expected[request].append(name)
        self.content[block.block_id] = name
        if full:
            self.pool._insert_block_hash(self.key(name), block, num_tokens=None)

    @rule(count=st.integers(1, UNITS), preempting=st.booleans())
    def shrink(self, count: int, preempting: bool) -> None:
        hashes = [block.block_hash for block in self.pool.blocks[FIRST:]]
        content = {block: name for block, name in self.content.items() if block >= FIRST}
        super().shrink(count=count, preempting=preempting)
        assert [block.block_hash for block in self.pool.blocks[FIRST:]] == hashes
        assert {block: name for block, name in self.content.items() if block >= FIRST} == content

    @rule(count=st.integers(1, REGULAR))
    def carry(self, count: int) -> None:
        before = set(self.units.mapped)
        self.shrink(count=count, preempting=False)
        donors = sorted(before - set(self.units.mapped))
        unused = [unit for unit in range(REGULAR, UNITS) if unit not in self.units.windowed]
        for at, donor in enumerate(donors):
            self.carried[donor] = unused[at * EACH : (at + 1) * EACH]
        opened = [unit for donor in donors for unit in self.carried[donor]]
        self.units.open({donor: self.carried[donor] for donor in donors})
        self.content |= {block: b"zero" for unit in opened for block in blocks_of(unit)}

    @precondition(lambda self: self.carried)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        busy = {b.block_id // UNIT_BLOCKS for blocks in self.scheduler.requests.values() for b in blocks}
        able = self.units.idle_donors()
        assert able == [donor for donor, units in self.carried.items() if busy.isdisjoint(units)]
        if not able:
            return
        donors = data.draw(st.lists(st.sampled_from(able), min_size=1, unique=True))
        closed = [unit for donor in donors for unit in self.carried.pop(donor)]
        self.pool.take_events()
        evicted = self.units.close(donors)
        removed = [event for event in self.pool.take_events() if type(event).__name__ == "BlockRemoved"]
        assert len(removed) == evicted
        for block in (block for unit in closed for block in blocks_of(unit)):
            self.content.pop(block)
        self.units.offer(donors)
        self.content |= {block: b"zero" for donor in donors for block in blocks_of(donor)}

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def bring_home(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.scheduler.running)).request_id
        sources = self.units.windowed_of(request)
        assert sources == [b.block_id for b in self.scheduler.requests[request] if b.block_id >= FIRST]
        free = [number for number in self.free() if number < FIRST]
        targets = self.units.bring_home(sources)
        assert targets == (free[: len(sources)] if len(sources) <= len(free) else [])
        for source, target in zip(sources, targets, strict=False):
            self.content[target] = self.content[source]
        if targets:
            assert not self.units.windowed_of(request)

    def free(self) -> list[int]:
        return [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]

    def check_regular_first(self, taken: list[int]) -> None:
        if any(block >= FIRST for block in taken):
            assert not any(block < FIRST for block in self.free()), "a windowed block while a regular one is free"

    @invariant()
    def windowed_blocks_are_behind_regular_ones(self) -> None:
        if hasattr(self, "units"):
            regions = [number >= FIRST for number in self.free()]
            assert regions == sorted(regions)
            assert self.pool.free_block_queue.free_windowed == sum(regions)
            assert self.units.free_regular == len(regions) - sum(regions)

    @invariant()
    def a_hash_points_to_its_bytes_in_an_open_unit(self) -> None:
        if hasattr(self, "units"):
            usable = {*self.units.mapped, *self.units.windowed}
            for name in {*self.content.values()}:
                for block in self.pool.get_cached_block(BlockHash(name), [0]) or []:
                    assert block.block_id // UNIT_BLOCKS in usable
                    assert self.content[block.block_id] == name

    @invariant()
    def pages_of_a_donor_are_nobody_elses(self) -> None:
        if hasattr(self, "units"):
            donors, mapped = set(self.carried), set(self.units.mapped)
            assert not donors & mapped
            assert {*self.units.unmapped(UNITS)} == {*range(REGULAR)} - mapped - donors
            carried = sorted(unit for units in self.carried.values() for unit in units)
            assert carried == sorted(self.units.windowed)


def blocks_of(unit: int) -> range:
    return range(unit * UNIT_BLOCKS, (unit + 1) * UNIT_BLOCKS)


TestWindowed = Windowed.TestCase
TestWindowed.settings = examples(60, steps=40)


def window(busy: BusyBlocks = BusyBlocks.MOVE) -> tuple[Scheduler, BlockUnits]:
    """All regular units but one, and one windowed unit."""
    scheduler = Scheduler()
    units = BlockUnits(scheduler, UNIT_BLOCKS, list(range(REGULAR - 1)), busy, windowed_units=WINDOWED)
    units.open({REGULAR - 1: [REGULAR]})
    return scheduler, units


def request(scheduler: Scheduler, name: str, blocks: list[Any]) -> None:
    scheduler.requests[name] = blocks
    scheduler.running.append(SimpleNamespace(request_id=name))


REGULAR_FREE = (REGULAR - 1) * UNIT_BLOCKS - 1


def test_a_shared_block_comes_home_for_all_its_holders() -> None:
    scheduler, units = window()
    pool = scheduler.pool
    held = pool.get_new_blocks(REGULAR_FREE + 2)
    shared = held[-2:]
    request(scheduler, "a", list(shared))
    pool.touch(shared)
    request(scheduler, "b", [held[0], *shared])
    pool.free_blocks(held[1:-2])
    targets = units.bring_home(units.windowed_of("a"))
    assert [b.block_id for b in scheduler.requests["a"]] == targets
    assert [b.block_id for b in scheduler.requests["b"]] == [held[0].block_id, *targets]
    assert [pool.blocks[target].ref_cnt for target in targets] == [2, 2]
    units.check_integrity()


def test_coming_home_costs_the_coldest_of_the_regular_cache_and_keeps_its_own_hashes() -> None:
    scheduler, units = window()
    pool = scheduler.pool
    names = [bytes([n]) for n in range(REGULAR_FREE + 2)]
    blocks = cached(pool, names)
    request(scheduler, "long", blocks[-2:])
    for at in (3, 1, *(n for n in range(REGULAR_FREE) if n not in (1, 3))):
        pool.free_blocks([blocks[at]])
    targets = units.bring_home(units.windowed_of("long"))
    assert targets == [blocks[3].block_id, blocks[1].block_id]
    lost = [n for n in range(len(names)) if not pool.get_cached_block(BlockHash(names[n]), [0])]
    assert lost == [1, 3]
    units.check_integrity()


def test_too_few_regular_blocks_bring_nothing_home() -> None:
    scheduler, units = window()
    held = scheduler.pool.get_new_blocks(REGULAR_FREE + 2)
    request(scheduler, "long", held[1:])
    scheduler.pool.free_blocks(held[:1])
    before = [b.block_id for b in scheduler.requests["long"]]
    assert units.bring_home(units.windowed_of("long")) == []
    assert [b.block_id for b in scheduler.requests["long"]] == before
    units.check_integrity()


@pytest.mark.parametrize("why", ["unknown holder", "runner"])
def test_a_block_that_must_not_move_stays_windowed(why: str) -> None:
    scheduler, units = window(BusyBlocks.STAY if why == "runner" else BusyBlocks.MOVE)
    held = scheduler.pool.get_new_blocks(REGULAR_FREE + 1)
    request(scheduler, "long", held[-1:])
    if why == "unknown holder":
        held[-1].ref_cnt += 1
    scheduler.pool.free_blocks(held[:-1])
    assert units.bring_home(units.windowed_of("long")) == []
    units.check_integrity()


def test_lent_windowed_blocks_are_announced_before_their_unit_closes() -> None:
    scheduler, units = window()
    held, recalled = scheduler.pool.get_new_blocks(REGULAR_FREE + UNIT_BLOCKS), list[int]()
    scheduler.pool.unpin_blocks(held, lambda block: recalled.append(block.block_id))
    units.close([REGULAR - 1])
    assert recalled == list(blocks_of(REGULAR))
    units.check_integrity()
