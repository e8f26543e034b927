"""Which engines give up weights for others' KV cache, and which get them back. Pure functions, like the broker's
policy.

Giving weights up costs no copy, because the host copy always exists. Getting them back costs one copy and evicts the
cache that lies there. So memory is taken only when some is missing, and given back when it has been ample for a while.
Against thrashing, what was moved stays for `min_hold_s`. Taking frees `low_ratio` of the device beyond what is missing,
and giving back stops where `high_ratio` stays free (Oneiros, SoCC 2025, section 4: remapping and Dynamic Reversion).

Weights are taken from, in this order:
1. Idle engines. When models take turns round-robin, the one that ran last runs again last, so it comes first. Otherwise
   the one that expects its next request last comes first. `arrival_pattern` measures which of the two it is. An idle
   engine is put to sleep wholly: with some of its layers it must wait for a load before its first token just as well,
   and the others serve nobody meanwhile. Only if so little is missing that the engine can go on by streaming
   (`streamable`), just that much is taken, and the engine keeps answering at once.
2. Serving engines: the segments that their own cost formula allows them to stream, at most `active_ratio` of their
   layers.
3. When that is not enough for an engine that has waited `turn_s` for its weights: serving engines that have had theirs
   for as long, the longest first. Their requests stand still until it is their turn again. So nobody waits without
   bound beside an engine that is never idle, and engines that do not fit together take turns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from polder.errors import ConfigError

__all__ = ["Balance", "Move", "Moves", "Pattern", "SharingConfig", "WeightView", "arrival_pattern", "weight_moves"]

CYCLIC = 0.8  # a score from which the order of turns predicts well; turns in random order score 0.5


@dataclass(frozen=True, kw_only=True)
class SharingConfig:
    low_ratio: float = 0.02
    """What is taken from an engine beyond what is missing, as a share of the device's pages."""
    high_ratio: float = 0.10
    """Giving back leaves at least this share of the device's pages free."""
    min_hold_s: float = 5.0
    """Segments that moved stay for so long, unless an engine waits for its weights. Memory must be ample for as
    long."""
    min_idle_s: float = 1.0
    """An engine is idle when its last request ended so long ago."""
    waker_idle_s: float = 0.05
    """The same, when another engine waits for its weights. Long enough for the next request of a burst to arrive."""
    turn_s: float = 3.0
    """An engine that has waited so long for its weights pauses others that have had theirs for as long."""
    floor_ratio: float = 0.0
    """Share of a model's segments that is never taken, except by an operator."""
    active_ratio: float = 0.5
    """The largest share of its layers that a serving engine may lack."""

    def __post_init__(self) -> None:
        if not 0 <= self.low_ratio <= self.high_ratio < 1:
            raise ConfigError(
                f"weights watermarks: need 0 <= low <= high < 1, got {self.low_ratio} and {self.high_ratio}"
            )
        if not (0 <= self.floor_ratio <= 1 and 0 <= self.active_ratio <= 1):
            raise ConfigError("floor_ratio and active_ratio are shares of a model's layers: between 0 and 1")
        if min(self.min_hold_s, self.min_idle_s, self.waker_idle_s, self.turn_s) < 0:
            raise ConfigError("min_hold_s, min_idle_s, waker_idle_s and turn_s cannot be negative")


@dataclass(frozen=True, kw_only=True)
class WeightView:
    """One engine's weights on one device. An engine that cannot move any now has none: no connection, or a move under
    way."""

    name: str
    layers: int
    layer_pages: int
    """Pages of a segment on this device, all ranks together."""
    segments: int
    """Segments that it holds or is getting. 0: it sleeps."""
    spare_segments: int = 0
    """What it could give up now, as it reported."""
    streamable: int = 0
    """How many of its layers it could stream when it last served."""
    idle_s: float = 0.0
    """Time since its last request ended; 0 while it has any."""
    next_use_s: float = math.inf
    waking: bool = False
    """It is the engine that gets all of its layers next. Those that wait behind it may be asked for what they hold."""
    pinned: bool = False
    """An operator decides how much it has."""
    since_change_s: float = math.inf

    @property
    def lost(self) -> int:
        return self.layers - self.segments


@dataclass(frozen=True, kw_only=True)
class Balance:
    """What one device lacks or has too much of, in pages."""

    total_pages: int
    waker_missing_pages: int = 0
    """Missing for the engine that waits for its weights, after free and coming pages and cache that may be recalled."""
    waker_waits_s: float = 0.0
    """How long that engine has waited."""
    kv_missing_pages: int = 0
    """Missing for requests, in the same way."""
    ample_pages: int = 0
    """Pages that neither requests nor useful cache needed at any time of the last `min_hold_s`."""


class Move(NamedTuple):
    segments: int
    reason: str
    preempt: bool = False
    """The engine's requests are paused for it."""


@dataclass(frozen=True, kw_only=True)
class Moves:
    takes: dict[str, Move] = field(default_factory=dict)
    gives: dict[str, Move] = field(default_factory=dict)


class Pattern(NamedTuple):
    kind: Literal["round-robin", "irregular"]
    score: float
    """Mean rank of the engine whose turn came: 1 = always the one that had waited longest, as in a strict cycle; 0.5 =
    random; 0 = always one of the last."""


def arrival_pattern(turns: Sequence[str]) -> Pattern:
    """How engines take turns. `turns`: the engine of each burst of requests, oldest first. Repetitions count once.

    An engine cannot follow itself. So of k engines the others have ranks 0 (ran last but one) to k - 2 (has waited
    longest). Two engines can only alternate, which is a cycle. Too few turns are irregular.
    """
    recent: list[str] = []  # most recent last
    places: list[float] = []
    for name in turns:
        if recent and name == recent[-1]:
            continue
        if name in recent:
            place = len(recent) - 2 - recent.index(name)
            places.append(place / (len(recent) - 2) if len(recent) > 2 else 1.0)
            recent.remove(name)
        recent.append(name)
    score = sum(places) / len(places) if places else 0.5
    cyclic = len(places) >= len(recent) and score >= CYCLIC
    return Pattern("round-robin" if cyclic else "irregular", score)


def weight_moves(balance: Balance, engines: Sequence[WeightView], pattern: Pattern, config: SharingConfig) -> Moves:
    """The segments to take or to give now, never both on one device."""
    if balance.waker_missing_pages + balance.kv_missing_pages > 0:
        return Moves(takes=_takes(balance, engines, pattern, config))
    return Moves(gives=_gives(balance, engines, config))


def _takes(balance: Balance, engines: Sequence[WeightView], pattern: Pattern, config: SharingConfig) -> dict[str, Move]:
    takes: dict[str, Move] = {}
    waker, missing = balance.waker_missing_pages, balance.waker_missing_pages + balance.kv_missing_pages
    margin = int(balance.total_pages * config.low_ratio)
    idle_s = min(config.min_idle_s, config.waker_idle_s) if waker > 0 else config.min_idle_s
    for engine, why in _victims(engines, pattern, idle_s):
        if missing <= 0:
            break
        if waker <= 0 and engine.since_change_s < config.min_hold_s:
            continue  # the hold time does not count while an engine waits for its weights
        needed, wanted = (-(-pages // engine.layer_pages) for pages in (missing, missing + margin))
        if engine.idle_s > 0:
            running = min(engine.streamable, _may_lack(engine, config)) - engine.lost
            whole = min(engine.spare_segments, engine.segments - math.ceil(config.floor_ratio * engine.layers))
            segments = min(wanted, running) if needed <= running else whole
        else:
            segments = min(wanted, engine.spare_segments, _may_lack(engine, config) - engine.lost)
        if segments > 0:
            whom = f"{waker} pages for an engine that wakes" if waker > 0 else f"{missing} pages for requests"
            takes[engine.name] = Move(segments, f"{why}; missing: {whom}")
            waker, missing = waker - segments * engine.layer_pages, missing - segments * engine.layer_pages
    for engine in _whose_turn_is_over(engines, balance, config):
        # What is coming anyway may be enough: serving engines are paused for weights only, not for caches and requests.
        if waker <= 0:
            break
        streamed = takes[engine.name].segments if engine.name in takes else 0
        reason = f"it has served for {engine.since_change_s:.1f} s and is paused for one that waits for its weights"
        takes[engine.name] = Move(engine.segments, reason, preempt=True)
        waker -= (engine.segments - streamed) * engine.layer_pages
    return takes


def _whose_turn_is_over(engines: Sequence[WeightView], balance: Balance, config: SharingConfig) -> Iterator[WeightView]:
    """Serving engines that may be paused, the one that has had its weights for the longest first."""
    if balance.waker_waits_s < config.turn_s or config.floor_ratio > 0:
        return
    serving = [e for e in engines if e.segments and not e.waking and not e.idle_s and e.since_change_s >= config.turn_s]
    yield from sorted(serving, key=lambda e: e.since_change_s, reverse=True)


def _victims(engines: Sequence[WeightView], pattern: Pattern, min_idle_s: float) -> Iterator[tuple[WeightView, str]]:
    movable = [engine for engine in engines if engine.segments and not engine.waking]
    idle = [engine for engine in movable if engine.idle_s > 0 and engine.idle_s >= min_idle_s]
    if pattern.kind == "round-robin":
        idle.sort(key=lambda e: e.idle_s)
        why = "it ran last, and engines take turns"
    else:
        idle.sort(key=lambda e: (e.next_use_s, e.idle_s), reverse=True)
        why = "it expects its next request last"
    yield from ((engine, f"idle for {engine.idle_s:.1f} s, {why}") for engine in idle)
    serving = [engine for engine in movable if engine.idle_s == 0]
    serving.sort(key=lambda e: e.spare_segments * e.layer_pages, reverse=True)
    yield from ((engine, "it can stream these layers without delay") for engine in serving)


def _may_lack(engine: WeightView, config: SharingConfig) -> int:
    """Layers that the engine may lack while it serves."""
    above_floor = engine.layers - math.ceil(config.floor_ratio * engine.layers)
    return min(int(config.active_ratio * engine.layers), above_floor, engine.layers - 1)


def _gives(balance: Balance, engines: Sequence[WeightView], config: SharingConfig) -> dict[str, Move]:
    """Serving engines first, then those that are needed soonest. A sleeping engine gets all of its segments or none."""
    gives: dict[str, Move] = {}
    left = balance.ample_pages - math.ceil(balance.total_pages * config.high_ratio)
    short = [engine for engine in engines if engine.lost and not engine.waking and not engine.pinned]
    for engine in sorted(short, key=lambda e: (e.idle_s > 0, e.next_use_s, e.idle_s)):
        if engine.since_change_s < config.min_hold_s:
            continue
        segments = min(engine.lost, max(0, left) // engine.layer_pages)
        if segments and (engine.segments or segments == engine.layers):
            gives[engine.name] = Move(
                segments, f"{balance.ample_pages} pages have been ample for {config.min_hold_s:g} s"
            )
            left -= segments * engine.layer_pages
    return gives
