"""Replays a trace through an eviction policy: the share of blocks that a cache of a given size would have hit.

A request's blocks are looked up, and the missing ones stored, at one instant of the trace's time. A block is hit if it
and all blocks before it in its prefix are present.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from polder.sim.traces import Trace
from polder.tiers.eviction.policy import EvictionPolicy

__all__ = ["ReplayResult", "replay"]


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """What one cache did on one trace. Counts are blocks."""

    capacity: int
    asked: int
    hit: int
    behind_gap: int
    """Present, but useless: a block before it in its prefix was missing."""
    stored: int
    refused: int
    evicted: int
    policy_s: float
    """Seconds of CPU in the policy and the table around it."""

    @property
    def hit_ratio(self) -> float:
        return self.hit / self.asked if self.asked else 0.0

    @property
    def us_per_block(self) -> float:
        return self.policy_s / self.asked * 1e6 if self.asked else 0.0


def replay(trace: Trace, capacity: int, make_policy: Callable[[int], EvictionPolicy]) -> ReplayResult:
    """Replays the trace through an empty cache of `capacity` blocks."""
    policy = make_policy(capacity)
    keys = trace.keys()
    slot_of = np.full(trace.unique_blocks, -1, dtype=np.int64)
    block_in = np.full(capacity, -1, dtype=np.int64)
    free = np.arange(capacity - 1, -1, -1, dtype=np.int64)
    free_count = capacity
    pinned = np.zeros(capacity, dtype=np.bool_)
    hit = behind = stored = refused = evicted = 0
    started = time.thread_time()
    for request in range(trace.requests):
        now = float(trace.times_s[request])
        blocks = trace.of(request)
        slots = slot_of[blocks]
        present = slots >= 0
        absent = np.flatnonzero(~present)
        found = int(absent[0]) if len(absent) else len(blocks)
        hit += found
        behind += len(blocks) - len(absent) - found
        held = slots[present]
        policy.touch(held, now)
        if len(absent):
            policy.missed(keys[blocks[absent]], now)
            want = absent[:capacity]
            excess = len(want) - free_count
            if excess > 0:
                late = want[free_count:]
                wanted = policy.admits(keys[blocks[late]], late, now)
                count = int(wanted.sum())
                pinned[held] = True  # a request does not evict its own prefix
                gone = policy.victims(count, pinned)
                pinned[held] = False
                if len(gone):
                    policy.remove(gone)
                    slot_of[block_in[gone]] = -1
                    block_in[gone] = -1
                    free[free_count : free_count + len(gone)] = gone
                    free_count += len(gone)
                    evicted += len(gone)
                want = np.concatenate([want[: len(want) - len(late)], late[wanted][: len(gone)]])
            refused += len(absent) - len(want)
            if len(want):
                places = free[free_count - len(want) : free_count][::-1].copy()
                free_count -= len(want)
                slot_of[blocks[want]] = places
                block_in[places] = blocks[want]
                policy.insert(places, keys[blocks[want]], want, now)
                stored += len(want)
            # Touched again after the new blocks, so that the head of a prefix is more recent than its tail.
            policy.touch(held, now)
    return ReplayResult(
        capacity=capacity,
        asked=len(trace.blocks),
        hit=hit,
        behind_gap=behind,
        stored=stored,
        refused=refused,
        evicted=evicted,
        policy_s=time.thread_time() - started,
    )
