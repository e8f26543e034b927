"""Hit ratio against capacity, at the capacities of the reference curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from polder.sim.belady import belady_hit_ratio
from polder.sim.replay import replay
from polder.sim.traces import Trace, reference_curve
from polder.tiers.eviction.policy import EvictionPolicy, Lru

__all__ = ["CurvePoint", "cache_curve"]


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Hit ratios (blocks hit / blocks requested) at one capacity."""

    capacity_tokens: int
    lru: float
    reference_lru: float
    """Computed independently of this package. The reference mixes sessions in a slightly different order."""
    polder: float | None
    belady: float
    reference_belady: float | None
    ideal: float
    """Hit ratio of a cache without limit."""
    us_per_block: float | None
    """Microseconds of CPU for each requested block, in Polder's policy and the table around it."""

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


def cache_curve(trace: Trace, make_policy: Callable[[int], EvictionPolicy] | None) -> Iterator[CurvePoint]:
    """Replays the trace with LRU, with `make_policy` if there is one, and with Belady's policy."""
    ideal = belady_hit_ratio(trace, trace.unique_blocks)
    for capacity_tokens, reference_lru, reference_belady in reference_curve(trace.name):
        capacity = capacity_tokens // trace.block_tokens
        ours = replay(trace, capacity, make_policy) if make_policy else None
        yield CurvePoint(
            capacity_tokens=capacity_tokens,
            lru=replay(trace, capacity, Lru).hit_ratio,
            reference_lru=reference_lru,
            polder=ours.hit_ratio if ours else None,
            belady=belady_hit_ratio(trace, capacity),
            reference_belady=reference_belady,
            ideal=ideal,
            us_per_block=ours.us_per_block if ours else None,
        )
