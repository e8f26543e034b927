"""Predicts which entries the next layer, or the next step, will want, to read them ahead.

Remembered steps vote. Each remembers a set that was read and the set that followed it, in the layer above or one step
later. A step votes for the entries of its second set, with the Jaccard similarity of its first set to the present set
as its weight. The entries with most votes are read first. There is no model and no training.
"""

from __future__ import annotations

import numpy as np

from polder.arrays import BoolArray, IntArray
from polder.swarm.activations import Profile

__all__ = ["likeliest"]

_VOTERS = 16
"""The number of steps that vote."""


def likeliest(before: Profile, after: Profile, present: IntArray, *, most: int, resident: BoolArray) -> IntArray:
    """At most `most` entries to read, the likeliest first, without resident ones ([after.size]).

    Counted from the newest, each step of `before` was followed by one of `after`; steps without a partner do not vote.
    """
    steps = min(before.steps, after.steps)
    before, after = (each.part(each.steps - steps, each.steps) for each in (before, after))
    in_present = np.zeros(before.size, dtype=np.bool_)
    in_present[present] = True
    shared = np.bincount(before.step_of_items(), weights=in_present[before.items], minlength=steps)
    likeness = shared / np.maximum(1, np.diff(before.starts) + int(in_present.sum()) - shared)
    voters = np.lexsort((-np.arange(steps), -likeness))[:_VOTERS]
    weight = np.zeros(steps)
    weight[voters] = likeness[voters]
    votes = np.bincount(after.items, weights=weight[after.step_of_items()], minlength=after.size)
    votes[resident] = 0
    first = np.argsort(-votes, kind="stable")[: max(0, most)]
    return first[votes[first] > 0]
