"""Which entries stay in memory: the paper's benefit score, equation (6), and LRU.

As printed, the score is S = (f T_base + s T_transfer) / s. Its second term is the same for all, so it orders by f / s
alone. But an entry in memory saves its whole read each time that it is activated, so the score here is S = f (T_base +
s T_transfer) / s, the seconds saved for each byte of memory.

f is the number of activations, halved every few steps. The paper adds one for each activation and subtracts one in each
step in which a resident entry is idle (section 6). When the topic changes, entries that were read often long ago then
stay too long, and LRU is better (hit rate 0.54 against 0.77, on sticky clusters with a tenth in memory). Halved every
step, the score is better than both.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from polder.arrays import BoolArray, FloatArray, IntArray
from polder.errors import ConfigError, IntegrityError

__all__ = ["BenefitSet", "HotSet", "LruSet", "benefit"]


def benefit(counts: FloatArray, sizes_bytes: FloatArray, *, latency_s: float, bytes_per_s: float) -> FloatArray:
    """[items] equation (6), corrected as explained above, in seconds per byte."""
    return counts * (latency_s + sizes_bytes / bytes_per_s) / sizes_bytes


class HotSet(Protocol):
    """Chooses which items are resident, within a byte budget that is never exceeded."""

    resident: BoolArray
    """[items] which items are resident."""

    def step(self, activated: IntArray) -> IntArray:
        """One step reads these items, each once. Updates `resident`, and returns those that were not resident."""


class BenefitSet:
    """Keeps the items with the highest benefit. An item that was just read replaces others only if its score is
    higher."""

    def __init__(
        self,
        sizes_bytes: IntArray,
        budget_bytes: int,
        *,
        latency_s: float,
        bytes_per_s: float,
        halflife_steps: float = 1.0,
    ) -> None:
        """`halflife_steps`: short where the same items are read for a while, long where popularity is stable.

        Raises ConfigError for an item without a size, or a half-life that is not above 0.
        """
        if halflife_steps <= 0:
            raise ConfigError(f"hot set: a half-life of {halflife_steps} steps; write a number above 0")
        self._decay = 0.5 ** (1 / halflife_steps)
        self._sizes, self._budget = _checked(sizes_bytes), budget_bytes
        self._counts = np.zeros(len(sizes_bytes))
        # The score of one activation; the score of an item is proportional to its activations.
        self._each = benefit(np.ones(len(sizes_bytes)), self._sizes, latency_s=latency_s, bytes_per_s=bytes_per_s)
        self.resident: BoolArray = np.zeros(len(sizes_bytes), dtype=np.bool_)

    def step(self, activated: IntArray) -> IntArray:
        missing = activated[~self.resident[activated]]
        self._counts *= self._decay
        self._counts[activated] += 1
        candidates = np.concatenate([np.flatnonzero(self.resident), missing])
        score = self._counts[candidates] * self._each[candidates]
        # The sort is stable and residents come first, so among equals the resident stays.
        best = candidates[np.argsort(-score, kind="stable")]
        self.resident[:] = False
        self.resident[best[np.cumsum(self._sizes[best]) <= self._budget]] = True
        return missing

    def check_integrity(self) -> None:
        _check_budget(self.resident, self._sizes, self._budget)


class LruSet:
    """Keeps the items that were read last."""

    def __init__(self, sizes_bytes: IntArray, budget_bytes: int) -> None:
        """Raises ConfigError for an item without a size."""
        self._sizes, self._budget = _checked(sizes_bytes), budget_bytes
        self._last = np.full(len(sizes_bytes), -1, dtype=np.int64)
        self._clock = 0
        self.resident: BoolArray = np.zeros(len(sizes_bytes), dtype=np.bool_)

    def step(self, activated: IntArray) -> IntArray:
        missing = activated[~self.resident[activated]]
        self._last[activated] = np.arange(self._clock, self._clock + len(activated))
        self._clock += len(activated)
        candidates = np.flatnonzero(self.resident)
        candidates = np.concatenate([candidates, missing])
        newest = candidates[np.argsort(-self._last[candidates], kind="stable")]
        self.resident[:] = False
        self.resident[newest[np.cumsum(self._sizes[newest]) <= self._budget]] = True
        return missing

    def check_integrity(self) -> None:
        _check_budget(self.resident, self._sizes, self._budget)


def _checked(sizes_bytes: IntArray) -> FloatArray:
    if len(sizes_bytes) and sizes_bytes.min() <= 0:
        raise ConfigError(f"hot set: an item of {int(sizes_bytes.min())} bytes")
    return sizes_bytes.astype(np.float64)


def _check_budget(resident: BoolArray, sizes: FloatArray, budget_bytes: int) -> None:
    held = int(sizes[resident].sum())
    if held > budget_bytes:
        raise IntegrityError(f"hot set: {held} bytes of {budget_bytes}")
