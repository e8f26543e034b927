"""What was read together: one set of ids for each step, as flat arrays, and a ring that records the last of these sets.

An id is the number of a block, or of a page. The ring holds a fixed number of steps and ids, and forgets the oldest. It
keeps the sets themselves and no sketches: recording a step takes microseconds, and 512 steps are enough for clustering.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.errors import ConfigError

__all__ = ["Activations", "Profile", "Signatures"]

Signatures = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sets of ids below `size`. Set s is `items[starts[s] : starts[s + 1]]`. No id is twice in a set."""

    size: int
    starts: IntArray
    """[steps + 1]"""
    items: IntArray
    """[ids in all sets]"""

    @classmethod
    def of(cls, sets: Sequence[IntArray], *, size: int) -> Profile:
        """Makes a profile of these sets. Raises ConfigError for an id outside [0, size)."""
        starts = np.concatenate(([0], np.cumsum([len(ids) for ids in sets], dtype=np.int64)))
        items = np.concatenate(sets).astype(np.int64) if sets else np.empty(0, dtype=np.int64)
        if len(items) and not 0 <= items.min() <= items.max() < size:
            raise ConfigError(f"profile: ids from {items.min()} to {items.max()} in a profile of {size}")
        return cls(size=size, starts=starts, items=items)

    @property
    def steps(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[IntArray]:
        """The sets as views, the oldest first."""
        return (self.items[start:end] for start, end in zip(self.starts[:-1], self.starts[1:], strict=True))

    def part(self, first: int, end: int) -> Profile:
        """The steps [first, end), as far as they exist."""
        first, end = min(first, self.steps), min(end, self.steps)
        starts = self.starts[first : max(first, end) + 1]
        return Profile(size=self.size, starts=starts - starts[0], items=self.items[starts[0] : starts[-1]])

    def counts(self) -> IntArray:
        """[size] the number of steps that read each id."""
        return np.bincount(self.items, minlength=self.size)

    def step_of_items(self) -> IntArray:
        """[ids in all sets] the step of each of `items`."""
        return np.repeat(np.arange(self.steps), np.diff(self.starts))

    def by_id(self) -> tuple[IntArray, IntArray]:
        """The steps of each id: (starts [size + 1], steps). Id i was read in `steps[starts[i] : starts[i + 1]]`,
        rising."""
        order = np.argsort(self.items, kind="stable")
        starts = np.concatenate(([0], np.cumsum(self.counts())))
        return starts, self.step_of_items()[order]

    def mapped(self, place_of: IntArray, *, size: int) -> Profile:
        """The profile of places instead of ids. `place_of`: [self.size] the place of each id, below `size`, or -1 to
        leave it out."""
        places = place_of[self.items]
        keys = np.unique((self.step_of_items() * size + places)[places >= 0])
        starts = np.searchsorted(keys, np.arange(self.steps + 1) * size)
        return Profile(size=size, starts=starts, items=keys % size)

    def signatures(self) -> Signatures:
        """[size, ceil(steps / 64)] bit s % 64 of word s // 64 says whether step s read the id."""
        signatures = np.zeros((self.size, -(-self.steps // 64)), dtype=np.uint64)
        for step, ids in enumerate(self):
            signatures[ids, step >> 6] |= np.uint64(1 << (step & 63))
        return signatures


class Activations:
    """A ring of the last sets that were read."""

    def __init__(self, size: int, *, max_steps: int = 512, max_items: int = 1 << 21) -> None:
        """`size`: the number of ids. `max_items`: the most ids in all recorded sets together, 4 bytes each; 8 more
        bytes for each id of `size`."""
        self._size, self._max_steps = size, max_steps
        self._items = np.zeros(max_items, dtype=np.int32)
        self._first = np.zeros(max_steps, dtype=np.int64)  # where each recorded set begins, without wrapping round
        self._length = np.zeros(max_steps, dtype=np.int64)
        self._seen = np.full(size, -1, dtype=np.int64)  # scratch: the position where an id was last seen
        self._oldest = self._next = 0  # numbers of steps, counted from the first ever recorded
        self._end = 0
        self.refused = 0
        """The number of sets that were longer than the whole ring."""

    @property
    def steps(self) -> int:
        return self._next - self._oldest

    def record(self, ids: IntArray) -> None:
        """Records the set of one step; repeated ids count once. O(len(ids)). Raises ConfigError for an id outside [0,
        size)."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._size:
            raise ConfigError(f"activations: ids from {ids.min()} to {ids.max()} in a ring of {self._size}")
        positions = np.arange(len(ids))
        self._seen[ids] = positions  # the last of equal ids wins, so each is kept once
        ids = ids[self._seen[ids] == positions]
        capacity = len(self._items)
        if len(ids) > capacity:
            self.refused += 1
            return
        while self.steps and (
            self.steps == self._max_steps
            or self._end + len(ids) - self._first[self._oldest % self._max_steps] > capacity
        ):
            self._oldest += 1
        at = self._next % self._max_steps
        self._first[at], self._length[at] = self._end, len(ids)
        self._items[(self._end + np.arange(len(ids))) % capacity] = ids
        self._end += len(ids)
        self._next += 1

    def profile(self) -> Profile:
        """A copy of the recorded sets, the oldest first."""
        at = np.arange(self._oldest, self._next) % self._max_steps
        starts = np.concatenate(([0], np.cumsum(self._length[at])))
        where = np.arange(self._end - starts[-1], self._end) % len(self._items)
        return Profile(size=self._size, starts=starts, items=self._items[where].astype(np.int64))
