"""Decides whether it pays to write blocks into the tiers at all.

Every written block costs a copy, and a copy is wasted when nobody asks for the block again. Where nothing is ever
reused, these copies are the whole cost of having tiers, and that must not exceed 1 % (law 7 in docs/structures.md). So
the gate measures which share of the blocks that requests ask for had been computed before: blocks that a tier has, and
blocks whose keys alone are remembered, because they were not written or are gone. While that share is lower than what a
copy costs compared with computing a block, nothing is written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

__all__ = ["ReuseGate"]


class ReuseGate:
    """Not thread-safe. All counts are blocks."""

    def __init__(self, *, remembered: int, least_reuse: float = 0.02, trial: int = 512) -> None:
        """`remembered`: how many keys are kept. `least_reuse`: the share of reused blocks from which writing pays.
        `trial`: how many blocks are asked for before the gate may close."""
        self._remembered, self._least, self._trial = remembered, least_reuse, trial
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._asked = self._again = 0.0
        self.open = True

    def asked(self, keys: Sequence[bytes], held: Collection[bytes] = ()) -> int:
        """A request asks for these blocks, which the engine's own cache lacks. `held`: those that a tier has.

        Returns how many were seen before.
        """
        again = sum(1 for key in keys if key in self._seen or key in held)
        fade = max(0.0, 1.0 - len(keys) / (4 * self._trial))
        self._asked = fade * self._asked + len(keys)
        self._again = fade * self._again + again
        self.open = self._asked < self._trial or self._again >= self._least * self._asked
        return again

    def computed(self, keys: Sequence[bytes]) -> None:
        """The engine has computed these blocks, whether they are written or not."""
        for key in keys:
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > self._remembered:
            self._seen.popitem(last=False)
