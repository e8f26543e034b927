"""Who should hold how much: pure functions from what the engines report to targets, grants and recalls.

In this order, on each device (sizes in units of the engine concerned, capacity in pages):

1. urgent claims: the weights of an engine that wakes;
2. every engine keeps its floor; a pinned engine gets exactly its pin;
3. what running and waiting requests need, up to the engine's share: the owner comes first (law 6);
4. the same beyond the share, levelled, out of what is left;
5. what was needed in the last seconds (`peak`), so that engines do not fight over a burst's memory between its waves;
6. a reserve of free pages, so that the next need is met without waiting for anybody;
7. other claims: weights that may come back because memory is ample;
8. cache, where a unit saves most seconds of prefill a second. The curves have cliffs (an agent's prefixes fit wholly or
   not at all), so the next step is the best *run* of units, not the next unit: the lookahead of Qureshi and Patt,
   "Utility-Based Cache Partitioning", MICRO 2006, Algorithm 1;
9. what is left stays where it is, or goes to an engine that would otherwise evict, first to one whose cache is known to
   be reused.

Memory is recalled only when somebody has a use for it. For requests it is recalled at once. For cache it is recalled
only from an engine that got nothing for `min_hold_s`, and in favour of one that gave nothing for as long. The reserve
has two watermarks: it is refilled to the high one when it falls below the low one, else left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from polder.errors import ConfigError
from polder.settings import PART, SECONDS, setting

__all__ = [
    "Claim",
    "EngineView",
    "Plan",
    "PolicyConfig",
    "Recalled",
    "Target",
    "ample_pages",
    "decide",
    "missing_pages",
]


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
        help="The least time between getting and giving up memory for cache",
    )
    deadline_s: float = setting(
        SECONDS,
        key="deadline",
        default=0.2,
        example='"200ms"',
        help="Time to give recalled memory back; an engine that takes longer is overdue",
    )
    stickiness: float = 0.2
    """Cache that an engine already holds counts this much more than cache that it would have to fill."""

    def __post_init__(self) -> None:
        if not 0 <= self.reserve_low_ratio <= self.reserve_high_ratio < 0.5:
            raise ConfigError(
                f"reserve watermarks: need 0 <= low <= high < 0.5, got {self.reserve_low_ratio} and {self.reserve_high_ratio}"
            )
        if self.min_hold_s < 0 or self.deadline_s <= 0 or self.stickiness < 0:
            raise ConfigError("min_hold_s and stickiness cannot be negative, deadline_s must be positive")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Pages that an engine needs for its weights on one device. The policy sets them aside as they come free."""

    engine: str
    pages: int
    step_pages: int = 1
    """They are of use in multiples of this only."""
    urgent: bool
    """True: before all engines' KV, with the reserve, by recalls that may preempt. False: after requests and the
    reserve, and before any cache."""


@dataclass(frozen=True, kw_only=True)
class EngineView:
    """What the policy knows of one engine's KV on one device. Sizes in units."""

    name: str
    pages_per_unit: int
    """All ranks on this device together."""
    floor: int
    share: int
    ceiling: int
    held: int
    """Booked to it, grants in flight included."""
    recalled: int = 0
    """Part of `held` that was recalled and is not returned yet."""
    pinned: int = 0
    busy: int = 0
    waiting: int = 0
    peak: int = 0
    cached: int = 0
    curve: Sequence[float] = ()
    """Seconds of prefill saved per second with 0, 1, 2, ... units."""
    since_grow_s: float = float("inf")
    """Time since it last got memory for cache."""
    since_shrink_s: float = float("inf")
    """Time since it last gave some back."""

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
    """KV units that each engine should have."""
    grants: dict[str, int] = field(default_factory=dict)
    """KV units to hand out now."""
    recalls: dict[str, Recalled] = field(default_factory=dict)
    claimed: dict[str, int] = field(default_factory=dict)
    """Engine -> free pages set aside for its claim."""


def decide(
    total_pages: int,
    free_pages: int,
    engines: Sequence[EngineView],
    config: PolicyConfig,
    *,
    claims: Sequence[Claim] = (),
    coming_pages: int = 0,
) -> Plan:
    """Targets of all engines, and the moves towards them that `free_pages` and the hold times allow now.

    `claims`: one per engine at most. `coming_pages`: part of `total_pages` that will be free without a recall, because
    weights are being given up.
    """
    high = int(total_pages * config.reserve_high_ratio)
    low = int(total_pages * config.reserve_low_ratio)
    targets, claims = choose_targets(total_pages, high, engines, claims, config)

    hard: dict[str, int] = {}
    soft: dict[str, int] = {}
    for engine in engines:
        target = targets[engine.name].units
        needed = engine.pinned or engine.need
        hard[engine.name] = max(0, min(target, needed) - engine.held)
        may_grow = engine.pinned > 0 or engine.since_shrink_s >= config.min_hold_s
        soft[engine.name] = max(0, target - engine.held) - hard[engine.name] if may_grow else 0
    by_name = {engine.name: engine for engine in engines}

    def pages(units: dict[str, int], *, urgent: bool) -> int:
        claimed = sum(claim.pages for claim in claims if claim.urgent is urgent)
        return claimed + sum(n * by_name[name].pages_per_unit for name, n in units.items())

    coming = coming_pages + sum(engine.recalled * engine.pages_per_unit for engine in engines)
    after_hard = free_pages + coming - pages(hard, urgent=True)
    refill = high - after_hard if after_hard < low else max(0, -after_hard)
    for_cache = max(0, pages(soft, urgent=False) - max(0, after_hard - high))
    grants, claimed = _grants(free_pages, high, engines, hard, soft, claims)
    return Plan(
        targets=targets,
        grants=grants,
        recalls=_recalls(max(0, refill), for_cache, engines, targets, config.min_hold_s),
        claimed=claimed,
    )


def missing_pages(total_pages: int, engines: Sequence[EngineView]) -> int:
    """What requests need beyond `total_pages`: beyond what any recall can bring. The targets of `decide` never exceed
    the total."""
    return max(0, sum((e.pinned or e.need) * e.pages_per_unit for e in engines) - total_pages)


def ample_pages(total_pages: int, engines: Sequence[EngineView]) -> int:
    """What would be left of `total_pages` if all engines had what they need or needed lately, and all cache that saves
    time."""

    def kept(engine: EngineView) -> int:
        useful = next((units for units, saved in enumerate(engine.curve) if saved >= engine.curve[-1] - 1e-6), 0)
        return engine.pinned or min(max(engine.need, engine.peak, useful), engine.ceiling)

    return max(0, total_pages - sum(kept(engine) * engine.pages_per_unit for engine in engines))


def choose_targets(
    total_pages: int, reserve_pages: int, engines: Sequence[EngineView], claims: Sequence[Claim], config: PolicyConfig
) -> tuple[dict[str, Target], list[Claim]]:
    """What every engine should have, and how much of each claim fits: the steps of the module's text.

    The sum never exceeds `total_pages`.
    """
    level: dict[str, int] = {}
    reason: dict[str, str] = {}
    left = total_pages
    met: list[Claim] = []

    def meet_claims(*, urgent: bool) -> None:
        nonlocal left
        for claim in claims:
            if claim.urgent is urgent:
                met.append(replace(claim, pages=_whole_steps(claim, left)))
                left -= met[-1].pages

    meet_claims(urgent=True)
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
        """Raises engines to their goals, one unit at a time, the one with the smallest part of its share first."""
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
    meet_claims(urgent=False)
    left = _fill_by_utility(left, free_to_move, level, reason, config.stickiness)
    raise_to({e.name: min(e.kept, e.ceiling) for e in free_to_move}, "nobody else has a use for it")
    raise_to(
        {e.name: min(e.ceiling, e.kept + 1 + e.kept // 4) if e.cached >= e.kept else 0 for e in free_to_move},
        "free memory instead of evictions",
        useful_first,
    )
    return {engine.name: Target(level[engine.name], reason[engine.name]) for engine in engines}, met


def _whole_steps(claim: Claim, pages: int) -> int:
    """As much of a claim as `pages` can meet."""
    return min(claim.pages, max(0, pages) // claim.step_pages * claim.step_pages)


def _fill_by_utility(
    left: int, engines: Sequence[EngineView], level: dict[str, int], reason: dict[str, str], stickiness: float
) -> int:
    """Spends `left` pages on the runs of units that save most seconds per page. Returns the pages that are left."""
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
    free_pages: int,
    reserve_pages: int,
    engines: Sequence[EngineView],
    hard: dict[str, int],
    soft: dict[str, int],
    claims: Sequence[Claim],
) -> tuple[dict[str, int], dict[str, int]]:
    """Units to hand out now, and pages to set aside for claims. Requests may use the reserve, cache may not."""
    grants: dict[str, int] = {}
    claimed: dict[str, int] = {}
    below_share_first = sorted(engines, key=lambda e: (e.held >= e.share, e.held / max(1, e.share)))
    left = free_pages

    def hand_out(units_of: dict[str, int], *, urgent: bool) -> int:
        """Returns the pages that were wanted and not free."""
        nonlocal left
        missing = 0
        for claim in claims:
            if claim.urgent is urgent:
                claimed[claim.engine] = _whole_steps(claim, left)
                left -= claimed[claim.engine]
                missing += claim.pages - claimed[claim.engine]
        for engine in below_share_first:
            units = min(units_of[engine.name], max(0, left) // engine.pages_per_unit)
            if units:
                grants[engine.name] = grants.get(engine.name, 0) + units
            left -= units * engine.pages_per_unit
            missing += (units_of[engine.name] - units) * engine.pages_per_unit
        return missing

    waiting = hand_out(hard, urgent=True)
    left -= max(reserve_pages, waiting)
    hand_out(soft, urgent=False)
    return grants, claimed


def _recalls(
    refill_pages: int,
    cache_pages: int,
    engines: Sequence[EngineView],
    targets: dict[str, Target],
    min_hold_s: float,
) -> dict[str, Recalled]:
    """Takes `refill_pages` from any engine above its target, and `cache_pages` more from those that held theirs long
    enough.

    The engine that holds most, measured in its share, gives first. An engine pinned below what it holds gives back in
    any case.
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
