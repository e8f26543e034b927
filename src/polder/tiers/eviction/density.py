"""The eviction policy of the tiers: blocks with the lowest hit density go first, and a prefix goes from its end.

Each block belongs to a group, by two features:

| feature | values |
|---|---|
| hits so far | 0, 1, 2, 3 or more |
| found share of the last request | below 1/4 (a new conversation), 1/4 to 3/4, above 3/4 (the next turn of one) |

`reuse_times` learns for each group and age how many hits a slot gains by keeping such a block. The block with the least
gain goes first, and a new block is refused if it would gain less.

Blocks that a request used together have the same age and the same found share, and a block nearer to the head of the
prefix has at least as many hits, so it is worth at least as much. So a prefix loses its end first, and of two prefixes
of equal worth the older one is lost as a whole before the younger one is cut.

Memory is bounded: 6 numbers for each slot, and 4 for each ghost, with four ghosts for each slot. A use costs a few
microseconds. Slots are sorted in bulk, when a sixteenth of them has gone.
"""

from __future__ import annotations

import numpy as np

from polder.arrays import BoolArray, FloatArray, IntArray, UintArray
from polder.errors import IntegrityError
from polder.tiers.eviction.ghosts import Ghosts
from polder.tiers.eviction.reuse_times import ReuseTimes, bin_of

__all__ = ["HitDensity"]

_LEVELS = 4
"""Number of values of the first feature."""
_KNOWN_SHARES = (0.25, 0.75)
_KINDS = len(_KNOWN_SHARES) + 1
_SAME_USE_S = 0.02
"""Uses this soon after the last one belong to the same request, which looks a block up and then stores it."""
_WORTH_STEPS = 2
"""Worth is compared in half octaves. Finer differences are noise; among equals the older block goes."""

_BULK_SHARE = 16
"""Slots are sorted this many times in one turnover of the cache."""
_CENSUS_ROWS = 1 << 15


class HitDensity:
    """See the module's docstring. An EvictionPolicy."""

    def __init__(
        self,
        capacity: int,
        *,
        ghosts_per_slot: float = 4.0,
        prior_spells: float = 200.0,
        halflife_s: float = 3600.0,
        estimate_every_s: float = 10.0,
    ) -> None:
        self._capacity = capacity
        self._key = np.zeros(capacity, dtype=np.uint64)
        self._depth = np.zeros(capacity, dtype=np.int64)
        self._hits = np.zeros(capacity, dtype=np.int64)
        self._group = np.full(capacity, -1, dtype=np.int64)  # -1: an empty slot
        self._use = np.full(capacity, -1, dtype=np.int64)  # the number of the moment of its last use
        self._last_s = np.zeros(capacity)
        self._ghosts = Ghosts(int(ghosts_per_slot * capacity))
        self._times = ReuseTimes(levels=_LEVELS, kinds=_KINDS, prior_spells=prior_spells, halflife_s=halflife_s)
        self._estimate_every_s = estimate_every_s
        self._estimated_s: float | None = None
        self._now = -np.inf
        self._moment = 0
        self._found = np.empty(0, dtype=np.int64)  # slots that the request of this moment found
        self._rank_worth()
        self._forget_order()

    # ------------------------------------------------------------------ what happens

    def touch(self, slots: IntArray, now: float) -> None:
        self._advance(now)
        self._found = slots
        ages = now - self._last_s[slots]
        again = ages > _SAME_USE_S
        if not again.any():
            return
        found = slots[again]
        self._times.used(self._group[found], ages[again])
        self._hits[found] = _at_least_what_follows(self._hits[found] + 1)
        self._last_s[found], self._use[found] = now, self._moment
        self._group[found] = self._group_of(self._hits[found], len(slots), len(slots))

    def missed(self, keys: UintArray, now: float) -> None:
        self._advance(now)
        if not len(keys):
            return
        rows, known = self._ghosts.find(keys)
        old = rows[known]
        hits = np.zeros(len(keys), dtype=np.int64)
        if len(old):
            self._times.used(self._ghosts.group[old], np.maximum(now - self._ghosts.last_s[old], 0.0))
            hits[known] = self._ghosts.hits[old] + 1
            hits = _at_least_what_follows(hits)
            self._ghosts.drop(old)
        found, total = len(self._found), len(self._found) + len(keys)
        if found:
            self._hits[self._found] = np.maximum(self._hits[self._found], hits[0])
            self._group[self._found] = self._group_of(self._hits[self._found], found + len(old), total)
            self._found = self._found[:0]  # the request is known to its end
        self._remember(keys, np.full(len(keys), now), hits, self._group_of(hits, found + len(old), total))

    def insert(self, slots: IntArray, keys: UintArray, depths: IntArray, now: float) -> None:
        self._advance(now)
        if not len(slots):
            return
        self._hits[slots], self._group[slots] = self._recall(keys, depths)
        rows, known = self._ghosts.find(keys)
        self._ghosts.drop(rows[known])
        self._key[slots], self._depth[slots] = keys, depths
        self._last_s[slots], self._use[slots] = now, self._moment

    def remove(self, slots: IntArray) -> None:
        slots = slots[self._group[slots] >= 0]
        self._found = self._found[~np.isin(self._found, slots)]
        self._remember(self._key[slots], self._last_s[slots], self._hits[slots], self._group[slots])
        self._group[slots] = self._use[slots] = -1

    # ------------------------------------------------------------------ what to do

    def victims(self, count: int, pinned: BoolArray) -> IntArray:
        self._put_in_order(count)
        chosen = self._order[self._unchanged() & ~pinned[self._order]][:count]
        if len(chosen) < count:
            free = np.flatnonzero(~pinned)
            chosen, _ = self._worst(count, free[self._group[free] >= 0])
        return chosen

    def admits(self, keys: UintArray, depths: IntArray, now: float) -> BoolArray:
        self._advance(now)
        count = len(keys)
        wanted = np.zeros(count, dtype=np.bool_)
        if not count:
            return wanted
        _, groups = self._recall(keys, depths)
        self._put_in_order(count)
        victims = self._order_worth[self._unchanged()][:count]
        wanted[: len(victims)] = self._times.worth[groups[: len(victims)], 0] >= victims
        return np.logical_and.accumulate(wanted)

    def check_integrity(self) -> None:
        occupied = self._group >= 0
        if (occupied != (self._use >= 0)).any():
            raise IntegrityError("a slot has a group and no last use, or the other way round")
        if (self._last_s[occupied] > self._now).any() or (self._hits[occupied] < 0).any():
            raise IntegrityError("a slot was used in the future, or less than never")
        resident = np.zeros(len(self._ghosts.key), dtype=np.bool_)
        rows, known = self._ghosts.find(self._key[occupied])
        resident[rows[known]] = True
        if resident.any():
            raise IntegrityError(f"{int(resident.sum())} ghosts of blocks that are stored")

    # ------------------------------------------------------------------ groups

    def _group_of(self, hits: IntArray, known: int, total: int) -> IntArray:
        kind = int(np.searchsorted(_KNOWN_SHARES, known / total))
        return np.minimum(hits, _LEVELS - 1) * _KINDS + kind

    def _recall(self, keys: UintArray, depths: IntArray) -> tuple[IntArray, IntArray]:
        """Hits and groups of new blocks, from the ghosts that `missed` left. A block whose ghost was overwritten counts
        like the block before it."""
        rows, known = self._ghosts.find(keys)
        if not known.any():
            hits = np.zeros(len(keys), dtype=np.int64)
            return hits, self._group_of(hits, int(depths[0]), int(depths[-1]) + 1)
        at = np.maximum.accumulate(np.where(known, np.arange(len(keys)), -1))
        at = rows[np.where(at < 0, int(np.argmax(known)), at)]
        return self._ghosts.hits[at], self._ghosts.group[at]

    def _remember(self, keys: UintArray, last_s: FloatArray, hits: IntArray, groups: IntArray) -> None:
        rows, _ = self._ghosts.find(keys)
        old = rows[self._ghosts.group[rows] >= 0]
        if len(old):
            self._times.lost(self._ghosts.group[old], np.maximum(self._now - self._ghosts.last_s[old], 0.0))
        self._ghosts.put(keys, last_s, hits, groups)

    def _advance(self, now: float) -> None:
        if now <= self._now:
            return
        self._now = now
        self._moment += 1
        self._found = self._found[:0]
        if self._estimated_s is None:
            self._estimated_s = now
        elapsed_s = now - self._estimated_s
        if elapsed_s >= self._estimate_every_s:
            self._estimated_s = now
            in_sight = self._census(self._group, self._last_s) + self._census(self._ghosts.group, self._ghosts.last_s)
            self._times.estimate(in_sight, elapsed_s)
            self._rank_worth()
            self._forget_order()

    def _census(self, groups: IntArray, last_s: FloatArray) -> FloatArray:
        # A large table is sampled. Rows are in random order, so every n-th row will do.
        every = max(1, len(groups) // _CENSUS_ROWS)
        rows = np.flatnonzero(groups[::every] >= 0) * every
        return self._times.census(groups[rows], self._now - last_s[rows]) * every

    # ------------------------------------------------------------------ order

    def _rank_worth(self) -> None:
        steps = np.floor(np.log2(np.maximum(self._times.worth, 1e-9)) * _WORTH_STEPS) + 30 * _WORTH_STEPS
        self._rank = np.clip(steps, 0, 127).astype(np.int64)

    def _forget_order(self) -> None:
        self._order = self._order_use = np.empty(0, dtype=np.int64)
        self._order_worth = np.empty(0)

    def _unchanged(self) -> BoolArray:
        same: BoolArray = self._use[self._order] == self._order_use
        return same

    def _put_in_order(self, count: int) -> None:
        if int(np.count_nonzero(self._unchanged())) < count:
            bulk = max(2 * count, self._capacity // _BULK_SHARE)
            self._order, self._order_worth = self._worst(bulk, np.flatnonzero(self._group >= 0))
            self._order_use = self._use[self._order]

    def _worst(self, count: int, slots: IntArray) -> tuple[IntArray, FloatArray]:
        """The first `count` of these slots to give up, and their worth: by worth in steps, then the longest unused,
        then the deepest."""
        groups, ages = self._group[slots], bin_of(self._now - self._last_s[slots])
        ranks = self._rank[groups, ages]
        depths = np.minimum(self._depth[slots], (1 << 16) - 1)
        order = (ranks << 56) | ((self._use[slots] & ((1 << 40) - 1)) << 16) | ((1 << 16) - 1 - depths)
        if count < len(slots):
            first = np.argpartition(order, count)[:count]
            first = first[np.argsort(order[first])]
        else:
            first = np.argsort(order)
        return slots[first], self._times.worth[groups[first], ages[first]]


def _at_least_what_follows(hits: IntArray) -> IntArray:
    """Raises each count to the largest one behind it: a request that read a block has read the blocks before it."""
    return np.maximum.accumulate(hits[::-1])[::-1]
