"""What is read together: sets of ids, one a step, as flat arrays; and a ring of the last of them.

An id is that of a block or of a page. Nothing here grows: the ring holds so many steps and so many ids, and forgets the oldest.
Raw sets are kept, no sketches: a step costs microseconds to record, and a window of 512 steps holds all that clustering needs.
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
    """Sets of ids below `size`. Set s is `items[starts[s] : starts[s + 1]]`; no id is twice in a set."""

    size: int
    starts: IntArray
    """[steps + 1]."""
    items: IntArray
    """[ids in all sets]."""

    @classmethod
    def of(cls, sets: Sequence[IntArray], *, size: int) -> Profile:
        """Raises ConfigError for an id outside [0, size)."""
        starts = np.concatenate(([0], np.cumsum([len(ids) for ids in sets], dtype=np.int64)))
        items = np.concatenate(sets).astype(np.int64) if sets else np.empty(0, dtype=np.int64)
        if len(items) and not 0 <= items.min() <= items.max() < size:
            raise ConfigError(f"profile: ids from {items.min()} to {items.max()} in a profile of {size}")
        return cls(size=size, starts=starts, items=items)

    @property
    def steps(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[IntArray]:
        """The sets, oldest first, as views."""
        return (self.items[start:end] for start, end in zip(self.starts[:-1], self.starts[1:], strict=True))

    def part(self, first: int, end: int) -> Profile:
        """Steps [first, end), as far as there are any."""
        first, end = min(first, self.steps), min(end, self.steps)
        starts = self.starts[first : max(first, end) + 1]
        return Profile(size=self.size, starts=starts - starts[0], items=self.items[starts[0] : starts[-1]])

    def counts(self) -> IntArray:
        """[size]: steps that read each id."""
        return np.bincount(self.items, minlength=self.size)

    def step_of_items(self) -> IntArray:
        """[ids in all sets]: the step of each of `items`."""
        return np.repeat(np.arange(self.steps), np.diff(self.starts))

    def by_id(self) -> tuple[IntArray, IntArray]:
        """The other way round: (starts [size + 1], steps), id i was read in `steps[starts[i] : starts[i + 1]]`, rising."""
        order = np.argsort(self.items, kind="stable")
        starts = np.concatenate(([0], np.cumsum(self.counts())))
        return starts, self.step_of_items()[order]

    def mapped(self, place_of: IntArray, *, size: int) -> Profile:
        """The places that each step reads, each once. `place_of`: [self.size], a place below `size` or -1, which is left out."""
        places = place_of[self.items]
        keys = np.unique((self.step_of_items() * size + places)[places >= 0])
        starts = np.searchsorted(keys, np.arange(self.steps + 1) * size)
        return Profile(size=size, starts=starts, items=keys % size)

    def signatures(self) -> Signatures:
        """[size, ceil(steps / 64)]: bit s % 64 of word s // 64 says whether step s read the id."""
        signatures = np.zeros((self.size, -(-self.steps // 64)), dtype=np.uint64)
        for step, ids in enumerate(self):
            signatures[ids, step >> 6] |= np.uint64(1 << (step & 63))
        return signatures


class Activations:
    """A ring of the last sets of ids below `size`."""

    def __init__(self, size: int, *, max_steps: int = 512, max_items: int = 1 << 21) -> None:
        """Holds `max_items` ids of 4 bytes in all, and 8 bytes for each id that there is."""
        self._size, self._max_steps = size, max_steps
        self._items = np.zeros(max_items, dtype=np.int32)
        self._first = np.zeros(
            max_steps, dtype=np.int64
        )  # where each recorded set begins, counted without wrapping round
        self._length = np.zeros(max_steps, dtype=np.int64)
        self._seen = np.full(size, -1, dtype=np.int64)  # scratch: the position where an id was last met
        self._oldest = self._next = 0  # steps, counted from the first ever recorded
        self._end = 0
        self.refused = 0
        """Sets that are longer than the whole ring."""

    @property
    def steps(self) -> int:
        return self._next - self._oldest

    def record(self, ids: IntArray) -> None:
        """One step's set; what is twice in it counts once. O(len(ids)). Raises ConfigError for an id outside [0, size)."""
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._size:
            raise ConfigError(f"activations: ids from {ids.min()} to {ids.max()} in a ring of {self._size}")
        positions = np.arange(len(ids))
        self._seen[ids] = positions  # the last of equal ids wins, so each id is kept once
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
        """A copy of what is remembered, oldest step first."""
        at = np.arange(self._oldest, self._next) % self._max_steps
        starts = np.concatenate(([0], np.cumsum(self._length[at])))
        where = np.arange(self._end - starts[-1], self._end) % len(self._items)
        return Profile(size=self._size, starts=starts, items=self._items[where].astype(np.int64))
