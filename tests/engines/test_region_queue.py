"""The queue with two regions is vLLM's own queue twice, one behind the other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.conftest import examples

pytest.importorskip("vllm")
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from polder.engines.vllm.core.region_queue import RegionQueue

BLOCKS = 14


class Queue(RuleBasedStateMachine):
    """`expected`: two of vLLM's queues over twins of the blocks, for the regular ones and for the windowed ones."""

    @initialize(first=st.integers(0, BLOCKS), free=st.sets(st.integers(0, BLOCKS - 1)))
    def start(self, first: int, free: set[int]) -> None:
        self.blocks = [KVCacheBlock(number) for number in range(BLOCKS)]
        self.twins = [KVCacheBlock(number) for number in range(BLOCKS)]
        self.first, self.taken = first, sorted({*range(BLOCKS)} - free)
        self.queue = RegionQueue([self.blocks[n] for n in sorted(free)], first)
        self.expected = [
            FreeKVCacheBlockQueue([self.twins[n] for n in sorted(free) if (n >= first) == windowed])
            for windowed in (False, True)
        ]

    def region(self, number: int) -> Any:
        return self.expected[number >= self.first]

    def split(self, numbers: list[int]) -> list[list[Any]]:
        return [[self.twins[n] for n in numbers if (n >= self.first) == windowed] for windowed in (False, True)]

    def order(self) -> list[int]:
        return [block.block_id for region in self.expected for block in region.get_all_free_blocks()]

    @rule()
    def popleft(self) -> None:
        if not (order := self.order()):
            with pytest.raises(ValueError, match="No free blocks"):
                self.queue.popleft()
            return
        block = self.queue.popleft()
        assert block.block_id == order[0] == self.region(order[0]).popleft().block_id
        self.took([block])

    @rule(data=st.data())
    def popleft_n(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.order())))
        blocks = self.queue.popleft_n(count)
        regular = min(count, self.expected[0].num_free_blocks)
        twins = self.expected[0].popleft_n(regular) + self.expected[1].popleft_n(count - regular)
        assert [block.block_id for block in blocks] == [twin.block_id for twin in twins]
        self.took(blocks)

    @precondition(lambda self: self.order())
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.order()))
        self.region(number).remove(self.twins[number])
        self.queue.remove(self.blocks[number])
        self.took([self.blocks[number]])

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.taken))
        self.region(number).append(self.twins[number])
        self.queue.append(self.blocks[number])
        self.taken.remove(number)

    @rule(data=st.data(), ahead=st.booleans())
    def put_n(self, data: st.DataObject, ahead: bool) -> None:
        count = data.draw(st.integers(0, len(self.taken)))
        numbers = data.draw(st.permutations(self.taken))[:count]
        for region, twins in zip(self.expected, self.split(numbers), strict=True):
            (region.prepend_n if ahead else region.append_n)(twins)
        (self.queue.prepend_n if ahead else self.queue.append_n)([self.blocks[n] for n in numbers])
        self.taken = [number for number in self.taken if number not in numbers]

    def took(self, blocks: list[Any]) -> None:
        assert all(block.prev_free_block is None and block.next_free_block is None for block in blocks)
        self.taken = sorted({*self.taken, *(block.block_id for block in blocks)})

    @invariant()
    def regions_are_one_behind_the_other_each_in_vllms_order(self) -> None:
        if hasattr(self, "queue"):
            assert [block.block_id for block in self.queue.get_all_free_blocks()] == self.order()

    @invariant()
    def counts_add_up(self) -> None:
        if hasattr(self, "queue"):
            assert self.queue.num_free_blocks == len(self.order())
            assert self.queue.free_windowed == self.expected[1].num_free_blocks

    @invariant()
    def links_lead_back_as_they_lead_on(self) -> None:
        if hasattr(self, "queue"):
            block, numbers = self.queue.fake_free_list_tail, []
            while (before := block.prev_free_block) is not self.queue.fake_free_list_head:
                assert before.next_free_block is block
                numbers.append(before.block_id)
                block = before
            assert self.queue.fake_free_list_head.next_free_block is block
            assert numbers[::-1] == self.order()


TestQueue = Queue.TestCase
TestQueue.settings = examples(80, steps=40)


def test_a_region_that_was_empty_is_found_again() -> None:
    blocks = [KVCacheBlock(number) for number in range(6)]
    queue = RegionQueue(blocks, 3)
    taken = queue.popleft_n(6)
    queue.append_n(taken[3:])
    queue.prepend_n([taken[0]])
    queue.append(taken[1])
    assert [block.block_id for block in queue.get_all_free_blocks()] == [0, 1, 3, 4, 5]
    assert queue.free_windowed == 3


def test_a_windowed_block_goes_only_when_no_regular_one_is_free() -> None:
    queue = RegionQueue([KVCacheBlock(number) for number in range(8)], 4)
    first = queue.popleft_n(6)
    queue.append_n(first)
    assert sorted(block.block_id for block in queue.popleft_n(4)) == [0, 1, 2, 3]
