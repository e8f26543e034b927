"""Who should hold how much: pure functions from what the engines report to targets, grants and recalls.

In order, on each device (sizes in units of the engine concerned, capacity in pages):

1. every engine keeps its floor; a pinned engine gets exactly its pin;
2. what running and waiting requests need, up to the engine's share: the owner comes first (law 6);
3. the same beyond the share, levelled, out of what is left;
4. what was needed in the last seconds (`peak`), so that a burst's memory is not fought over between its waves;
5. a reserve of free pages, so that the next need is met without waiting for anybody;
6. cache, where a unit saves most seconds of prefill a second. The curves have cliffs (an agent's prefixes fit wholly or
   not at all), so the next step is the best *run* of units, not the next unit: the lookahead of Qureshi and Patt,
   "Utility-Based Cache Partitioning", MICRO 2006, Algorithm 1;
7. what is left stays where it is, or goes to an engine that would otherwise evict, first to one whose cache is known to be reused.

Memory is recalled only when somebody has a use for it: at once for requests, and for cache only against an engine that got
nothing, and in favour of one that gave nothing, for `min_hold_s`. The reserve has two watermarks: it is refilled to the high
one when it falls below the low one, else left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from polder.errors import ConfigError
from polder.settings import PART, SECONDS, setting

__all__ = ["EngineView", "Plan", "PolicyConfig", "Recalled", "Target", "ample_pages", "decide", "missing_pages"]


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    reserve_low_ratio: float = setting(
        PART,
        key="reserve_low",
        default=0.04,
        example="0.04",
        help="When less than this part of the device is free, the reserve of free memory is refilled",
    )
    reserve_high_ratio: float = setting(
        PART,
        key="reserve_high",
        default=0.08,
        example="0.08",
        help="The part of the device up to which the reserve is refilled",
    )
    min_hold_s: float = setting(
        SECONDS,
        key="hold",
        default=1.0,
        example='"1s"',
        help="For so long after an engine got or gave cache memory, the opposite does not happen",
    )
    deadline_s: float = setting(
        SECONDS,
        key="deadline",
        default=0.2,
        example='"200ms"',
        help="Time to give recalled memory back; an engine that takes longer is overdue",
    )
    stickiness: float = 0.2
    """Cache that an engine holds already counts this much more than cache it would still have to fill."""

    def __post_init__(self) -> None:
        if not 0 <= self.reserve_low_ratio <= self.reserve_high_ratio < 0.5:
            raise ConfigError(
                f"reserve watermarks: need 0 <= low <= high < 0.5, got {self.reserve_low_ratio} and {self.reserve_high_ratio}"
            )
        if self.min_hold_s < 0 or self.deadline_s <= 0 or self.stickiness < 0:
            raise ConfigError("min_hold_s and stickiness cannot be negative, deadline_s must be positive")


@dataclass(frozen=True, kw_only=True)
class EngineView:
    """What the policy knows of one engine on one device. Sizes in units."""

    name: str
    pages_per_unit: int
    """On this device, all ranks together."""
    floor: int
    share: int
    ceiling: int
    held: int
    """Booked to it, grants in flight included."""
    recalled: int = 0
    """Part of `held` that it has been asked for and has not yet returned."""
    pinned: int = 0
    busy: int = 0
    waiting: int = 0
    peak: int = 0
    cached: int = 0
    curve: Sequence[float] = ()
    """Seconds of prefill saved per second with 0, 1, 2, ... units."""
    since_grow_s: float = float("inf")
    """Time since it last got memory for cache ..."""
    since_shrink_s: float = float("inf")
    """... and since it last gave some back."""

    @property
    def need(self) -> int:
        return min(max(self.busy + self.waiting, self.floor), self.ceiling)

    @property
    def kept(self) -> int:
        return self.held - self.recalled


class Target(NamedTuple):
    units: int
    reason: str


class Recalled(NamedTuple):
    units: int
    preempt: bool  # running requests must make room if nothing else does


@dataclass(frozen=True, kw_only=True)
class Plan:
    targets: dict[str, Target] = field(default_factory=dict)
    grants: dict[str, int] = field(default_factory=dict)
    recalls: dict[str, Recalled] = field(default_factory=dict)


def decide(
    total_pages: int,
    free_pages: int,
    engines: Sequence[EngineView],
    config: PolicyConfig,
    *,
    coming_pages: int = 0,
) -> Plan:
    """Targets of all engines, and the moves towards them that `free_pages` and the hold times allow now.

    `coming_pages`: will be free without a recall (weights that are being given up); they are part of `total_pages`.
    """
    high = int(total_pages * config.reserve_high_ratio)
    low = int(total_pages * config.reserve_low_ratio)
    targets = choose_targets(total_pages, high, engines, config)

    hard: dict[str, int] = {}
    soft: dict[str, int] = {}
    for engine in engines:
        target = targets[engine.name].units
        needed = engine.pinned or engine.need
        hard[engine.name] = max(0, min(target, needed) - engine.held)
        may_grow = engine.pinned > 0 or engine.since_shrink_s >= config.min_hold_s
        soft[engine.name] = max(0, target - engine.held) - hard[engine.name] if may_grow else 0
    by_name = {engine.name: engine for engine in engines}

    def pages(units: dict[str, int]) -> int:
        return sum(n * by_name[name].pages_per_unit for name, n in units.items())

    coming = coming_pages + sum(engine.recalled * engine.pages_per_unit for engine in engines)
    after_hard = free_pages + coming - pages(hard)
    refill = high - after_hard if after_hard < low else max(0, -after_hard)
    for_cache = max(0, pages(soft) - max(0, after_hard - high))
    return Plan(
        targets=targets,
        grants=_grants(free_pages, high, engines, hard, soft),
        recalls=_recalls(max(0, refill), for_cache, engines, targets, config.min_hold_s),
    )


def missing_pages(total_pages: int, engines: Sequence[EngineView]) -> int:
    """What requests need beyond `total_pages`, all that is free, coming, or held by engines without being needed.

    More than any recall can bring, unlike the plan of `decide`, whose targets end where the memory does.
    """
    return max(0, sum((e.pinned or e.need) * e.pages_per_unit for e in engines) - total_pages)


def ample_pages(total_pages: int, engines: Sequence[EngineView]) -> int:
    """What of `total_pages` would be left if all had what they need, or needed lately, and the cache that is known to be of use."""

    def kept(engine: EngineView) -> int:
        useful = next((units for units, saved in enumerate(engine.curve) if saved >= engine.curve[-1] - 1e-6), 0)
        return engine.pinned or min(max(engine.need, engine.peak, useful), engine.ceiling)

    return max(0, total_pages - sum(kept(engine) * engine.pages_per_unit for engine in engines))


def choose_targets(
    total_pages: int, reserve_pages: int, engines: Sequence[EngineView], config: PolicyConfig
) -> dict[str, Target]:
    """Where every engine should stand, steps 1 to 7 of the module's text. The sum never exceeds `total_pages`."""
    level: dict[str, int] = {}
    reason: dict[str, str] = {}
    left = total_pages
    for engine in engines:
        wanted = engine.pinned or engine.floor
        level[engine.name] = min(wanted, max(0, left // engine.pages_per_unit))
        left -= level[engine.name] * engine.pages_per_unit
        reason[engine.name] = "pinned" if engine.pinned else "floor"
    free_to_move = [engine for engine in engines if not engine.pinned]

    def part_of_share(engine: EngineView) -> tuple[float, ...]:
        return (level[engine.name] / max(1, engine.share),)

    def useful_first(engine: EngineView) -> tuple[float, ...]:
        reused = len(engine.curve) > 0 and engine.curve[-1] > 0
        return (0.0 if reused else 1.0, *part_of_share(engine))

    def raise_to(
        goal: dict[str, int], why: str, order: Callable[[EngineView], tuple[float, ...]] = part_of_share
    ) -> None:
        """Levels the engines up to their goals, a unit at a time, the one furthest below its share first."""
        nonlocal left
        open_ = {e.name: e for e in free_to_move if goal[e.name] > level[e.name]}
        while open_:
            name = min(open_, key=lambda n: order(open_[n]))
            engine = open_[name]
            if engine.pages_per_unit > left:
                del open_[name]
                continue
            level[name] += 1
            left -= engine.pages_per_unit
            reason[name] = why
            if level[name] >= goal[name]:
                del open_[name]

    raise_to({e.name: min(e.need, max(e.share, e.floor)) for e in free_to_move}, "requests, within its share")
    raise_to({e.name: e.need for e in free_to_move}, "requests, beyond its share")
    recent = {e.name: min(e.peak, e.ceiling) for e in free_to_move}
    raise_to({e.name: min(recent[e.name], e.share) for e in free_to_move}, "requests of the last seconds")
    held_back = min(left, reserve_pages)
    left -= held_back
    raise_to(recent, "requests of the last seconds")
    left = _fill_by_utility(left, free_to_move, level, reason, config.stickiness)
    raise_to({e.name: min(e.kept, e.ceiling) for e in free_to_move}, "nobody else has a use for it")
    raise_to(
        {e.name: min(e.ceiling, e.kept + 1 + e.kept // 4) if e.cached >= e.kept else 0 for e in free_to_move},
        "free memory instead of evictions",
        useful_first,
    )
    return {engine.name: Target(level[engine.name], reason[engine.name]) for engine in engines}


def _fill_by_utility(
    left: int, engines: Sequence[EngineView], level: dict[str, int], reason: dict[str, str], stickiness: float
) -> int:
    """Spends `left` pages on the runs of units with the most seconds saved per page. Returns the pages not spent."""
    while True:
        best: tuple[float, EngineView, int] | None = None
        for engine in engines:
            at = level[engine.name]
            top = min(engine.ceiling, len(engine.curve) - 1, at + left // engine.pages_per_unit)
            for units in range(at + 1, top + 1):
                gain = engine.curve[units] - engine.curve[at]
                if units <= engine.kept:
                    gain *= 1 + stickiness
                rate = gain / ((units - at) * engine.pages_per_unit)
                if gain > 1e-6 and (best is None or rate > best[0]):
                    best = (rate, engine, units)
        if best is None:
            return left
        _, engine, units = best
        left -= (units - level[engine.name]) * engine.pages_per_unit
        level[engine.name] = units
        reason[engine.name] = f"its prefix cache saves {engine.curve[units]:.3g} s of prefill a second"


def _grants(
    free_pages: int, reserve_pages: int, engines: Sequence[EngineView], hard: dict[str, int], soft: dict[str, int]
) -> dict[str, int]:
    """Units to hand out now: requests may use the reserve, cache may not. Owners below their share are served first."""
    grants: dict[str, int] = {}
    order = sorted(engines, key=lambda e: (e.held >= e.share, e.held / max(1, e.share)))
    left = free_pages
    for engine in order:
        units = min(hard[engine.name], left // engine.pages_per_unit)
        if units:
            grants[engine.name] = units
            left -= units * engine.pages_per_unit
    waiting = sum((hard[e.name] - grants.get(e.name, 0)) * e.pages_per_unit for e in engines)
    left -= max(reserve_pages, waiting)
    for engine in order:
        units = min(soft[engine.name], max(0, left) // engine.pages_per_unit)
        if units:
            grants[engine.name] = grants.get(engine.name, 0) + units
            left -= units * engine.pages_per_unit
    return grants


def _recalls(
    refill_pages: int,
    cache_pages: int,
    engines: Sequence[EngineView],
    targets: dict[str, Target],
    min_hold_s: float,
) -> dict[str, Recalled]:
    """Takes `refill_pages` from anybody above its target, and `cache_pages` more from those that have held it long enough.

    Who holds most above its share gives first. An engine pinned below what it holds gives back whether anybody waits or not.
    """
    recalls: dict[str, Recalled] = {}
    need = refill_pages + cache_pages
    for engine in sorted(engines, key=lambda e: e.kept / max(1, e.share), reverse=True):
        surplus = engine.kept - targets[engine.name].units
        if surplus <= 0:
            continue
        wanted = need if engine.since_grow_s >= min_hold_s else min(need, refill_pages)
        units = surplus if engine.pinned else min(surplus, -(-wanted // engine.pages_per_unit))
        if units <= 0:
            continue
        recalls[engine.name] = Recalled(units, preempt=engine.kept - units < engine.busy)
        taken = units * engine.pages_per_unit
        need, refill_pages = max(0, need - taken), max(0, refill_pages - taken)
    return recalls
