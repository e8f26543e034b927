"""Which copy of each wanted page is read, so that the disk that is busy longest is busy as short as it can be.

With R_e the disks that have a copy of page e, the shortest time in which all wanted pages can be read is, in units of
one page at speed 1,

    T* = max over sets of disks S of |{e : R_e within S}| / speed(S)

(Hall's theorem, or max-flow = min-cut). Pages with the same R_e are alike, so the counts of at most 2^disks classes
decide, and `exact` reaches the best whole-page schedule: the least T for which every S has room, sum over S of floor(T
speed) >= pages within S; pages are then given out by augmenting paths. `greedy` is Swarm's rule, section 6.

Sets of disks are bit masks: bit d is disk d.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polder.arrays import BoolArray, FloatArray, IntArray
from polder.errors import ConfigError, IntegrityError

__all__ = ["MAX_DISKS", "exact", "greedy"]

MAX_DISKS = 16
"""Of `bound` and `exact`: they look at every set of disks."""
_EPSILON = 1e-9


def exact(masks: IntArray, speeds: FloatArray) -> IntArray:
    """[n]: the disk that reads each page, -1 for a mask of 0. No other choice is done sooner.

    `masks` [n], `speeds` [disks] above 0. Raises ConfigError above MAX_DISKS disks.
    """
    chosen = np.full(len(masks), -1, dtype=np.int64)
    some = np.flatnonzero(masks)
    if not len(some):
        return chosen
    quota = _quotas(masks[some], speeds)
    kinds, kind_of, counts = np.unique(masks[some], return_inverse=True, return_counts=True)
    given = _give_out(kinds, counts, quota)
    by_kind = np.argsort(kind_of, kind="stable")
    disks = np.tile(np.arange(len(speeds)), len(kinds))
    chosen[some[by_kind]] = np.repeat(disks, given.reshape(-1))
    return chosen


def greedy(masks: IntArray, speeds: FloatArray) -> IntArray:
    """[n]: Swarm's choice: pages with one copy first, the others by rising number of copies, each to the disk done
    soonest.

    Among pages with equally many copies the order given counts. Give them in the order of activation: sorted by mask,
    as arrays that were grouped are, the rule ends up to 1.4 times above the optimum.
    """
    chosen = np.full(len(masks), -1, dtype=np.int64)
    done = np.zeros(len(speeds))
    copies = np.bitwise_count(masks.astype(np.uint64))
    single = np.flatnonzero(copies == 1)
    chosen[single] = np.log2(masks[single]).astype(np.int64)
    done += np.bincount(chosen[single], minlength=len(speeds)) / speeds
    later, cost = done.tolist(), (1.0 / speeds).tolist()
    disks_of: dict[int, list[int]] = {}
    several = np.flatnonzero(copies > 1)
    for page in several[np.argsort(copies[several], kind="stable")].tolist():
        mask = int(masks[page])
        if mask not in disks_of:
            disks_of[mask] = [disk for disk in range(len(cost)) if mask >> disk & 1]
        best = min(disks_of[mask], key=lambda disk: later[disk] + cost[disk])
        later[best] += cost[best]
        chosen[page] = best
    return chosen


def _of_sets(values: FloatArray | IntArray) -> FloatArray:
    """[2^disks]: the sum over each set."""
    sums = np.zeros(1)
    for value in values.tolist():
        sums = np.concatenate([sums, sums + value])
    return sums


def _within_sets(masks: IntArray, speeds: FloatArray) -> FloatArray:
    """[2^disks]: pages all whose copies are within each set."""
    disks = len(speeds)
    if disks > MAX_DISKS:
        raise ConfigError(f"schedule: {disks} disks; at most {MAX_DISKS} can be scheduled exactly")
    within = np.bincount(masks, minlength=1 << disks).astype(np.float64)
    for disk in range(disks):
        halves = within.reshape(-1, 2, 1 << disk)
        halves[:, 1] += halves[:, 0]
    return within


def _quotas(masks: IntArray, speeds: FloatArray) -> IntArray:
    """[disks]: pages that each disk has time for within the least time that is enough."""
    within = _within_sets(masks, speeds)
    best = float((within[1:] / _of_sets(speeds)[1:]).max())
    # Rounding the best split of pages up takes no longer than this, and less only helps when it lets a disk read one page more.
    enough = float((np.ceil(best * speeds - _EPSILON) / speeds).max())
    times = [
        np.arange(np.ceil(best * speed - _EPSILON), np.floor(enough * speed + _EPSILON) + 1) / speed for speed in speeds
    ]
    candidates = np.unique(np.concatenate([*times, [enough]]))
    candidates = candidates[candidates <= enough + _EPSILON]
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if (within <= _of_sets(np.floor(candidates[middle] * speeds + _EPSILON))).all():
            high = middle
        else:
            low = middle + 1
    quota: IntArray = np.floor(candidates[low] * speeds + _EPSILON).astype(np.int64)
    return quota


def _give_out(kinds: IntArray, counts: IntArray, quota: IntArray) -> IntArray:
    """[kinds, disks]: pages of each kind that each disk reads; no disk more than its quota, which is known to be
    possible."""
    may = (kinds[:, None] >> np.arange(len(quota)) & 1).astype(np.bool_)
    shared = np.zeros(may.shape, dtype=np.int64)
    rooms, lefts = quota.tolist(), counts.tolist()
    disks_of = [np.flatnonzero(row).tolist() for row in may]
    for kind in sorted(range(len(kinds)), key=lambda kind: len(disks_of[kind])):
        # In proportion to the room that is left, so that no disk fills up before the others.
        total = sum(rooms[disk] for disk in disks_of[kind])
        count = min(lefts[kind], total)
        for disk in disks_of[kind]:
            share = count * rooms[disk] // total if total else 0
            shared[kind, disk] = share
            rooms[disk] -= share
            lefts[kind] -= share
    return _by_paths(shared, may, np.array(rooms), np.array(lefts))


def _by_paths(given: IntArray, may: BoolArray, room: IntArray, left: IntArray) -> IntArray:
    """What is left of each kind goes to disks with room, if need be by passing others on. Changes its arguments."""
    for kind in np.flatnonzero(left).tolist():
        while left[kind]:
            path = _path_to_room(given, may, room, kind)
            moved = [int(given[from_kind, disk]) for from_kind, disk in zip(path.kinds[1:], path.disks, strict=False)]
            count = min(int(left[kind]), int(room[path.disks[-1]]), *moved)
            for from_kind, disk in zip(path.kinds[1:], path.disks, strict=False):
                given[from_kind, disk] -= count
            for to_kind, disk in zip(path.kinds, path.disks, strict=True):
                given[to_kind, disk] += count
            room[path.disks[-1]] -= count
            left[kind] -= count
    return given


@dataclass(frozen=True, kw_only=True)
class _Path:
    """Pages of kinds[0] go to disks[0], which passes as many of kinds[1] on to disks[1], and so on to a disk with room."""

    kinds: list[int]
    disks: list[int]


def _path_to_room(given: IntArray, may: BoolArray, room: IntArray, kind: int) -> _Path:
    came: dict[int, tuple[int, int]] = dict.fromkeys(np.flatnonzero(may[kind]).tolist(), (kind, -1))
    queue = list(came)
    for disk in queue:
        if room[disk] > 0:
            kinds, disks = [], []
            while disk >= 0:
                by, before = came[disk]
                kinds.append(by)
                disks.append(disk)
                disk = before
            return _Path(kinds=kinds[::-1], disks=disks[::-1])
        for passed in np.flatnonzero(given[:, disk]).tolist():
            for other in np.flatnonzero(may[passed]).tolist():
                if other not in came:
                    came[other] = (passed, disk)
                    queue.append(other)
    raise IntegrityError("schedule: no room although every set of disks has some")
