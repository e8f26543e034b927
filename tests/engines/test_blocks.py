"""BlockUnits on vLLM's own BlockPool: no block is lost, doubled, hit after eviction or moved from under its request."""

from __future__ import annotations

from collections import defaultdict, deque
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from polder.engines.vllm.core.blocks import BlockUnits, BusyBlocks
from tests.conftest import examples

pytest.importorskip("vllm")
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

UNITS, UNIT_BLOCKS = 6, 4


class Scheduler(SimpleNamespace):
    """The parts of vLLM's scheduler that BlockUnits touches, around a real BlockPool."""

    def __init__(self, events: bool = True) -> None:
        pool = BlockPool(UNITS * UNIT_BLOCKS, enable_caching=True, hash_block_size=16, enable_kv_cache_events=events)
        self.requests: dict[str, list[Any]] = defaultdict(list)
        manager = SimpleNamespace(
            block_pool=pool,
            watermark_blocks=0,
            coordinator=SimpleNamespace(single_type_managers=[SimpleNamespace(req_to_blocks=self.requests)]),
        )
        super().__init__(
            kv_cache_manager=manager,
            scheduler_config=SimpleNamespace(watermark=0.0),
            policy=SimpleNamespace(name="FCFS"),
            running=[],
            kv_holding_waiting=[],
            prev_step_scheduled_req_ids=set(),
            pool=pool,
        )

    def _preempt_request(self, request: Any, timestamp: float, drop_stale_output: bool = False) -> None:
        assert drop_stale_output
        self.pool.free_blocks(reversed(self.requests.pop(request.request_id)))


class Pool(RuleBasedStateMachine):
    """Requests come, share prefixes, go; units come and go. `content` says what each block's bytes are."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.pool = self.scheduler.pool
        self.content: dict[int, bytes] = {}
        self.expected: dict[str, list[bytes]] = {}
        self.count = 0

    @initialize(mapped=st.sets(st.integers(1, UNITS - 1)))
    def start(self, mapped: set[int]) -> None:
        self.units = BlockUnits(self.scheduler, UNIT_BLOCKS, [0, *mapped], BusyBlocks.MOVE)

    def key(self, name: bytes) -> Any:
        return make_block_hash_with_group_id(BlockHash(name), 0)

    @rule(prompt=st.integers(0, 5), length=st.integers(1, 6))
    def admit(self, prompt: int, length: int) -> None:
        names = [f"{prompt}/{i}".encode() for i in range(length)]
        hits: list[Any] = []
        for name in names:
            found = self.pool.get_cached_block(BlockHash(name), [0])
            if not found:
                break
            hits.append(found[0])
        for block, name in zip(hits, names, strict=False):
            assert self.content[block.block_id] == name, "a hit on bytes that are not its own"
        evictable = sum(b.ref_cnt == 0 for b in hits)
        if length - len(hits) > self.pool.get_num_free_blocks() - evictable:
            return
        self.pool.touch(hits)
        fresh = self.pool.get_new_blocks(length - len(hits))
        self.count += 1
        request = f"r{self.count}"
        self.scheduler.requests[request] = hits + fresh
        self.scheduler.running.append(SimpleNamespace(request_id=request))
        self.expected[request] = names
        for block, name in zip(fresh, names[len(hits) :], strict=True):
            self.content[block.block_id] = name
            self.pool._insert_block_hash(self.key(name), block, num_tokens=None)

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.scheduler.running))
        self.scheduler.running.remove(request)
        self.pool.free_blocks(reversed(self.scheduler.requests.pop(request.request_id)))
        del self.expected[request.request_id]

    @rule(count=st.integers(1, UNITS), preempting=st.booleans())
    def shrink(self, count: int, preempting: bool) -> None:
        before, asked = len(self.units.mapped), min(count, len(self.units.mapped) - 1)
        old = {b.block_id: b.block_hash for b in self.pool.blocks if b.block_hash is not None}
        self.pool.take_events()
        if preempting:
            done = self.units.shrink_preempting(count, 1, lambda: None)
            assert before - len(self.units.mapped) == asked, (
                "with preemption everything above the floor can be given up"
            )
        else:
            done = self.units.shrink(count, 1)
            assert not done.preempted
        for source, target in zip(done.plan.sources.tolist(), done.plan.targets.tolist(), strict=True):
            self.content[target] = self.content[source]
        for unit in done.plan.units.tolist():
            for block in range(unit * UNIT_BLOCKS, (unit + 1) * UNIT_BLOCKS):
                self.content.pop(block, None)
        survived = {b.block_hash for b in self.pool.blocks if b.block_hash is not None}
        removed = [event for event in self.pool.take_events() if type(event).__name__ == "BlockRemoved"]
        assert len(removed) == done.evicted_blocks
        assert len({h for h in old.values() if h is not None} - survived) <= done.evicted_blocks
        alive = {r.request_id for r in self.scheduler.running}
        self.expected = {name: names for name, names in self.expected.items() if name in alive}

    @rule(count=st.integers(1, UNITS))
    def grow(self, count: int) -> None:
        units = self.units.unmapped(count)
        for unit in units:
            for block in range(unit * UNIT_BLOCKS, (unit + 1) * UNIT_BLOCKS):
                self.content[block] = b"zero"
        self.units.offer(units)

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "units"):
            self.units.check_integrity()

    @invariant()
    def every_request_has_its_bytes(self) -> None:
        for request, names in self.expected.items():
            assert [self.content[b.block_id] for b in self.scheduler.requests[request]] == names

    @invariant()
    def references_add_up(self) -> None:
        held: dict[int, int] = defaultdict(int)
        for blocks in self.scheduler.requests.values():
            for block in blocks:
                held[block.block_id] += 1
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == held[block.block_id]


TestPool = Pool.TestCase
TestPool.settings = examples(60, steps=40)


def cached(pool: BlockPool, names: list[bytes]) -> list[Any]:
    blocks = pool.get_new_blocks(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool._insert_block_hash(make_block_hash_with_group_id(BlockHash(name), 0), block, num_tokens=None)
    return blocks


def test_a_shrink_costs_exactly_the_coldest_part_of_the_cache() -> None:
    scheduler = Scheduler()
    units = BlockUnits(scheduler, UNIT_BLOCKS, list(range(UNITS)), BusyBlocks.MOVE)
    pool = scheduler.pool
    names = [bytes([i]) for i in range(23)]
    blocks = cached(pool, names)
    order = [7, 3, 19, *[i for i in range(23) if i not in (7, 3, 19)]]  # freed in this order: coldest first
    for i in order:
        pool.free_blocks([blocks[i]])
    units.shrink(2, 1)  # 24 - 8 blocks stay, one of them the null block
    left = [n for n in names if pool.get_cached_block(BlockHash(n), [0])]
    assert sorted(left) == sorted(names[i] for i in order[8:])
    queue = [b for b in pool.free_block_queue.get_all_free_blocks() if b.block_hash is not None]
    by_hash = {make_block_hash_with_group_id(BlockHash(n), 0): i for i, n in enumerate(names)}
    assert [by_hash[b.block_hash] for b in queue] == order[8:], "moved blocks keep their age"


def test_blocks_of_a_runner_that_cannot_be_told_never_move_while_busy() -> None:
    scheduler = Scheduler()
    units = BlockUnits(scheduler, UNIT_BLOCKS, list(range(UNITS)), BusyBlocks.STAY)
    held = scheduler.pool.get_new_blocks(20)
    scheduler.requests["r"] = [held[17]]
    scheduler.running.append(SimpleNamespace(request_id="r"))
    scheduler.pool.free_blocks([b for b in held if b is not held[17]])
    done = units.shrink(5, 1)
    assert held[17].block_id // UNIT_BLOCKS in units.mapped
    assert held[17].block_id not in done.plan.sources
    units.check_integrity()


def test_a_block_with_an_unknown_holder_stays_where_it_is() -> None:
    scheduler = Scheduler()
    units = BlockUnits(scheduler, UNIT_BLOCKS, list(range(UNITS)), BusyBlocks.MOVE)
    held = scheduler.pool.get_new_blocks(22)
    scheduler.pool.free_blocks(held[:-1])  # the last one is held by nobody we know: a deferred free, a connector
    units.shrink_preempting(5, 1, lambda: None)
    assert held[-1].ref_cnt == 1
    assert held[-1].block_id // UNIT_BLOCKS in units.mapped
    units.check_integrity()


def test_lent_blocks_are_announced_before_they_go() -> None:
    scheduler = Scheduler()
    units = BlockUnits(scheduler, UNIT_BLOCKS, list(range(UNITS)), BusyBlocks.MOVE)
    lent = scheduler.pool.get_new_blocks(23)
    recalled: list[int] = []
    scheduler.pool.unpin_blocks(lent, lambda block: recalled.append(block.block_id))
    done = units.shrink(3, 1)
    assert {b for u in done.plan.units.tolist() for b in range(u * UNIT_BLOCKS, (u + 1) * UNIT_BLOCKS)} <= set(recalled)


def test_blocks_that_a_step_under_way_may_still_write_are_given_up_after_it() -> None:
    """With a connector and steps scheduled ahead, vLLM frees a preempted request's blocks late: one is preempted, not all."""
    scheduler = Scheduler()
    scheduler.deferred_frees = deque()
    units = BlockUnits(scheduler, UNIT_BLOCKS, list(range(UNITS)), BusyBlocks.MOVE)
    for name in ("first", "last"):
        scheduler.requests[name] = scheduler.pool.get_new_blocks(11)
        scheduler.running.append(SimpleNamespace(request_id=name))
    steps_under_way = 1

    def preempt(request: Any, timestamp: float, drop_stale_output: bool = False) -> None:
        scheduler.deferred_frees.append((1, scheduler.requests.pop(request.request_id)))

    def await_steps() -> None:
        nonlocal steps_under_way
        assert scheduler.deferred_frees
        steps_under_way = 0

    scheduler._preempt_request = preempt  # type: ignore[method-assign]
    done = units.shrink_preempting(3, 1, await_steps)
    assert (len(done.plan.units), len(done.preempted), steps_under_way) == (3, 1, 0)
    assert [request.request_id for request in scheduler.running] == ["first"]
    units.check_integrity()


def test_a_block_that_a_manager_remembers_apart_stays_where_it_is() -> None:
    scheduler = Scheduler()
    units = BlockUnits(scheduler, UNIT_BLOCKS, list(range(UNITS)), BusyBlocks.MOVE)
    held = scheduler.pool.get_new_blocks(23)
    scheduler.requests["r"] = held[-2:]
    manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    manager._producer_partial_tail_reqs = {"r": (held[-1], 7)}
    scheduler.pool.free_blocks(held[:-2])
    done = units.shrink(5, 1)
    assert held[-1].block_id not in done.plan.sources.tolist()
    assert held[-1].block_id // UNIT_BLOCKS in units.mapped
