"""The upper bound of any cache: Belady's replacement, which knows the future (IBM Systems Journal 5(2), 1966).

A full cache evicts the block whose next use is furthest away. If that is the new block, it is not stored at all
(bypass). With blocks of one size no other policy hits more. A request's blocks are played from the tail of its prefix
to the head. So of blocks that are used again together, the deeper ones go first, and a hit block always follows hit
blocks.
"""

from __future__ import annotations

import heapq

import numpy as np

from polder.arrays import IntArray
from polder.sim.traces import Trace

__all__ = ["belady_hit_ratio"]


def belady_hit_ratio(trace: Trace, capacity: int) -> float:
    """The share of the trace's blocks that an optimal cache of `capacity` blocks hits. O(n log capacity)."""
    order = _tail_to_head(trace)
    blocks = trace.blocks[order]
    next_use = _next_use(blocks)
    never = len(blocks)
    held: dict[int, int] = {}  # block: its next use
    furthest: list[tuple[int, int]] = []  # (-next use, block), stale unless `held` agrees
    hit = 0
    for block, following in zip(blocks.tolist(), next_use.tolist(), strict=True):
        if block in held:
            hit += 1
            del held[block]
        if following == never:
            continue  # nothing is gained by keeping it
        if len(held) >= capacity:
            while held.get(furthest[0][1]) != -furthest[0][0]:
                heapq.heappop(furthest)
            if -furthest[0][0] <= following:
                continue
            del held[heapq.heappop(furthest)[1]]
        held[block] = following
        heapq.heappush(furthest, (-following, block))
    return hit / len(blocks)


def _tail_to_head(trace: Trace) -> IntArray:
    """Positions in `trace.blocks`, reversed within each request."""
    lengths = np.diff(trace.starts)
    first_and_last: IntArray = np.repeat(trace.starts[1:] + trace.starts[:-1] - 1, lengths)
    return first_and_last - np.arange(len(trace.blocks))


def _next_use(blocks: IntArray) -> IntArray:
    """For each position the next position with the same block, or len(blocks)."""
    order = np.argsort(blocks, kind="stable")
    following = np.full(len(blocks), len(blocks), dtype=np.int64)
    same = blocks[order[1:]] == blocks[order[:-1]]
    following[order[:-1][same]] = order[1:][same]
    return following
