"""Chooses which copy of each wanted page is read, so that the last disk is done as early as possible.

Let R_e be the disks that have a copy of page e. The shortest time in which all wanted pages can be read is, in units of
one page at speed 1,

    T* = max over sets of disks S of |{e : R_e within S}| / speed(S)

(Hall's theorem, or max-flow = min-cut). Pages with the same R_e are alike, so counts for at most 2^disks kinds of pages
decide. `exact` finds the best schedule of whole pages: the least T for which every set S has room, that is, the sum of
floor(T speed) over S is at least the number of pages within S. Then it gives pages to disks, and moves some on along
augmenting paths. `greedy` is the rule of the Swarm paper, section 6.

Sets of disks are bit masks: bit d is disk d. scipy's maximum_flow would replace 40 lines here, and is not worth its 40
MB in every worker.
"""

from __future__ import annotations

import numpy as np

from polder.arrays import FloatArray, IntArray
from polder.errors import ConfigError, IntegrityError

__all__ = ["MAX_DISKS", "exact", "greedy"]

MAX_DISKS = 16
"""`exact` looks at every set of disks, so their number is limited."""
_EPSILON = 1e-9


def exact(masks: IntArray, speeds: FloatArray) -> IntArray:
    """[n] the disk that reads each page, -1 for a mask of 0. No other choice is done sooner.

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
    """[n] Swarm's choice: pages by rising number of copies, each from the disk that is done soonest; -1 for a mask of
    0.

    Pages with equally many copies are taken in the given order, which should be the order of activation: when sorted by
    mask, the result is up to 1.4 times slower than the optimum.
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
    # Rounding the best split of pages up takes no longer than this. Only times at which some disk can read one more page
    # need to be tried.
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
    """[kinds, disks] how many pages of each kind each disk reads. No disk gets more than its quota, which is enough for
    all pages."""
    disks_of = [np.flatnonzero(kind >> np.arange(len(quota)) & 1).tolist() for kind in kinds.tolist()]
    given = [[0] * len(quota) for _ in kinds]
    room, left = quota.tolist(), counts.tolist()
    for kind in sorted(range(len(kinds)), key=lambda kind: len(disks_of[kind])):
        # In proportion to the room that is left, so that no disk fills up before the others.
        total = sum(room[disk] for disk in disks_of[kind])
        count = min(left[kind], total)
        for disk in disks_of[kind]:
            share = count * room[disk] // total if total else 0
            given[kind][disk] = share
            room[disk] -= share
            left[kind] -= share

    def move(kind: int, most: int, tried: set[int]) -> int:
        """Gives up to `most` pages of this kind to a disk, which may pass other pages on to make room. Returns how
        many."""
        for disk in disks_of[kind]:
            if disk in tried:
                continue
            tried.add(disk)
            done = int(min(most, room[disk]))
            room[disk] -= done
            for other in range(len(given)) if not done else ():
                if other != kind and given[other][disk] and (done := move(other, min(most, given[other][disk]), tried)):
                    given[other][disk] -= done
                    break
            if done:
                given[kind][disk] += done
                return done
        return 0

    for kind in range(len(kinds)):
        while left[kind]:
            done = move(kind, left[kind], set())
            if not done:
                raise IntegrityError("schedule: no room although every set of disks has some")
            left[kind] -= done
    return np.array(given, dtype=np.int64)
