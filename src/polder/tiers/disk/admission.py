"""Decides which blocks are worth writing to disk, and how many bytes may be written each day.

In chats 76 % of the blocks are never read again, and every written page wears a disk out and delays its reads. So a
block is written at once only if blocks of its class are read again often enough; otherwise it is written at its second
use, when it was hit in the host tier. Its class is, first, which share of the request that asked for it first was known
(below 1/4: a new conversation; above 3/4: the next turn of one; in between; or the block was generated), and second,
whether it was hit before.

For each class, the share of blocks that are asked for again within the lifetime of a page is learnt as in
eviction/reuse_times.py. This needs only the keys, so blocks that are not written teach as much as those that are, and a wrong
refusal is corrected. Until a class has had `trial_blocks` blocks, its blocks are written.

Memory is bounded: four numbers for each remembered key.
"""

from __future__ import annotations

import numpy as np

from polder.arrays import BoolArray, FloatArray, IntArray, UintArray
from polder.errors import ConfigError
from polder.tiers.eviction.ghosts import Ghosts
from polder.tiers.eviction.reuse_times import ReuseTimes

__all__ = ["WriteAdmission", "WriteBudget"]

_KNOWN_SHARES = (0.25, 0.75)
_GENERATED = len(_KNOWN_SHARES) + 1
_KINDS = _GENERATED + 1
_CENSUS_ROWS = 1 << 15
_DAY_S = 86400.0


class WriteAdmission:
    """Not thread-safe. Blocks are given by the first words of their ids (slots.block_ids). Times are seconds of one
    clock."""

    def __init__(
        self,
        *,
        remembered: int,
        least_reuse: float = 0.3,
        trial_blocks: int = 512,
        halflife_s: float = 3600.0,
        estimate_every_s: float = 10.0,
    ) -> None:
        """`remembered`: how many keys are kept, rounded up to a power of two. `least_reuse`: the share of a class's
        blocks that must be asked for again for all of them to be written. A write costs the disk about as much as three
        reads.

        Raises ConfigError unless `least_reuse` is between 0 and 1.
        """
        if not 0 <= least_reuse <= 1:
            raise ConfigError(f"least_reuse: {least_reuse}; write a share from 0 to 1")
        self.lifetime_s = float("inf")
        """How long a page stays on disk, as measured; infinite until one was evicted."""
        self._least, self._trial, self._every_s = least_reuse, trial_blocks, estimate_every_s
        self._seen = Ghosts(remembered)
        self._times = ReuseTimes(levels=2, kinds=_KINDS, prior_spells=50.0, halflife_s=halflife_s)
        self._begun = np.zeros(2 * _KINDS, dtype=np.int64)
        self._estimated_s: float | None = None
        self.shares: FloatArray = np.ones(2 * _KINDS)
        """[classes] the share of blocks that are asked for again. The classes of blocks that were not hit come first.
        """

    def asked(self, numbers: UintArray, now: float) -> None:
        """A request asks for these blocks."""
        if not len(numbers):
            return
        self._advance(now)
        rows, known = self._seen.find(numbers)
        old = rows[known]
        self._times.used(self._seen.group[old], np.maximum(now - self._seen.last_s[old], 0.0))
        hits = np.zeros(len(numbers), dtype=np.int64)
        hits[known] = self._seen.hits[old] + 1
        kind = int(np.searchsorted(_KNOWN_SHARES, len(old) / len(numbers), side="right"))
        self._remember(numbers, np.where(hits > 0, _KINDS + kind, kind), hits, now)

    def computed(self, numbers: UintArray, now: float) -> None:
        """The engine has computed these blocks. Those that nobody has asked for were generated."""
        self._advance(now)
        _, known = self._seen.find(numbers)
        fresh = numbers[~known]
        zeros = np.zeros(len(fresh), dtype=np.int64)
        self._remember(fresh, zeros + _GENERATED, zeros, now)

    def judge(self, numbers: UintArray, now: float) -> BoolArray:
        """[n] which of these blocks are worth writing now."""
        self._advance(now)
        rows, known = self._seen.find(numbers)
        groups = np.where(known, self._seen.group[rows], _GENERATED)
        hit = known & (self._seen.hits[rows] > 0)
        wanted: BoolArray = hit | (self.shares[groups] >= self._least) | (self._begun[groups] <= self._trial)
        return wanted

    def _remember(self, numbers: UintArray, groups: IntArray, hits: IntArray, now: float) -> None:
        rows, known = self._seen.find(numbers)
        gone = rows[~known & (self._seen.group[rows] >= 0)]
        self._times.lost(self._seen.group[gone], np.maximum(now - self._seen.last_s[gone], 0.0))
        self._seen.put(numbers, np.full(len(numbers), now), hits, groups)
        self._begun += np.bincount(groups, minlength=2 * _KINDS)

    def _advance(self, now: float) -> None:
        if self._estimated_s is None:
            self._estimated_s = now
        if now - self._estimated_s < self._every_s:
            return
        every = max(1, len(self._seen.group) // _CENSUS_ROWS)
        rows = np.flatnonzero(self._seen.group[::every] >= 0) * every
        ages = np.maximum(now - self._seen.last_s[rows], 0.0)
        in_sight = self._times.census(self._seen.group[rows], ages) * every
        self._times.estimate(in_sight, now - self._estimated_s)
        self._estimated_s = now
        self.shares = self._times.reused_within(self.lifetime_s)


class WriteBudget:
    """Limits the bytes written: at most `bytes_per_day` in any 24 hours, with bursts of at most an hour's share.

    This is a token bucket. What is taken counts against its size until it is settled, so the limit of a day also holds
    when writes are granted in time and carried out late.
    """

    def __init__(self, bytes_per_day: int | None) -> None:
        """`bytes_per_day`: None means unlimited. Raises ConfigError for a negative number."""
        if bytes_per_day is not None and bytes_per_day < 0:
            raise ConfigError(f"a write budget of {bytes_per_day} bytes a day; write a number from 0, or none")
        self._limit = bytes_per_day
        self._most = (bytes_per_day or 0) / 24
        self._per_s = ((bytes_per_day or 0) - self._most) / _DAY_S
        self._tokens, self._outstanding = self._most, 0
        self._filled_s: float | None = None

    def take(self, blocks: int, block_bytes: int, now: float) -> int:
        """Returns how many of `blocks` may be written. They are outstanding until `settle`."""
        if self._limit is None:
            return blocks
        self._fill(now)
        granted = max(0, min(blocks, int(self._tokens // block_bytes)))
        self._tokens -= granted * block_bytes
        self._outstanding += granted * block_bytes
        return granted

    def settle(self, granted_bytes: int, now: float, *, unused_bytes: int = 0) -> None:
        """Writes that were granted have ended. `unused_bytes` of them were not attempted."""
        if self._limit is not None:
            self._fill(now)
            self._outstanding = max(0, self._outstanding - granted_bytes)
            self._tokens += min(unused_bytes, granted_bytes)

    def _fill(self, now: float) -> None:
        if self._filled_s is not None:
            self._tokens += max(0.0, now - self._filled_s) * self._per_s
        self._tokens = min(self._tokens, self._most - self._outstanding)
        self._filled_s = now
