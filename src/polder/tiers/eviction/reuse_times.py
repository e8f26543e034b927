"""Learns when blocks are used again: for each group of blocks the probability of a hit at each age, and the worth of a
block.

The probability is estimated as in life tables (Kaplan and Meier, Journal of the American Statistical Association 53,
1958): of the blocks that were seen at an age, the share that was used again before the next age. Blocks that are lost
from sight, or still young, count only for the ages at which they were seen. So neither a small cache nor a short
history makes reuse look rarer than it is.

The worth is the hit density: expected hits for each second of a slot, if the block is kept until the best moment to
give it up (LHD, Beckmann et al., NSDI 2018; with the best moment it is Gittins' index). It may rise with age: a block
that is usually used ten to twenty seconds after its last use is worth more at eight seconds than at zero. Where agents
read their prompts in turn, this keeps the prompts of some users whole, where LRU loses those of all.
"""

from __future__ import annotations

import numpy as np

from polder.arrays import FloatArray, IntArray

__all__ = ["AGE_BINS", "ReuseTimes", "bin_of"]

AGE_BINS = 56
"""Number of bins of age: the first one up to 0.25 s, then three for each octave, the last one from 18 hours on."""
_EDGES_S: FloatArray = np.concatenate([[0.0], 0.25 * 2.0 ** (np.arange(AGE_BINS) / 3)])
_WIDTHS_S = np.diff(_EDGES_S)


def bin_of(ages_s: FloatArray) -> IntArray:
    return np.searchsorted(_EDGES_S[1:-1], ages_s, side="right")


class ReuseTimes:
    """Counts the spells of blocks by group and age. A spell lasts from one use to the next, or until the block is lost
    from sight.

    A group has a level and a kind: group = level * kinds + kind.
    """

    def __init__(self, *, levels: int, kinds: int, prior_spells: float, halflife_s: float) -> None:
        """From `prior_spells` spells on, a group's own counts outweigh those of all groups. Counts halve in
        `halflife_s`."""
        self._levels, self._kinds = levels, kinds
        self._prior_spells, self._halflife_s = prior_spells, halflife_s
        shape = (levels * kinds, AGE_BINS)
        self._used = np.zeros(shape)
        self._lost = np.zeros(shape)
        # Until something is known, older blocks are worth less, as for LRU.
        self.worth: FloatArray = np.tile(1.0 / (1.0 + _EDGES_S[:-1]), (levels * kinds, 1))
        """[groups, AGE_BINS] expected hits for each second of a slot."""
        self._chance = np.zeros(shape)

    def used(self, groups: IntArray, ages_s: FloatArray) -> None:
        np.add.at(self._used, (groups, bin_of(ages_s)), 1.0)

    def lost(self, groups: IntArray, ages_s: FloatArray) -> None:
        np.add.at(self._lost, (groups, bin_of(ages_s)), 1.0)

    def census(self, groups: IntArray, ages_s: FloatArray) -> FloatArray:
        """[groups, AGE_BINS] counts blocks in sight, whose spells have not ended; for `estimate`."""
        count = np.bincount(groups * AGE_BINS + bin_of(ages_s), minlength=self._used.size)
        return count.reshape(self._used.shape).astype(np.float64)

    def estimate(self, in_sight: FloatArray, elapsed_s: float) -> None:
        """Recomputes `worth`. At each age, a group is worth at least as much as those of a lower level and the same
        kind."""
        decay = 0.5 ** (elapsed_s / self._halflife_s)
        self._used *= decay
        self._lost *= decay
        unended = self._lost + in_sight
        seen = np.cumsum((unended + self._used)[:, ::-1], axis=1)[:, ::-1] - 0.5 * unended
        common = self._used.sum(axis=0) / np.maximum(seen.sum(axis=0), 1.0)
        chance = np.clip((self._used + self._prior_spells * common) / (seen + self._prior_spells), 0.0, 1.0)
        self._chance = chance
        worth = _density(chance)
        by_level = np.maximum.accumulate(worth.reshape(self._levels, self._kinds, AGE_BINS), axis=0)
        self.worth = by_level.reshape(worth.shape)

    def reused_within(self, seconds: float) -> FloatArray:
        """[groups] the share of blocks that are used again within this time, as of the last `estimate`."""
        bins = int(bin_of(np.array([seconds]))[0]) + 1
        share: FloatArray = 1.0 - np.prod(1.0 - self._chance[:, :bins], axis=1)
        return share


def _density(chance: FloatArray) -> FloatArray:
    """[groups, bins] the largest ratio of expected hits to seconds over all later moments to give a block up.

    `chance`: [groups, bins] the probability of a use in each bin for blocks that reach it.
    """
    nothing = np.zeros((len(chance), 1))
    unused = np.concatenate([nothing + 1.0, np.cumprod(1.0 - chance, axis=1)[:, :-1]], axis=1)
    hits = unused * chance
    # A block that is used within a bin is used at its middle.
    seconds = _WIDTHS_S * (unused - 0.5 * hits)
    total_hits = np.concatenate([nothing, np.cumsum(hits, axis=1)], axis=1)
    total_s = np.concatenate([nothing, np.cumsum(seconds, axis=1)], axis=1)
    worth = np.empty_like(chance)
    for age in range(chance.shape[1]):
        more_s = np.maximum(total_s[:, age + 1 :] - total_s[:, age : age + 1], 1e-12)
        worth[:, age] = ((total_hits[:, age + 1 :] - total_hits[:, age : age + 1]) / more_s).max(axis=1)
    return worth
