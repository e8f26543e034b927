"""Predicts which entries the next layer, or the next step, will want, to read them ahead within a byte budget.

Remembered steps vote. Each remembers a set that was read and the set that followed it, in the layer above or one step
later. A step votes for the items of its second set, with the Jaccard similarity of its first set to the present set as
its weight. The items with most votes are read first. There is no model and no training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polder.arrays import BoolArray, IntArray
from polder.errors import ConfigError
from polder.swarm.activations import Profile

__all__ = ["Predictor"]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Step s of `before` was followed by step s of `after`. Raises ConfigError when their numbers of steps differ."""

    before: Profile
    after: Profile
    nearest: int = 16
    """The number of steps that vote."""

    def __post_init__(self) -> None:
        if self.before.steps != self.after.steps:
            raise ConfigError(f"prediction: {self.before.steps} steps followed by {self.after.steps}")

    def ahead(self, present: IntArray, *, budget_bytes: int, item_bytes: int, resident: BoolArray) -> IntArray:
        """Items to read, the likeliest first, at most `budget_bytes` of them, without resident ones ([after.size])."""
        budget = max(0, budget_bytes) // item_bytes
        in_present = np.zeros(self.before.size, dtype=np.bool_)
        in_present[present] = True
        lengths = np.diff(self.before.starts)
        shared = np.bincount(
            self.before.step_of_items(), weights=in_present[self.before.items], minlength=self.before.steps
        )
        likeness = shared / np.maximum(1, lengths + int(in_present.sum()) - shared)
        newest_first = -np.arange(self.before.steps)
        voters = np.lexsort((newest_first, -likeness))[: self.nearest]
        weight = np.zeros(self.before.steps)
        weight[voters] = likeness[voters]
        votes = np.bincount(self.after.items, weights=weight[self.after.step_of_items()], minlength=self.after.size)
        votes[resident] = 0
        likeliest = np.argsort(-votes, kind="stable")[:budget]
        return likeliest[votes[likeliest] > 0]
