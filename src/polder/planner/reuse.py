"""What a larger or smaller prefix cache would save: an online reuse-distance curve.

A request's prefix of n blocks hits in an LRU cache of c blocks if every one of them was touched again within c distinct
blocks. The tracker keeps the blocks' hashes in order of last touch, far beyond what the cache holds, and for each touch
counts the distinct blocks touched since: the LRU stack distance (Mattson et al., IBM Systems Journal 9(2), 1970), by a
Fenwick tree in O(log n). A prefix cannot hit past its first miss, so a block counts with the largest distance of its
prefix so far. Hits are summed by distance with an exponential decay. This gives, for every cache size, the tokens saved
per second recently.

Time and memory are bounded. Only hashes in a fixed part of the hash space are tracked, and their distances are scaled
up (SHARDS, Waldspurger et al., FAST 2015, section 3). At most `max_tracked` are kept; older ones are forgotten.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

__all__ = ["ReuseTracker"]


class ReuseTracker:
    """Reuse of one engine's prefix blocks. Times are seconds of the caller's clock; not thread-safe."""

    def __init__(
        self,
        *,
        unit_blocks: int,
        max_units: int,
        block_tokens: int,
        halflife_s: float = 60.0,
        max_tracked: int = 4096,
    ) -> None:
        """Curves reach from 0 to `max_units` units of `unit_blocks` blocks each."""
        self._unit_blocks = unit_blocks
        self._max_units = max_units
        self._block_tokens = block_tokens
        self._tau_s = halflife_s / math.log(2)
        span_blocks = unit_blocks * max_units
        self._shift = max(0, math.ceil(math.log2(max(1, span_blocks / max_tracked))))
        self._limit = max(1, span_blocks >> self._shift)
        self._saved = np.zeros(max_units + 1)
        """Decayed tokens whose distance lies within unit i (index 0 unused)."""
        self._decayed_at = 0.0
        self._last: OrderedDict[int, int] = OrderedDict()
        self._size = 4 * self._limit + 64
        self._tree = [0] * (self._size + 1)
        self._clock = 0

    @property
    def tracked(self) -> int:
        return len(self._last)

    def touch(self, hashes: Sequence[bytes], now: float) -> None:
        """A request whose prompt has these block hashes (first block first) has been admitted at `now`."""
        self._decay(now)
        mask = (1 << self._shift) - 1
        scale, weight = 1 << self._shift, self._block_tokens << self._shift
        furthest = 0
        missed = False
        for raw in hashes:
            key = int.from_bytes(raw[:8], "little")
            if key & mask:
                continue
            at = self._last.pop(key, None)
            if at is None:
                missed = True
            else:
                furthest = max(furthest, (len(self._last) + 2 - self._older(at)) * scale)
                self._add(at, -1)
                if not missed:
                    unit = -(-furthest // self._unit_blocks)
                    if unit <= self._max_units:
                        self._saved[unit] += weight
            self._append(key)

    def curve(self, now: float, seconds_per_token: float) -> list[float]:
        """Seconds of prefill saved per second with 0, 1, ..., `max_units` units; non-decreasing."""
        self._decay(now)
        values: list[float] = (np.cumsum(self._saved) * (seconds_per_token / self._tau_s)).tolist()
        return values

    def _decay(self, now: float) -> None:
        if now > self._decayed_at:
            self._saved *= math.exp((self._decayed_at - now) / self._tau_s)
            self._decayed_at = now

    def _append(self, key: int) -> None:
        if self._clock == self._size:
            self._renumber()
        self._clock += 1
        self._last[key] = self._clock
        self._add(self._clock, 1)
        if len(self._last) > self._limit:
            _, at = self._last.popitem(last=False)
            self._add(at, -1)

    def _renumber(self) -> None:
        """The time stamps have reached the end of the tree: number the live ones 1, 2, 3 ... again."""
        self._tree = [0] * (self._size + 1)
        for number, key in enumerate(self._last, start=1):
            self._last[key] = number
            self._add(number, 1)
        self._clock = len(self._last)

    def _add(self, at: int, value: int) -> None:
        while at <= self._size:
            self._tree[at] += value
            at += at & -at

    def _older(self, at: int) -> int:
        """Live stamps at or before `at`."""
        count = 0
        while at:
            count += self._tree[at]
            at -= at & -at
        return count
