"""Whether writing blocks into the tiers pays at all, learnt from what requests ask for.

Every block that is written costs a copy; one that nobody asks for again is a copy for nothing, and where nothing is ever reused
that is the whole cost of having tiers (law 7: at most 1 %). So the share of asked blocks that had been computed before is
measured: those that a tier has, and those whose keys alone are remembered, for they were not written or are gone. While that
share is below what a copy costs, beside computing a block, only a sample of requests is written, so that what comes back later
is noticed and served.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

__all__ = ["ReuseGate"]


class ReuseGate:
    """Not thread-safe. Counts are blocks."""

    def __init__(self, *, remembered: int, least_reuse: float = 0.02, trial: int = 512) -> None:
        """`remembered`: keys kept; `least_reuse`: share of reused blocks that pays; `trial`: blocks written before any
        judgement."""
        self._remembered, self._least, self._trial = remembered, least_reuse, trial
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._asked = self._again = 0.0
        self.open = True

    def asked(self, keys: Sequence[bytes], held: Collection[bytes] = ()) -> int:
        """A request asks for these blocks, which its engine's own cache has not; tiers have those in `held`.

        Returns how many were seen before."""
        again = sum(1 for key in keys if key in self._seen or key in held)
        fade = max(0.0, 1.0 - len(keys) / (4 * self._trial))
        self._asked = fade * self._asked + len(keys)
        self._again = fade * self._again + again
        self.open = self._asked < self._trial or self._again >= self._least * self._asked
        return again

    def computed(self, keys: Sequence[bytes]) -> None:
        """These blocks exist now; whether they are written or not, they may be asked for again."""
        for key in keys:
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > self._remembered:
            self._seen.popitem(last=False)
